"""Measures this machine's accelerator and writes one file: `bash launch/gpu_report.sh`

    python -m simclr_jax.gpu_report --config=configs/imagenet.py --output=docs/gpu.md [--images=256,512,1024]

The file has the steps of batches of these sizes, and of a large batch in microbatches: PyTorch's where it is
installed, ours, ours with views distorted on the device, and the rate that the planner expects. NT-Xent from
2,048 pairs on follows, and the input pipeline where TensorFlow is installed. Each line is written as soon as
it is known.
"""

import datetime
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from simclr_jax import benchmark
from simclr_jax.benchmark import torch_step
from simclr_jax.config import command_line
from simclr_jax.plan import cost
from simclr_jax.process import UserError, escape, reason_of

_OUTPUT = flags.DEFINE_string("output", "docs/gpu.md", "The file to write.")
_IMAGES = flags.DEFINE_list("images", ["256", "512", "1024"], "Images of the steps to measure.")
_LARGE = flags.DEFINE_list("large", ["8192", "64"], "Images and microbatches of a large batch; '' for none.")
_PAIRS = flags.DEFINE_integer(
    "pairs", 131072, "Pairs of the largest NT-Xent.", lower_bound=min(benchmark.PAIRS)
)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "tensorflow")
_HEAD = ("images", "", "views/s", "to PyTorch", "GiB", "peak FLOPs", "peak bandwidth", "planned views/s")


def lines(
    config, *, images: list[int], large: tuple[int, int] | None, pairs: int, steps: int = 10
) -> Iterator[str]:
    """Yields the lines of a Markdown file.

    Args:
      config: a config of pretraining.
      images: batch sizes of steps without microbatches; the row of one that does not fit says so.
      large: batch size and microbatches of one more step.
      pairs: positive pairs of the largest NT-Xent.
      steps: how many steps are timed for each row.
    """
    yield f"# {cost.run_in_process(_kind)}\n"
    # The first package of a name on the path is the one that is imported.
    versions = {package.name: package.version for package in reversed([*importlib.metadata.distributions()])}
    versions = ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)
    yield f"{versions}; {datetime.date.today()}.\n"
    yield f"The step of pretraining, ResNet-{config.model.depth} at {config.image_size} pixels, on random"
    yield "images that lie on the device: plain PyTorch's, ours, and ours with `augment.on_device=True`."
    yield f"Each has a process of its own; medians of {steps} steps.\n"
    sizes = [*((rows, 1) for rows in images), *([large] if large else [])]
    yield from benchmark.table(_HEAD, _step_rows(config, sizes, steps))
    yield "\nNT-Xent and its gradient on one device, projections of 128 dimensions:\n"
    yield from cost.run_in_process(_loss_lines, pairs)
    if importlib.util.find_spec("tensorflow"):
        rate = cost.run_in_process(benchmark.input_rate, config)
        yield f"\nThe input pipeline makes {rate:,.0f} images/s a core, two views of each."


def _step_rows(config, sizes, steps):
    """Yields three rows for each batch size and its microbatches: PyTorch, ours, ours with `on_device`."""
    classes = cost.Examples.from_config(config.dataset).num_classes
    for batch_size, microbatches in sizes:
        ours, distorting = (config.copy_and_resolve_references() for _ in range(2))
        for variant, on_device in ((ours, False), (distorting, True)):
            variant.update(batch_size=batch_size, microbatches=microbatches, augment={"on_device": on_device})
        measures = {
            "PyTorch": (torch_step.torch_step_rate, ours, classes, steps),
            "ours": (benchmark.step_rate, ours, steps),
            "on_device": (benchmark.step_rate, distorting, steps),
        }
        parts = f" in {microbatches}" if microbatches > 1 else ""
        rates = {}
        for name, measure in measures.items():
            cells = [f"{batch_size:,}{parts}", name]
            try:
                report = cost.run_in_process(*measure)
            except Exception as error:  # out of memory is a RuntimeError of PyTorch's
                yield [*cells, reason_of(error, 60)]
                continue
            rates[name] = report["views"]
            cells.append(f"{report['views']:,.0f}")
            cells.append(f"{report['views'] / rates['PyTorch']:.2f}" if "PyTorch" in rates else "")
            cells.append(f"{report['memory'] / cost.GIB:.1f}" if "memory" in report else "")
            cells += [f"{report[share]:.1%}" if share in report else "" for share in ("flops", "bandwidth")]
            cells.append(f"{2 * batch_size / report['expected']:,.0f}" if "expected" in report else "")
            yield cells


def _kind():
    return jax.devices()[0].device_kind


def _loss_lines(pairs):
    return list(benchmark.loss_table([size for size in benchmark.PAIRS if size <= pairs]))


def _numbers(name, words):
    """Parses the whole numbers of a flag's list; empty words are left out."""
    if wrong := [word for word in words if word and not (word.isdecimal() and int(word))]:
        raise UserError(f"--{name}={','.join(words)}: '{wrong[0]}' is no whole number from 1 on")
    return [int(word) for word in words if word]


def write_report(_) -> None:
    """Measures what the command line asks for and writes the file."""
    config = command_line.read_config()
    cost.check_pretraining(config, "the report is")
    images, large = _numbers("images", _IMAGES.value), _numbers("large", _LARGE.value)
    if len(large) not in (0, 2):
        raise UserError(f"--large={','.join(_LARGE.value)}: expected images,microbatches, as 8192,64")
    output = Path(_OUTPUT.value)
    if output.exists():
        raise UserError(f"--output={escape(output)} exists already: choose another file, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for line in lines(config, images=images, large=tuple(large) or None, pairs=_PAIRS.value):
            for stream in (None, file):
                print(line, file=stream, flush=True)
    print(f"written to {escape(output)}")
