"""Checkpoints of google-research/simclr: `python -m simclr_jax.official PATH --output DIR` converts them.

PATH is a folder, the prefix of a checkpoint (`.../model.ckpt-250228`) or one of its files: a TF1 checkpoint,
whose variables have names, or a TF2 checkpoint or SavedModel, whose variables are nodes of an object graph.
Every task takes them without conversion as well: `--config.pretrained=PATH`. The network is inferred from the
variables; TensorFlow only reads the files.

SimCLR v1's and v2's networks were trained with different weight decays: convolution kernels of v1's ResNet-50
are 16.8 times as large as v2's, on average (README of the official code, "Known issues"). Batch norm hides
that from the features, not from fine-tuning: a gradient step of SGD is that much smaller to v1's. With SGD
each needs its own learning rate and weight decay; steps of LARS scale with the weights and need neither.
"""

import re
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from operator import getitem
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from simclr_jax.config.saved import complete_model
from simclr_jax.models import make_init, make_model, resnet
from simclr_jax.models.variables import check_variables
from simclr_jax.official.names import encoder_layers, model_keys, non_model_keys, our_names, tf1_names
from simclr_jax.process import UserError, files, first_few, reason_of

Shape = tuple[int, ...]

WEIGHT_SCALE_NOTE = (
    "kernels of v1's networks are 16.8 times as large as v2's: SGD wants settings for each, LARS does not"
)


def load(path, *, ema: bool = False) -> tuple[ConfigDict, dict[str, Any]]:
    """Reads a network that the official code trained.

    Args:
      path: see above; local or gs://.
      ema: take the moving average of the weights, `ema_model/`, that some of v2's TF1 checkpoints hold too.

    Returns:
      config.model of that network, for `models.make_model`. The files do not state which layer the classifier
      reads: `supervised_layer` is 0, as in the official hub modules. ResNet-18 and 34 with `sk_ratio` and the
      'cifar' stem differ from those without in their object graph only, not in names.
      {'params', 'batch_stats'} as numpy arrays, float32; with 'supervised_head' if there is a classifier, and
      'projection_head' if there is one (v1's published checkpoints have none).

    Raises:
      UserError: there is no such checkpoint, it is damaged, or variables are missing, unknown or of another
        shape.
    """
    prefix = find(path)
    if prefix is None:
        raise UserError(f"{path} holds no TensorFlow checkpoint: give its folder or prefix")
    with _reading(prefix) as tf:
        place = epath.Path(prefix)
        reader = tf.train.load_checkpoint(str(files.portable_path(place.parent) / place.name))
        shapes = {key: tuple(shape) for key, shape in reader.get_variable_to_shape_map().items()}
        keys, pooled = model_keys(reader, shapes, ema=ema)
    model_shapes = {name: shapes[key] for name, key in keys.items()}
    if not any("conv" in name for name in model_shapes):
        raise UserError(
            f"{prefix} holds no network of SimCLR{' under ema_model/' if ema else ''}: expected variables "
            f"such as base_model/conv2d/kernel (TF1), model/resnet_model/... (TF2), found {first_few(shapes)}"
        )
    config, num_classes = _infer(model_shapes, prefix, pooled)
    expected = jax.eval_shape(make_init(make_model(config, num_classes), 64), jax.random.key(0))
    names = our_names(expected) if _are_our_names(model_shapes) else tf1_names(expected)
    expected = {names[path]: leaf.shape for path, leaf in flatten_dict(expected).items()}
    unknown = shapes.keys() - {*keys.values(), *expected} - non_model_keys(shapes)
    check_variables(prefix, config, model_shapes, expected, unknown)
    with _reading(prefix):
        arrays = {path: np.asarray(reader.get_tensor(keys[name]), np.float32) for path, name in names.items()}
    return config, unflatten_dict(arrays)


