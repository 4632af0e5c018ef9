"""How fast this machine is: `python -m simclr_jax.benchmark input|step|loss [--config=FILE]`

input  images/s that the input pipeline of pretraining makes on this machine's cores, for a config, with the
       official chain, albumentations and lightly beside it, in turns
step   views/s and memory of the train step on this machine's devices, for a config, without an input
       pipeline, and with --peer=torch those of the same step in PyTorch, on one device
loss   time and memory of NT-Xent, plain and in tiles, from 2,048 pairs on

step and loss need no TensorFlow.
"""

import io
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from simclr_jax import command_line, losses, parallel, train
from simclr_jax.errors import UserError
from simclr_jax.peers import torch_step, views
from simclr_jax.plan import cost
from simclr_jax.plan.forecast import forecast
from simclr_jax.tasks import pretrain

_PEER = flags.DEFINE_enum("peer", None, ["torch"], "What `benchmark step` measures beside ours.")

ROWS = 64  # images of a batch of the input benchmark
PAIRS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


def input_rate(config, seconds: float = 10.0) -> float:
    """Images/s a core, of two views each, that the input pipeline makes from JPEG files, with all cores busy.

    The files are those of `jpeg_files`.
    """
    return _rate_of(_input_batches(config, jpeg_files(config.image_size)), seconds)


def jpeg_files(image_size: int) -> np.ndarray:
    """64 JPEG files of parts of two photographs, `image_size` pixels a side up to 96, else as ImageNet's are.

    Those are 500 x 375 pixels and 100 KB.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng, width, height = np.random.default_rng(0), 500, 375
    records = np.empty(64, object)
    for row in range(len(records)):
        whole = photographs[row % len(photographs)]
        left, top = rng.integers(whole.width - width + 1), rng.integers(whole.height - height + 1)
        part = whole.crop((left, top, left + width, top + height))
        if image_size <= 96:
            part = part.resize((image_size, image_size))
        file = io.BytesIO()
        part.save(file, "JPEG", quality=97)
        records[row] = file.getvalue()
    return records


def _input_batches(config, records):
    from simclr_jax.data import datasets
    from simclr_jax.data.decode import decode_bytes

    labels = np.full(len(records), -1, np.int32)
    source = datasets.Source("JPEG files", len(records), 0, decode_bytes, records, labels, takes_look=True)
    config = ConfigDict(config)
    config.batch_size = ROWS
    return pretrain.batches(config, source, 0)


def _rate_of(batches, seconds):
    """Images/s a core that an open pipeline gives; its first batches, made before, do not count."""
    from simclr_jax.data import CORES

    for _ in range(4):
        next(batches)
    begun, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        next(batches)
        steps += 1
    return steps * ROWS / passed / CORES


def input_rates(config, rounds: int = 9, seconds: float = 3.0) -> dict[str, list[float]]:
    """Images/s a core of the input pipeline and of what others do, in turns, one number a round.

    'ours', 'ours, on_device', 'official', and 'albumentations' and 'lightly' where they are installed.
    """
    from simclr_jax.data import CORES, official_chain

    records = jpeg_files(config.image_size)
    options = {"image_size": config.image_size, "strength": config.augment.color_jitter_strength}
    rates = {}
    for name, on_device in (("ours", False), ("ours, on_device", True)):
        form = config.copy_and_resolve_references()
        form.augment.on_device = on_device
        rates[name] = partial(_rate_of, _input_batches(form, records))
    rates["official"] = partial(_rate_of, official_chain.batches(records, batch_size=ROWS, **options))
    with ExitStack() as stack:
        for name in views.installed():
            workers = views.Workers(name, records, cores=CORES, **options)
            stack.callback(workers.close)
            rates[name] = workers.rate
        found = {name: [] for name in rates}
        for _ in range(1 + rounds):
            for name, rate in rates.items():
                found[name].append(rate(seconds))
                time.sleep(1)  # its buffers fill in nobody's turn
    return {name: line[1:] for name, line in found.items()}  # functions were traced in the first


def step_rate(config, steps: int = 10) -> dict[str, float]:
    """Runs the train step of pretraining on random images.

    Returns:
      'seconds' a step, the median of `steps`; 'views' a second over all 'devices', in words; peak 'memory' of
      a device in bytes, where the platform tells; where the chip's peaks are known 'flops' and 'bandwidth',
      shares of them, of what `cost.count` counts, and 'expected', the seconds that the planner expects.

    Raises:
      UserError: it does not fit, or the batch does not divide over the devices.
    """
    task, plan, step = cost.compile_step(config, jax.devices())
    if step is None:
        raise UserError(
            "the step does not fit on these devices: python -m simclr_jax.plan --topology=local, with the "
            "same config, tells what to change"
        )
    batch = parallel.shard(_random_batch(config))
    state = parallel.replicate(train.init_state(task, config.seed))

    def take():
        nonlocal state
        state, results = step(state, batch)
        jax.block_until_ready(results)

    seconds = torch_step.seconds_of(take, steps)
    report = {"seconds": seconds, "views": 2 * config.batch_size / seconds}
    report["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        report["memory"] = stats["peak_bytes_in_use"]
    peaks = cost.roofline(plan)
    if peaks:
        report |= {"flops": peaks["compute"] / seconds, "bandwidth": peaks["memory"] / seconds}
        report["expected"] = forecast(plan, config)["step"]
    return report


def _random_batch(config):
    rng, batch = np.random.default_rng(0), {}
    for name, of in pretrain.batch_shapes(config, config.batch_size).items():
        if of.dtype == np.uint8:
            batch[name] = rng.integers(0, 256, of.shape, np.uint8)
        else:  # labels are 0
            batch[name] = rng.random(of.shape, np.float32).astype(of.dtype)
    return batch


def loss_cost(pairs: int, *, tile: int, limit: float = float("inf")) -> dict[str, float]:
    """Temporary 'bytes' of NT-Xent's value and gradient, and 'seconds' unless they are more than `limit`.

    Nothing where the compiler itself finds no room.

    Projections have 128 dimensions; `tile` is that of `losses.nt_xent`.
    """
    rng = np.random.default_rng(0)
    views = jnp.asarray(rng.standard_normal((2, pairs, 128)), jnp.float32)

    def loss(views):
        return losses.nt_xent(*views, temperature=0.1, tile=tile)

    try:
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(views).compile()
    except jax.errors.JaxRuntimeError as error:  # a GPU's compiler tries out what it compiles
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {}
    report = {"bytes": compiled.memory_analysis().temp_size_in_bytes}
    if report["bytes"] <= limit:
        begun = time.perf_counter()
        jax.block_until_ready(compiled(views))
        report["seconds"] = time.perf_counter() - begun
    return report


def _input(_) -> None:
    from simclr_jax.data import CORES

    rates = input_rates(_config())
    ours = np.array(rates["ours"])
    rate = np.median(ours)
    print(f"{rate * CORES:,.0f} images/s of two views on {CORES} cores, {rate:,.0f} a core")
    print(
        "\n| images/s a core | median | quartiles | ours to it, median | quartiles |\n" + "| --- " * 5 + "|"
    )
    for name, found in rates.items():
        low, median, high = np.quantile(found, [0.25, 0.5, 0.75])
        lower, ratio, higher = np.quantile(ours / found, [0.25, 0.5, 0.75])
        cells = [name, f"{median:,.1f}", f"{low:,.1f} to {high:,.1f}"]
        print(f"| {' | '.join([*cells, f'{ratio:.2f}', f'{lower:.2f} to {higher:.2f}'])} |")


def _step(_) -> None:
    config = _config()
    if not _PEER.value:
        print(_line(step_rate(config)))
        return
    torch_step.check_torch(config)
    ours = apart(step_rate, config)
    print(_line(ours), flush=True)
    classes = cost.Examples.of(config.dataset).num_classes
    theirs = apart(torch_step.torch_step_rate, config, classes)
    print(f"{_line(theirs)}: PyTorch\n{ours['views'] / theirs['views']:.2f} of PyTorch's rate")


def apart(function, *arguments):
    """What a function returns in a process of its own: a framework that is there holds most of a GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _line(report):
    line = f"{report['views']:,.0f} views/s, {report['seconds'] * 1e3:,.1f} ms a step on {report['devices']}"
    if "memory" in report:
        line += f", {report['memory'] / cost.GIB:.2f} GiB a device"
    if "flops" in report:
        line += f", {report['flops']:.1%} of peak FLOPs, {report['bandwidth']:.1%} of peak bandwidth"
    return line


