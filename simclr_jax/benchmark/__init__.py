"""The speed of this machine: rates of the input pipeline and of the train step, and the cost of NT-Xent."""

import contextlib
import io
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from simclr_jax import losses, parallel, train
from simclr_jax.benchmark import other_views, torch_step
from simclr_jax.plan import cost
from simclr_jax.plan.forecast import forecast
from simclr_jax.process import UserError, machine, say
from simclr_jax.views import batches

BATCH_SIZE = 64  # Images in a batch of the input benchmark.
PAIRS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


def input_rate(config, seconds: float = 10.0) -> float:
    """Measures the images/s per core, with two views of each, of the input pipeline on all cores.

    It reads the files of `jpeg_files`.
    """
    return _measure_rate(_input_batches(config, jpeg_files(config.image_size)), seconds)


def jpeg_files(image_size: int) -> np.ndarray:
    """Makes 64 JPEG files from parts of two photographs.

    They have `image_size` pixels a side if that is at most 96, else the size of ImageNet's: 500 x 375 pixels
    and 100 KB.
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
    source = datasets.Source("JPEG files", len(records), 0, decode_bytes, records, labels)
    config = ConfigDict(config)
    config.batch_size = BATCH_SIZE
    return batches.train_batches(config, source, None, 0)


def _measure_rate(batches, seconds):
    """Measures the images/s per core of an open pipeline, without the first batches, which it prefetched."""
    from simclr_jax.data import CORES

    for _ in range(4):
        next(batches)
    begun, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begun) < seconds:
        next(batches)
        steps += 1
    return steps * BATCH_SIZE / elapsed / CORES


def input_rates(config, rounds: int = 9, seconds: float = 3.0) -> dict[str, list[float]]:
    """Measures the images/s per core of the input pipeline and of other libraries' pipelines, in turns.

    Returns:
      The rates of all rounds, by the name of the pipeline: 'ours', 'ours, on_device', 'official', and
      'albumentations' and 'lightly' where they are installed.
    """
    from simclr_jax.benchmark import official_chain
    from simclr_jax.data import CORES

    records = jpeg_files(config.image_size)
    options = {"image_size": config.image_size, "strength": config.augment.color_jitter_strength}
    measures = {}
    for name, on_device in (("ours", False), ("ours, on_device", True)):
        variant = config.copy_and_resolve_references()
        variant.augment.on_device = on_device
        measures[name] = partial(_measure_rate, _input_batches(variant, records))
    chain = official_chain.batches(records, batch_size=BATCH_SIZE, **options)
    measures["official"] = partial(_measure_rate, chain)
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        for name in other_views.installed():
            measures[name] = partial(other_views.rate, pool, CORES, name, records.tolist(), **options)
        rates = {name: [] for name in measures}
        for turn in range(1 + rounds):
            say(f"round {turn} of {rounds}: {', '.join(measures)}, {seconds:g} s each")
            for name, measure in measures.items():
                rates[name].append(measure(seconds))
                time.sleep(1)  # its buffers fill up, which would take time of the next one
    return {name: samples[1:] for name, samples in rates.items()}  # the first round traced the functions


def step_rate(config, steps: int = 10) -> dict[str, float]:
    """Runs the train step of pretraining on random images.

    Returns:
      'seconds' of a step, the median of `steps`; 'views' per second over all devices; 'devices', in words;
      peak 'memory' of a device in bytes, where the platform reports it; where the chip's peaks are known,
      'flops' and 'bandwidth', the shares of them that the operations of `cost.count` reach, and 'expected',
      the seconds that the planner expects.

    Raises:
      UserError: the step does not fit, or the batch does not divide over the devices.
    """
    take_step, plan = _own_step(config)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    report = torch_step.measure(config, take_step, steps, devices)
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        report["memory"] = stats["peak_bytes_in_use"]
    peaks = cost.roofline(plan)
    if peaks:
        report["flops"] = peaks["compute"] / report["seconds"]
        report["bandwidth"] = peaks["memory"] / report["seconds"]
        report["expected"] = forecast(plan, config)["step"]
    return report


def steps_in_turns(config, num_classes: int, rounds: int = 20) -> dict[str, list[float]]:
    """Measures the train step and PyTorch's in turns, each in a process of its own, on CPUs.

    Returns:
      The seconds of all `rounds` of 'ours' and 'PyTorch'; two more rounds before them are not timed.

    Raises:
      UserError: see `step_rate` and `torch_step.check_torch`.
    """
    makers = {"ours": (_own_step, config), "PyTorch": (torch_step.make_step, config, num_classes)}
    with contextlib.ExitStack() as stack:
        pools, times = {}, {name: [] for name in makers}
        for name, maker in makers.items():
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            pools[name].submit(_keep_step, *maker).result()
        for _ in range(2 + rounds):
            for name, pool in pools.items():
                times[name].append(pool.submit(_time_step).result())
    return {name: samples[2:] for name, samples in times.items()}


_steps = []  # of a process of `steps_in_turns`


def _keep_step(maker, *arguments):
    _steps.append(maker(*arguments)[0])


def _time_step():
    begun = time.perf_counter()
    _steps[0]()
    return time.perf_counter() - begun


def _own_step(config):
    """Compiles the train step: a function that takes one on random images, and the planner's counts."""
    machine.use_cores(config.batch_size // config.microbatches)
    task, plan, step = cost.compile_step(config, jax.devices())
    if step is None:
        raise UserError(
            "the step does not fit on these devices: python -m simclr_jax.plan --topology=local, with the "
            "same config, tells what to change"
        )
    batch = parallel.shard(_random_batch(config))
    state = parallel.replicate(train.init_state(task, config.seed))

    def take_step():
        nonlocal state
        state, results = step(state, batch)
        jax.block_until_ready(results)

    return take_step, plan


def _random_batch(config):
    rng, batch = np.random.default_rng(0), {}
    for name, array in batches.batch_shapes(config, config.batch_size).items():
        if array.dtype == np.uint8:
            batch[name] = rng.integers(0, 256, array.shape, np.uint8)
        else:  # labels become 0
            batch[name] = rng.random(array.shape, np.float32).astype(array.dtype)
    return batch


def loss_cost(pairs: int, *, tile: int, limit: float = float("inf")) -> dict[str, float]:
    """Measures NT-Xent's value and gradient on projections of 128 dimensions.

    Args:
      pairs: positive pairs.
      tile: see `losses.nt_xent`.
      limit: bytes of temporary memory above which it is compiled and not run.

    Returns:
      Temporary 'bytes', and 'seconds' where it was run; nothing where the compiler itself lacks memory.
    """
    rng = np.random.default_rng(0)
    views = jnp.asarray(rng.standard_normal((2, pairs, 128)), jnp.float32)

    def loss(views):
        return losses.nt_xent(*views, temperature=0.1, tile=tile)

    try:
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(views).compile()
    except jax.errors.JaxRuntimeError as error:  # the compiler for GPUs allocates memory to tune the program
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {}
    report = {"bytes": compiled.memory_analysis().temp_size_in_bytes}
    if report["bytes"] <= limit:
        begun = time.perf_counter()
        jax.block_until_ready(compiled(views))
        report["seconds"] = time.perf_counter() - begun
    return report


def loss_table(sizes: Iterable[int]) -> Iterator[str]:
    """Yields the lines of a Markdown table: NT-Xent's memory and time, plain and in tiles, for each size."""
    limit = 12 * cost.GIB if jax.default_backend() == "cpu" else 60 * cost.GIB

    def row(pairs):
        cells = [f"{pairs:,}"]
        for tile in (0, losses.TILE):
            report = loss_cost(pairs, tile=tile, limit=limit)
            cells.append(f"{report['bytes'] / cost.GIB:.3f}" if report else "")
            cells.append(f"{report['seconds']:.3f}" if "seconds" in report else "does not fit")
        return cells

    return table(["pairs", "plain, GiB", "plain, s", "tiles, GiB", "tiles, s"], map(row, sizes))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a Markdown table, each as soon as its row is there; short rows are filled up."""
    for cells in itertools.chain([head, ["---"] * len(head)], rows):
        yield f"| {' | '.join([*cells, *[''] * (len(head) - len(cells))])} |"
