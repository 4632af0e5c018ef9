"""Training images that lie on every device, as bytes, and small batches that choose among them."""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from simclr_jax import parallel
from simclr_jax.process import UserError, trial
from simclr_jax.views import on_device
from simclr_jax.views.recipe import make_recipe

_SHARE = 0.1  # of a device's memory that images take at most without being asked for
_LARGEST = 2  # the longest side of such images over that of the views: products of larger ones take long


def load(config, source, view: Callable | None) -> np.ndarray | None:
    """Decodes the training images if they are to lie on the devices, as `config.dataset.on_device` says.

    Args:
      config: a config of pretraining.
      source: the training images.
      view: the user's own view function.

    Returns:
      `source.dtype` [n, h, w, c], or None where the host makes the views.

    Raises:
      UserError: they cannot lie there, and shall.
    """
    wanted, memory = config.dataset.on_device, device_memory()
    if wanted is False or (wanted is None and (view or not memory or not source.random_access)):
        return None
    from simclr_jax.data import pipeline

    if not source.random_access:
        raise UserError(
            "dataset.on_device=True takes all images into memory, and dataset.in_memory=False does not: set "
            "--config.dataset.in_memory=True, or --config.dataset.on_device=False"
        )
    shape = pipeline.image_shape(source)
    size = source.num_examples * math.prod(shape) * np.dtype(source.dtype).itemsize
    if wanted is None and not is_small(size, shape, config.image_size, memory):
        return None
    if memory and size > memory:
        raise UserError(
            f"dataset.on_device=True: {source.num_examples:,} images of {shape[0]} x {shape[1]} pixels are "
            f"{size / 2**30:.1f} GiB, but a device has {memory / 2**30:.1f}: set "
            "--config.dataset.on_device=False"
        )
    try:
        return np.zeros((1, *shape), np.uint8) if trial.active else pipeline.load_images(source, shape)
    except UserError:
        if wanted:
            raise
        return None


def device_memory() -> int | None:
    """Returns the bytes of memory that a device has; None where they are the host's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def is_small(size: int, shape: tuple, image_size: int, memory: float) -> bool:
    """Returns whether images of so many bytes and this shape lie on the devices without being asked for."""
    return size <= _SHARE * memory and max(shape) <= _LARGEST * image_size


def evaluation_room(images: np.ndarray) -> float:
    """Returns the bytes that images of evaluations may take beside the training `images` on the devices."""
    return min(2 * images.nbytes, _SHARE * (device_memory() or math.inf))


def batches(config, source, start_step: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the rows that this process takes of every global batch, from `start_step` on, without end.

    The order of examples is that of `pipeline.train_batches`.

    Returns:
      Iterator of `example`, `epoch` and `label`, int32 [b].
    """
    from simclr_jax.data import pipeline

    rows = config.batch_size // jax.process_count()
    order = pipeline.example_order(source, config.batch_size, config.seed, jax.process_index() * rows, rows)
    step = start_step
    while True:
        epoch, example = order(step, 1)
        columns = {"example": example, "epoch": epoch, "label": source.labels[example]}
        yield {name: column.astype(np.int32) for name, column in columns.items()}
        step += 1


def view_settings(config) -> dict:
    """Returns the arguments of `on_device.two_views` that a config of pretraining decides."""
    return {"seed": config.seed, "size": config.image_size, "recipe": make_recipe(config.augment)}


def make_views(config, images: np.ndarray) -> Callable:
    """Puts images, [n, h, w, c], onto the devices; returns the `Task.on_devices` that makes views."""

    def views(images, batch):
        made = on_device.two_views(images, batch["example"], batch["epoch"], shape=shape, **settings)
        return made | {"label": batch["label"]}

    shape, settings, mapped = images.shape[1:3], view_settings(config), parallel.pmap_rows(views)
    planes = np.moveaxis(images, 3, 1).reshape(len(images), -1)
    # They are an argument, since a program would hold constants a second time.
    held = parallel.replicate(planes, jax.local_devices())
    return lambda batch: mapped(held, batch)
