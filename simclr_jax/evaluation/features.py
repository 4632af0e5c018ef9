"""Features of whole datasets: every example once, in order, mapped over all devices."""

import functools
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import parallel, pretrained
from simclr_jax.models import make_model
from simclr_jax.process import trial

PIXELS = 32  # Side of raw pixels as features: 3,072 numbers an image, as many as wide networks have.


class Features(NamedTuple):
    """Features float32 [n, w] of n examples and their labels int32 [n]."""

    features: np.ndarray
    labels: np.ndarray


class Placed(NamedTuple):
    """A batch of `pipeline.eval_batches` whose images lie on the devices.

    Attributes:
      inputs: images and `label`, as `parallel.shard` lays them out.
      on_host: `label` int32 [b] and `mask` bool [b].
    """

    inputs: dict[str, jax.Array]
    on_host: dict[str, np.ndarray]


def place(batch: dict[str, np.ndarray]) -> Placed:
    """Puts a batch of `pipeline.eval_batches` onto the devices."""
    inputs = {name: rows for name, rows in batch.items() if rows.ndim == 4 or name == "label"}
    return Placed(parallel.shard(inputs), {"label": batch["label"], "mask": batch["mask"]})


def concatenate(parts: Iterable[Features]) -> Features:
    """Joins the rows of parts."""
    return Features(*map(np.concatenate, zip(*parts)))


def batches_of(config, source, *, proportion: float | None = None, **options):
    """Returns the `pipeline.eval_batches` of a task.

    A task with microbatches evaluates batches of that size: the whole batch might not fit into memory.

    Args:
      config: the config of the task.
      source: from `datasets.load`.
      proportion: as in `augment.eval_view`.
      options: another `transform` than that view, and its `seed`.
    """
    from simclr_jax.data import augment, pipeline

    def view(image, _):
        return {"image": augment.eval_view(image, config.image_size, proportion=proportion)}

    pretrained.check_channels(config, source)
    rows = config.batch_size // config.get("microbatches", 1)
    options = {"image_size": config.image_size, "batch_size": rows, "transform": view} | options
    return pipeline.eval_batches(source, **parallel.this_process(), **options)


def make_extract(model, output: Callable = itemgetter("features")):
    """Builds `extract(variables, batches) -> Features` of batches with an `image`, see `make_map`.

    Args:
      model: from `make_model`, applied in eval mode.
      output: outputs of the model -> rows [b, w] to return as features.
    """
    return _make_extract(lambda variables, batch: output(model.apply(variables, batch["image"])))


def _make_extract(function):
    mapped = make_map(lambda variables, batch: {"features": function(variables, batch)})

    def extract(variables, batches) -> Features:
        rows = mapped(variables, batches)
        return Features(rows["features"], rows["label"])

    return extract


def make_pretrained_extract(config, proportion: float | None = None):
    """Builds `extract(source) -> Features` with the encoder of `config.pretrained`.

    Args:
      config: the config of a task; its `model.supervised_layer` is an index in the model's
        `projection_hiddens`: 0 the features, 1 the first projection layer, and so on.
      proportion: as in `augment.eval_view`.
    """
    model = make_model(config.model, 0, whole_projection=False)
    variables = pretrained.load(config, model)
    trial.end()
    variables = parallel.replicate(variables)
    layer = config.model.supervised_layer
    extract = make_extract(model, lambda outputs: outputs["projection_hiddens"][layer])
    return lambda source: extract(variables, batches_of(config, source, proportion=proportion))


def unit_rows(rows: np.ndarray, basis: np.ndarray | None = None) -> np.ndarray:
    """Scales rows, [n, w], to length 1, so that their products are cosine similarities.

    With a `basis`, [w, d], they are projected on it then, and scaled again: [n, d].
    """
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows if basis is None else unit_rows(rows @ basis)


def raw_pixels(batches: Iterable) -> Features:
    """Returns pixels as features, the baseline of learned ones.

    Images that are larger than `PIXELS` are reduced to means over equal areas.
    """
    variables = {"params": {"scale": np.float32(1 / 255)}, "batch_stats": {}}
    return _make_extract_pixels()(variables, batches)


@functools.cache  # It is compiled once for training and held-out images.
def _make_extract_pixels():
    def flatten(variables, batch):
        images = batch["image"] * (variables["params"]["scale"] if batch["image"].dtype == jnp.uint8 else 1)
        down, across = map(_area_means, images.shape[1:3])
        images = jnp.einsum("ih,bhwc,jw->bijc", down, images, across, precision=jax.lax.Precision.HIGHEST)
        return images.reshape(len(images), -1)

    return _make_extract(flatten)


def _area_means(size):
    """The matrix that averages `size` pixels to at most `PIXELS` of equal area, float32 [pixels, size]."""
    edges = np.linspace(0, size, min(size, PIXELS) + 1)[:, None]
    covered = np.clip(edges - np.arange(size), 0, 1)  # The share of each pixel before each edge.
    return (np.diff(covered, axis=0) * min(size, PIXELS) / size).astype(np.float32)


def make_map(function: Callable):
    """Builds `mapped(variables, batches) -> {name: rows}`, with every unmasked row, on every process.

    The batches are those of `pipeline.eval_batches`: this process's rows of images, with `label` and `mask`;
    or they are `Placed`, and may be mapped again.
    The rows are numpy arrays [n, ...], with the `label`, int32 [n], beside those of `function`. The
    `variables` may be a whole train state, whose `params` and `batch_stats` alone are used.

    Args:
      function: (variables, batch) -> {name: [b, ...]}, for the images and labels of one device.
    """
    forward = parallel.pmap_rows(function)

    def mapped(variables, batches) -> dict[str, np.ndarray]:
        variables = {name: variables[name] for name in ("params", "batch_stats")}
        parts, pending = [], None
        for batch in batches:
            inputs, on_host = batch if isinstance(batch, Placed) else place(batch)
            outputs = forward(variables, inputs)
            if pending:  # It is read while the devices work on the next batch.
                parts.append(_read(*pending))
            pending = outputs, on_host
        parts.append(_read(*pending))
        # Padding is removed last: until then every process holds equally many rows.
        rows = {}
        for name in [*parts[0]]:
            rows[name] = parallel.gather(np.concatenate([part.pop(name) for part in parts]))
        mask = rows.pop("mask")
        return {name: values if mask.all() else values[mask] for name, values in rows.items()}

    return mapped


def _read(outputs, labels):
    outputs = jax.device_get(outputs)
    return {name: rows.reshape(-1, *rows.shape[2:]) for name, rows in outputs.items()} | labels
