"""Networks that tests share: small ones, and the official ones that the goldens were computed with."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from simclr_jax.models import make_model
from simclr_jax.official.names import tf1_names

GOLDENS = Path(__file__).parent / "goldens"
DEFAULTS = {"width": 1.0, "sk_ratio": 0.0, "se_ratio": 0.0, "stem": "auto", "sync_batch_norm": True,
            "projection_layers": 2, "projection_dim": 128, "supervised_layer": 0, "zero_init_logits": False,
            "dtype": "auto"}  # fmt: skip


def build(num_classes=10, **config):
    """By default the smallest network."""
    size = {"depth": 8, "width": 0.125} if "depth" not in config else {}
    return make_model(ConfigDict(DEFAULTS | size | config), num_classes)


def shapes_of(model, size, batch=1):
    return jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((batch, size, size, 3)))


def load_golden(case):
    """Arrays, flags, model (with a supervised head if it has logits) and images of a case."""
    golden = np.load(GOLDENS / f"resnet_{case}.npz")
    flags = json.loads(str(golden["flags"]))
    config = {"depth": flags["resnet_depth"], "width": flags["width_multiplier"],
              "projection_layers": flags["num_proj_layers"], "sk_ratio": flags["sk_ratio"]}  # fmt: skip
    model = build(int(golden.get("classes", 0)), **config)
    rng, size = np.random.default_rng(int(golden.get("input_seed", 20200613))), flags["image_size"]
    low = rng.random((int(golden["batch"]), 2, 2, 3)).repeat(size // 2, axis=1).repeat(size // 2, axis=2)
    return golden, flags, model, (0.7 * low + 0.3 * rng.random(low.shape)).astype(np.float32)


def golden_value(name, shape):
    """The value that the goldens were computed with, for the official variable of this name."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    value = {
        "kernel": noise * np.sqrt(2 / np.prod(shape[:-1])),
        "gamma": 1 + 0.1 * noise,
        "moving_variance": 1 + 0.1 * np.abs(noise),
    }.get(name.split("/")[-1], 0.1 * noise)
    return value.astype(np.float32)


def golden_variables(model, size):
    shapes = shapes_of(model, size)[1]
    flat, names = flatten_dict(shapes), tf1_names(shapes)
    assert names.keys() == flat.keys()
    return unflatten_dict({path: golden_value(name, flat[path].shape) for path, name in names.items()})


def by_tf1_name(variables):
    flat = flatten_dict(variables)
    return {name: np.asarray(flat[path]) for path, name in tf1_names(variables).items()}


def write_tensors(prefix, tensors):
    """Files of a TensorFlow checkpoint with these tensors by name, and no object graph."""
    import tensorflow as tf

    names, values = list(tensors), list(tensors.values())
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
    )
    return prefix


def assert_close(actual, expected, tolerance=1e-4, name=""):
    """Largest difference relative to the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
