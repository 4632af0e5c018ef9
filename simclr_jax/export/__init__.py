"""Exports networks in formats that need no JAX: `python -m simclr_jax.export RUN --format=FORMAT`"""

from functools import partial

import jax
import numpy as np

from simclr_jax import pretrained
from simclr_jax.process import UserError

TOLERANCE = 1e-4  # Largest difference of an output, relative to its largest value.


def load(path, *, use_average: bool = False):
    """Loads a network as it is exported: in float32, with the stem of its training.

    Returns:
      model, variables and meta, as `pretrained.load_model` returns them.
    """
    model, variables, meta = pretrained.load_model(path, use_average=use_average, dtype="float32")
    if getattr(model.encoder, "stem", None) == "auto":  # 'auto' depends on the image size, which may change
        stem = "cifar" if meta["config"]["image_size"] <= 32 else "imagenet"
        model = model.clone(encoder=model.encoder.clone(stem=stem))
    return model, variables, meta


def classes_of(meta) -> dict:
    """Returns class names, `calibration_temperature` and `several_labels` of a classifier, as it has them."""
    names = ("class_names", "calibration_temperature", "several_labels")
    return {name: meta[name] for name in names if meta.get(name)}


def outputs(model, variables, images) -> dict[str, jax.Array]:
    """Computes the outputs of the official hub modules, by their names.

    Args:
      model, variables: from `load`.
      images: [b, h, w, c], float32 in [0, 1].

    Returns:
      `final_avg_pool` and `proj_head_input` [b, w], the features; `initial_conv`, `initial_max_pool` and
      `block_group1`, ... [b, h', w', c], the stages before; `proj_head_output` [b, projection_dim] if the
      model has the whole projection head; `logits_sup` [b, classes] if it has a classifier.
    """
    results = model.apply(variables, images)
    named = {name: value for name, value in results.items() if name.startswith(("initial_", "block_group"))}
    named |= {"final_avg_pool": results["features"], "proj_head_input": results["features"]}
    if model.projection_head.projects:
        named["proj_head_output"] = results["projection"]
    if "logits" in results:
        named["logits_sup"] = results["logits"]
    return named


def compare(model, variables, size: int, batch: int, run) -> float:
    """Compares the outputs of an exported network with JAX's on random images.

    Args:
      model, variables: the original, from `load`.
      size, batch: pixels of a side and number of the images.
      run: images -> outputs of the exported network, by name.

    Returns:
      The largest difference, relative to the largest value of its output.

    Raises:
      UserError: it is above TOLERANCE.
    """
    images = np.random.default_rng(0).random((batch, size, size, model.channels), np.float32)
    with jax.default_matmul_precision("highest"):  # the default rounds on accelerators
        expected = jax.device_get(jax.jit(partial(outputs, model))(variables, images))
    differences = {
        name: float(np.abs(np.asarray(value) - expected[name]).max() / (np.abs(expected[name]).max() or 1))
        for name, value in run(images).items()
    }
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # also true of NaN
            raise UserError(
                f"{name} differs by {difference:.1e} of its largest value from JAX's, expected at most "
                f"{TOLERANCE:.0e}: nothing was exported, choose another --format"
            )
    return max(differences.values())
