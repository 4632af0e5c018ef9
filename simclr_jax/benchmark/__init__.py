"""How fast this machine is: rates of the input pipeline, of the train step, and the cost of NT-Xent."""

import io
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
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
from simclr_jax.process.errors import UserError
from simclr_jax.views import batches

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
    source = datasets.Source("JPEG files", len(records), 0, decode_bytes, records, labels)
    config = ConfigDict(config)
    config.batch_size = ROWS
    return batches.train_batches(config, source, None, 0)


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
    from simclr_jax.benchmark import official_chain
    from simclr_jax.data import CORES

    records = jpeg_files(config.image_size)
    options = {"image_size": config.image_size, "strength": config.augment.color_jitter_strength}
    rates = {}
    for name, on_device in (("ours", False), ("ours, on_device", True)):
        form = config.copy_and_resolve_references()
        form.augment.on_device = on_device
        rates[name] = partial(_rate_of, _input_batches(form, records))
    rates["official"] = partial(_rate_of, official_chain.batches(records, batch_size=ROWS, **options))
    with ExitStack() as stack:
        for name in other_views.installed():
            workers = other_views.Workers(name, records, cores=CORES, **options)
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
    for name, of in batches.batch_shapes(config, config.batch_size).items():
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


def apart(function, *arguments):
    """What a function returns in a process of its own: a framework that is there holds most of a GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


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