def _config():
    config = command_line.read_config()
    if config.task != "pretrain":
        raise UserError(
            f"benchmarks are of pretraining, not of {config.task}: give the config without a task"
        )
    return config


def _loss() -> None:
    for line in loss_table(PAIRS):
        print(line, flush=True)


def loss_table(sizes: Iterable[int]) -> Iterator[str]:
    """Yields a Markdown table's lines: NT-Xent's memory and time, plain and in tiles, of so many pairs."""
    limit = 12 * cost.GIB if jax.default_backend() == "cpu" else 60 * cost.GIB
    yield "| pairs | plain, GiB | plain, s | tiles, GiB | tiles, s |"
    yield "| --- " * 5 + "|"
    for pairs in sizes:
        cells = [f"{pairs:,}"]
        for tile in (0, losses.TILE):
            report = loss_cost(pairs, tile=tile, limit=limit)
            cells += [f"{report['bytes'] / cost.GIB:.3f}" if report else ""]
            cells += [f"{report['seconds']:.3f}" if "seconds" in report else "does not fit"]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if verb == "loss" and not sys.argv[1:]:
        _loss()
    elif verb == "loss":
        print(f"error: '{sys.argv[1]}' is unknown: loss takes nothing more", file=sys.stderr)
        sys.exit(2)
    elif verb in ("input", "step"):
        command_line.run({"input": _input, "step": _step}[verb])
    else:
        print(f"error: '{verb}' is unknown: give input, step or loss", file=sys.stderr)
        sys.exit(2)
