"""safetensors with the names of torchvision, for PyTorch."""

import re

import numpy as np
from flax.traverse_util import flatten_dict

from simclr_jax.errors import UserError
from simclr_jax.models.resnet import ResNet


def write(model, variables, folder, *, image_size: int) -> float:
    """Writes `folder`/model.safetensors, the weights alone; returns 0, since it reads back as the same bits.

    Raises:
      UserError: torchvision has no layers for what this network has.
    """
    from safetensors.numpy import load_file, save_file

    tensors = torch_tensors(model, variables)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    read = load_file(folder / "model.safetensors")
    bits = [{key: (x.dtype, x.shape, x.tobytes()) for key, x in of.items()} for of in (tensors, read)]
    if bits[0] != bits[1]:
        raise UserError(f"{folder} reads otherwise than it was written: choose an --output on another disk")
    return 0.0


def torch_tensors(model, variables) -> dict[str, np.ndarray]:
    """The encoder, and the classifier where there is one of its features, under torchvision's names.

    ('params', 'encoder', 'block_group1_0', 'conv1', 'kernel') [h, w, in, out] -> 'layer1.0.conv1.weight'
    [out, in, h, w], and so on.
    """
    if not isinstance(model.encoder, ResNet):
        raise UserError(
            "this encoder is no ResNet, whose names torchvision knows: choose --format=onnx or savedmodel"
        )
    if model.encoder.sk_ratio or model.encoder.se_ratio:
        raise UserError(
            "torchvision's ResNet has neither selective kernels, nor ResNet-D's shortcuts, nor squeeze and "
            "excitation: choose --format=onnx or savedmodel"
        )
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean"}
    leaves["var"] = "running_var"
    tensors = {}
    for path, value in flatten_dict(variables, sep="/").items():
        _, part, *layers, leaf = path.split("/")
        if part == "encoder":
            name = re.sub(r"block_group(\d+)_(\d+)/", r"layer\1.\2.", "/".join(layers))
            name = name.replace("conv_shortcut", "downsample.0").replace("bn_shortcut", "downsample.1")
        elif part == "supervised_head" and model.supervised_layer == 0:
            name = "fc"
        else:
            continue
        value = np.asarray(value, np.float32)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
        tensors[f"{name}.{leaves[leaf]}"] = np.ascontiguousarray(value.transpose(axes) if axes else value)
        if leaf == "mean":
            tensors[f"{name}.num_batches_tracked"] = np.zeros((), np.int64)
    return tensors
