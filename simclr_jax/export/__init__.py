"""Networks in formats that need no JAX: `python -m simclr_jax.export RUN --format=F`, a file a format."""

from functools import partial

import jax
import numpy as np

from simclr_jax import pretrained
from simclr_jax.process.errors import UserError

TOLERANCE = 1e-4  # relative to an output's largest value


def load(path):
    """A network as it is exported: in float32, with the stem of its training.

    Returns:
      model, variables and meta, as `pretrained.load_model` has them.
    """
    model, variables, meta = pretrained.load_model(path, dtype="float32")
    if getattr(model.encoder, "stem", None) == "auto":  # depends on the image size, which may change
        stem = "cifar" if meta["config"]["image_size"] <= 32 else "imagenet"
        model = model.clone(encoder=model.encoder.clone(stem=stem))
    return model, variables, meta


def classes_of(meta) -> dict:
    """`class_names` of a classifier, and its `calibration_temperature`, as far as a run tells them."""
    found = {"class_names": list(meta.get("class_names", ()))}
    found["calibration_temperature"] = meta["calibration_temperature"]
    return {name: value for name, value in found.items() if value}


def outputs(model, variables, images) -> dict[str, jax.Array]:
    """What the official hub modules give for images [b, h, w, 3], float32 in [0, 1], by their names.

    `final_avg_pool` and `proj_head_input` [b, w] are the features, `initial_conv`, `initial_max_pool` and
    `block_group1`, ... [b, h', w', c] the stages before; `proj_head_output` [b, projection_dim] where the
    whole projection head is there, `logits_sup` [b, classes] where a classifier is.
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
    """The largest difference, relative to its largest value, of what `run(images)` gives by name.

    Raises:
      UserError: it is above TOLERANCE.
    """
    images = np.random.default_rng(0).random((batch, size, size, 3), np.float32)
    with jax.default_matmul_precision("highest"):  # accelerators would round
        expected = jax.device_get(jax.jit(partial(outputs, model))(variables, images))
    differences = {
        name: float(np.abs(np.asarray(value) - expected[name]).max() / (np.abs(expected[name]).max() or 1))
        for name, value in run(images).items()
    }
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # nor NaN
            raise UserError(
                f"{name} differs by {difference:.1e} of its largest value from JAX's, expected at most "
                f"{TOLERANCE:.0e}: nothing was exported, choose another --format"
            )
    return max(differences.values())