def read(path, *, ema: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a network as `checkpoint.load_params` does: variables, and {'config', 'num_classes'}."""
    model, variables = load(path, ema=ema)
    config = {"task": "pretrain", "pretrained": str(path), "model": model.to_dict()}
    config |= {"ema": ema, "seed": 0, "image_size": 32 if model.stem == "cifar" else 224}
    classifier = variables["params"].get("supervised_head")
    return variables, {"config": config, "num_classes": len(classifier["bias"]) if classifier else 0}


def find(path) -> str | None:
    """Finds the TensorFlow checkpoint at `path`; returns the prefix of its files, or None.

    Raises:
      UserError: there are several checkpoints.
    """
    path = epath.Path(re.sub(r"(\.(index|meta|data-\d+-of-\d+)|/saved_model\.pb)$", "", str(path)))
    if (path.parent / f"{path.name}.index").exists():
        return str(path)
    inside = path.iterdir() if path.is_dir() else ()
    prefixes = [str(index).removesuffix(".index") for index in inside if index.name.endswith(".index")]
    # Google's published networks have a SavedModel in one of these folders, alone or beside a checkpoint.
    for folder in (path,) if prefixes else (path, path / "saved_model", path / "hub"):
        if (folder / "saved_model.pb").exists():
            return str(folder / "variables" / "variables")
    if len(prefixes) > 1 and (path / "checkpoint").is_file():  # names the newest, maybe with a former folder
        newest = re.search(r'^model_checkpoint_path: "(?:.*/)?(.+)"', (path / "checkpoint").read_text())
        prefixes = [prefix for prefix in prefixes if newest and prefix == str(path / newest[1])] or prefixes
    if len(prefixes) > 1:
        raise UserError(f"{path} holds several checkpoints: give one of them, {first_few(prefixes, 10)}")
    return prefixes[0] if prefixes else None


@contextmanager
def _reading(prefix):
    """Yields the module TensorFlow, and turns its errors about damaged files into one line."""
    from google.protobuf.message import DecodeError

    from simclr_jax.data import tf  # quiet, and off accelerators

    try:
        yield tf
    except (tf.errors.OpError, DecodeError, IndexError, RuntimeError, ValueError) as error:
        raise UserError(f"{prefix} is damaged ({reason_of(error)}): copy all its files again") from None


def _infer(shapes: dict[str, Shape], prefix: str, pooled: bool) -> tuple[ConfigDict, int]:
    """Infers config.model and the number of classes from the shapes of the model's named variables."""
    convs, denses, classifier = _layers(shapes)
    # Kernels of another rank are left out: `check_variables` lists them afterwards.
    kernels = [layer["kernel"] for layer in convs if len(layer.get("kernel", ())) == 4]
    stem = next((kernel for kernel in kernels if kernel[2] == 3), None)
    # The 3x3 kernels of the last group read its filters: 8 times those of the first, with four groups.
    last = max((kernel[2] for kernel in kernels if kernel[0] == 3), default=0)
    doublings = {stem[3] * 2**n: n for n in range(2, 5)}.get(last, 0) if stem else 0
    resnet_d = doublings == 4  # its stem starts at half the width
    features = max((kernel[3] for kernel in kernels), default=0)
    bottleneck = features == 4 * last
    candidates = {
        depth: sum(network.args[1])
        for depth, network in resnet.RESNETS.items()
        if (network.args[0] is resnet.BottleneckBlock) == bottleneck
        and len(network.args[1]) == min(doublings, 3) + 1
    }
    if not candidates:
        raise UserError(f"{prefix} holds no ResNet of SimCLR, or not its stem: it has {first_few(kernels)}")
    num_3x3 = sum(kernel[0] == 3 for kernel in kernels) - (3 if resnet_d else int(stem[0] == 3))
    blocks = num_3x3 if bottleneck else num_3x3 // 2
    # A selective kernel has twice as many filters as inputs; the squeezing convolution comes next.
    squeezes = [after for kernel, after in pairwise(kernels) if kernel[0] == 3 and kernel[3] == 2 * kernel[2]]
    # Squeeze and excitation: the widths of its convolutions are reduced, whole, reduced, whole, ...
    gates = [layer["bias"][0] for layer in convs if len(layer.get("bias", ())) == 1]
    sk_ratio = 0.0625 if resnet_d or pooled else 0.0
    if bottleneck and squeezes:
        sk_ratio = _ratio(squeezes[-1][3], squeezes[-1][2], 32)
    config = {
        "depth": min(candidates, key=lambda depth: abs(candidates[depth] - blocks)),
        "width": stem[3] * (2 if resnet_d else 1) / 64,
        "sk_ratio": sk_ratio,
        "se_ratio": _ratio(gates[-2], last, 1) if len(gates) > 1 else 0.0,
        "stem": "cifar" if stem[0] == 3 and not resnet_d else "imagenet",
        "projection_layers": len(denses),
        "projection_dim": denses[-1][1] if denses else 128,
        "supervised_layer": 0 if classifier is None or classifier[0] == features else len(denses),
    }
    return complete_model(ConfigDict(config)), classifier[1] if classifier else 0


def _are_our_names(names) -> bool:
    return any(name.startswith("params/") for name in names)


def _layers(shapes: dict[str, Shape]) -> tuple[list[dict[str, Shape]], list[Shape], Shape | None]:
    """Returns the shapes of the encoder's convolutions, in forward order, and of both heads' kernels."""
    if _are_our_names(shapes):
        tree = unflatten_dict({tuple(name.split("/")): shape for name, shape in shapes.items()})
        encoder = tree["params"].get("encoder", {})
        convs = [reduce(getitem, path, encoder) for path in encoder_layers(encoder) if "conv" in path[-1]]
    else:
        numbered = {}
        for name, shape in shapes.items():
            if match := re.fullmatch(r"base_model/conv2d(?:_(\d+))?/(\w+)", name):
                numbered.setdefault(int(match[1] or 0), {})[match[2]] = shape
        convs = [numbered[number] for number in sorted(numbered)]
    dense = r"(params/projection_head/dense\d+|head_contrastive/n?l_\d+/dense)/kernel"
    denses = [shapes[name] for name in sorted(shapes) if re.fullmatch(dense, name) and len(shapes[name]) == 2]
    classifiers = ("params/supervised_head/kernel", "head_supervised/linear_layer/dense/kernel")
    return convs, denses, next((shapes[name] for name in classifiers if len(shapes.get(name, ())) == 2), None)


def _ratio(reduced: int, filters: int, least: int) -> float:
    """Returns a ratio for which max(int(ratio * filters), least) is `reduced`; 0.0625 where it is one."""
    return 0.0625 if max(int(filters * 0.0625), least) == reduced else min(reduced / filters, 1.0)
