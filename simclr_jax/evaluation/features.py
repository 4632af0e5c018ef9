"""What a model makes of whole datasets: every example once, in order, mapped over all devices."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import parallel

PIXELS = 32  # side of raw pixels as features: 3,072 numbers an image, as many as wide networks have


class Features(NamedTuple):
    """Features float32 [n, w] of n examples and their labels int32 [n]."""

    features: np.ndarray
    labels: np.ndarray


def batches_of(config, source, **options):
    """`pipeline.eval_batches` as a task has them; `options` are its `transform` and its `seed`.

    Where a batch trains in microbatches, it is evaluated by these: the whole might not fit.
    """
    from simclr_jax.data import pipeline

    rows = config.batch_size // config.get("microbatches", 1)
    sizes = {"image_size": config.image_size, "batch_size": rows}
    return pipeline.eval_batches(source, **sizes, **parallel.this_process(), **options)


def make_extract(model, *, layer: int = 0):
    """Builds `extract(variables, batches) -> Features`; see `make_map` for the batches, with an `image`.

    Args:
      model: from `make_model`, applied in eval mode.
      layer: which of its `projection_hiddens` to take: 0 the features, 1 the first projection layer, ...
    """
    mapped = make_map(
        lambda variables, batch: {
            "features": model.apply(variables, batch["image"])["projection_hiddens"][layer]
        }
    )

    def extract(variables, batches) -> Features:
        rows = mapped(variables, batches)
        return Features(rows["features"], rows["label"])

    return extract


def raw_pixels(batches: Iterable) -> Features:
    """Pixels as features, the baseline for learned ones; of images above `PIXELS`, means over equal areas."""
    rows = _map_pixels()(np.float32(1 / 255), batches)
    return Features(rows["features"], rows["label"])


@functools.cache  # compiled once for training and held-out images
def _map_pixels():
    def flatten(scale, batch):
        images = batch["image"] * scale
        down, across = map(_area_means, images.shape[1:3])
        images = jnp.einsum("ih,bhwc,jw->bijc", down, images, across, precision=jax.lax.Precision.HIGHEST)
        return {"features": images.reshape(len(images), -1)}

    return make_map(flatten)


def _area_means(size):
    """What takes a row of `size` pixels to at most `PIXELS` of equal area, float32 [pixels, size]."""
    edges = np.linspace(0, size, min(size, PIXELS) + 1)[:, None]
    covered = np.clip(edges - np.arange(size), 0, 1)  # the share of each pixel before each edge
    return (np.diff(covered, axis=0) * min(size, PIXELS) / size).astype(np.float32)


def make_map(function: Callable):
    """Builds `mapped(variables, batches) -> {name: rows}`, of every unmasked row, on every process.

    Args:
      function: (variables, batch) -> {name: [b, ...]}, of one device's rows.

    The batches are as from `pipeline.eval_batches`: this process's rows of images, with `label` and `mask`.
    The rows come back as numpy arrays [n, ...], with the `label`, int32 [n], beside what `function` returns.
    """
    forward = parallel.pmap_rows(function)

    def mapped(variables, batches) -> dict[str, np.ndarray]:
        parts, pending = [], None
        for batch in batches:
            images = {name: rows for name, rows in batch.items() if rows.ndim == 4}
            outputs = forward(variables, parallel.shard(images))
            known = {"label": batch["label"], "mask": batch["mask"]}
            if pending:  # read while the devices work on the next batch
                parts.append(_read(*pending))
            pending = outputs, known
        parts.append(_read(*pending))
        # Padding leaves last: until then every process holds equally many rows.
        rows = {}
        for name in [*parts[0]]:
            rows[name] = parallel.gather(np.concatenate([part.pop(name) for part in parts]))
        mask = rows.pop("mask")
        return {name: values if mask.all() else values[mask] for name, values in rows.items()}

    return mapped


def _read(outputs, known):
    outputs = jax.device_get(outputs)
    return {name: rows.reshape(-1, *rows.shape[2:]) for name, rows in outputs.items()} | known
