"""Plans what a run costs, before it runs: `python -m simclr_jax.plan --config=FILE --topology=v4:4x4x8`

Compiles the train step of `simclr_jax.train`, ahead of time, for a topology, on any Linux machine, without
its devices, and prints what it needs of each. TPUs take the compiler of jax[tpu], libtpu, GPUs that of
jax-cuda13-pjrt, no driver and no CUDA. Exits with 1 where a step does not fit.

examples:
  python -m simclr_jax.plan --config=configs/imagenet.py --topology=v4-256 --price=3.2
      on a slice of Cloud TPU; v4:4x4x8, its chips, is the same
  python -m simclr_jax.plan --config=configs/imagenet.py --topology=h100:8,h200:2x8,rtx4090:4
      a table of GPUs, of one host or of two
  python -m simclr_jax.plan --config=configs/imagenet.py --topology=a100:8 --compare
      beside the forms of the step that need less memory
  python -m simclr_jax.plan --config=configs/imagenet.py --topology=h100:8 --chain
      pretraining, linear evaluation, fine-tuning on all labels and distillation
"""

import collections
import functools
import itertools
import math
import sys

from absl import flags
from ml_collections import ConfigDict

from simclr_jax import benchmark
from simclr_jax.config import command_line, settings
from simclr_jax.plan import cost, topologies
from simclr_jax.plan.forecast import describe, forecast, gib, priced, remedy
from simclr_jax.process import UserError, say
from simclr_jax.profiling.chips import find_chip
from simclr_jax.workdir import report

_TOPOLOGY = flags.DEFINE_string(
    "topology", "local", "As v4:4x4x8, v4-256 or h100:8; several by commas; 'local': these devices."
)
_COMPARE = flags.DEFINE_boolean("compare", False, "Compares the plain step, remat and microbatches.")
_PRICE = flags.DEFINE_float("price", None, "US dollars of an hour of one device.", lower_bound=0.0)
_CHAIN = flags.DEFINE_boolean("chain", False, "Plans linear_eval, finetune and distill, too.")
_HEAD = ["", "devices", "images a device", "memory, GiB", "TFLOPs"]
_HEAD += ["least ms a step", "expected", "hours", "device-hours", "images/s a host", "cores"]


def _plan_one(config, topology, images_per_core) -> bool:
    """Prints a plan; returns whether the step fits."""
    plan = cost.measure_in_process(config, topology)
    report.print_table(describe(plan, config, images_per_core, _PRICE.value))
    change = remedy(plan, config)
    print(f"does not fit: {change}" if change else "fits" if find_chip(plan["kind"]) else "compiles")
    return change is None


def _plan_table(cases, images_per_core) -> bool:
    """Prints a row of a Markdown table for every (name, config, topology, teacher), and their sum in a chain.

    Returns:
      Whether all fit.
    """
    fits, sums = [], collections.Counter()

    def row(name, config, topology, teacher=None):
        try:
            plan = cost.measure_in_process(config, topology, teacher)
        except UserError as error:
            fits.append(False)
            return [name, str(error)]
        chip, expected = find_chip(plan["kind"]), forecast(plan, config)
        fits.append(remedy(plan, config) is None)
        memory = f"{gib(plan):.1f} of {chip.memory if chip else '?'}"
        cells = [name, f"{plan['devices']} x {plan['kind']}", str(config.batch_size // plan["devices"])]
        cells += [memory if fits[-1] else f"**{memory}**", f"{plan['flops'] / 1e12:.2f}"]
        if expected:
            cells += [f"{expected[key] * 1e3:.1f}" for key in ("least", "step")]
            cells += [f"{expected['hours']:.2f}", priced(expected["device_hours"], _PRICE.value)]
            cells += [f"{expected['images']:,.0f}"]
            sums.update({topology: expected["device_hours"]})
            if config.task != "pretrain":
                return cells
            on_device = "images" in plan["memory"]
            cells += ["0" if on_device else f"{math.ceil(expected['images'] / images_per_core()):,}"]
        return cells

    for line in benchmark.table(_HEAD, itertools.starmap(row, cases)):
        say(line)
    for topology, device_hours in sums.items() if _CHAIN.value else ():
        say(f"{topology}: {priced(device_hours, _PRICE.value)} device-hours in all")
    return all(fits)


def _chain(config):
    """Yields the tasks that follow pretraining, as (name, config, model of the teacher).

    As in their runs, the network and the size of images are those of pretraining; the dataset is the same.
    """
    kept = [
        (key, value)
        for key, value in command_line.given().items()
        if key.startswith(("dataset.", "model.", "image_size")) and key != "dataset.on_device"
    ]
    for name in ("linear_eval", "finetune", "distill"):
        own = [pair for pair in kept if name != "distill" or not pair[0].startswith("model.")]
        task, _, _ = settings.make(f"{command_line.file()}:{name}", own, as_text=False)
        yield name, task.copy_and_resolve_references(), config.model if name == "distill" else None


def _forms(config):
    """Yields the plain step and its two forms that need less memory, as (name, config)."""
    parts = config.microbatches if config.microbatches > 1 else 8
    for name, change in {
        "plain": {"microbatches": 1, "remat": False},
        "remat": {"microbatches": 1, "remat": True},
        f"{parts} microbatches": {"microbatches": parts, "remat": False},
    }.items():
        variant = ConfigDict(config)
        variant.update(change)
        yield name, variant


def plan(_) -> None:
    config = command_line.read_config()
    cost.check_pretraining(config, "plans are")
    images_per_core = functools.cache(lambda: benchmark.input_rate(config, seconds=5))
    places = [name if name == "local" else topologies.read(name).name for name in _TOPOLOGY.value.split(",")]
    forms = list(_forms(config)) if _COMPARE.value else [("", config)]
    forms += list(_chain(config)) if _CHAIN.value else []
    if len(places) * len(forms) == 1:
        fits = _plan_one(config, places[0], images_per_core)
    else:
        cases = [
            (f"{config.dataset.name} {place} {name}".strip(), form, place, *teacher)
            for place in places
            for name, form, *teacher in forms
        ]
        fits = _plan_table(cases, images_per_core)
    sys.exit(not fits)


if __name__ == "__main__":
    command_line.run(plan)
