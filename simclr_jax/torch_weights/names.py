"""Torchvision's names of the variables of a ResNet, which nearly all published files use."""

import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # Our axes in the order of PyTorch's, by their number.


def name_of(path: str, supervised_layer: int = 0) -> str | None:
    """Returns torchvision's name of a variable, None if it has none.

    'params/encoder/block_group1_0/conv1/kernel' -> 'layer1.0.conv1.weight'. A classifier that reads the
    features is called 'fc'.
    """
    _, part, *layers, leaf = path.split("/")
    if part == "encoder":
        name = re.sub(r"block_group(\d+)_(\d+)/", r"layer\1.\2.", "/".join(layers))
        name = name.replace("conv_shortcut", "downsample.0").replace("bn_shortcut", "downsample.1")
    elif part == "supervised_head" and supervised_layer == 0:
        name = "fc"
    else:
        return None
    return f"{name}.{_LEAVES[leaf]}"


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that PyTorch's tensor of a variable has."""
    return tuple(shape[axis] for axis in _AXES[len(shape)])


def to_torch(variables, supervised_layer: int = 0) -> dict[str, np.ndarray]:
    """Converts the encoder, and the classifier if it reads the features, to torchvision's names and layouts.

    Kernels [h, w, in, out] become [out, in, h, w], matrices [in, out] become [out, in].
    """
    tensors = {}
    for path, value in flatten_dict(variables, sep="/").items():
        name = name_of(path, supervised_layer)
        if name is None:
            continue
        tensors[name] = np.ascontiguousarray(np.transpose(value, _AXES[value.ndim]), np.float32)
        if path.endswith("/mean"):
            tensors[f"{name.removesuffix('.running_mean')}.num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


def from_torch(tensors: dict[str, np.ndarray], paths) -> dict:
    """Converts tensors under torchvision's names back to the tree of the variables at `paths`."""
    variables = {}
    for path in paths:
        value = tensors[name_of(path)]
        axes = np.argsort(_AXES[value.ndim])
        variables[path] = np.array(value.transpose(axes), np.float32, order="C")
    return unflatten_dict(variables, sep="/")
