"""Features of whole datasets: the frozen encoder, mapped over all devices."""

from collections.abc import Iterable

import jax
import numpy as np

from simclr_jax import parallel
from simclr_jax.probes import Features


def make_extract(model):
    """Builds `extract(variables, batches) -> Features`, of every unmasked row, in order, on every process.

    Args:
      model: from `make_model`; its `features` are taken in eval mode. `batches` are as from
        `pipeline.eval_batches`: this process's rows as `image`, `label` and `mask`.
    """
    forward = parallel.pmap_rows(lambda variables, batch: model.apply(variables, batch["image"])["features"])

    def extract(variables, batches) -> Features:
        def encode(images):
            features = jax.device_get(forward(variables, parallel.shard({"image": images})))
            return features.reshape(len(images), -1)

        return _collect(batches, encode)

    return extract


def raw_pixels(batches: Iterable) -> Features:
    """Pixels as features, the baseline for learned ones."""
    return _collect(batches, lambda images: images.reshape(len(images), -1) / 255)


def _collect(batches, encode):
    features, labels, masks = [], [], []
    for batch in batches:
        features.append(encode(batch["image"]).astype(np.float32))
        labels.append(batch["label"])
        masks.append(batch["mask"])
    # Padding leaves last: until then every process holds equally many rows.
    features, labels, mask = (parallel.gather(np.concatenate(rows)) for rows in (features, labels, masks))
    return Features(features[mask], labels[mask])
