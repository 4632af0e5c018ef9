"""safetensors with the names of torchvision, for PyTorch."""

import json

import numpy as np

from simclr_jax.models.resnet import ResNet
from simclr_jax.process import UserError
from simclr_jax.torch_weights import INPUT_KEYS, METADATA
from simclr_jax.torch_weights.names import to_torch


def write(model, variables, folder, *, image_size: int, classes: dict) -> float:
    """Writes `folder`/model.safetensors, the weights alone; returns 0, since it reads back as the same bits.

    Raises:
      UserError: torchvision has no layers for what this network has.
    """
    from safetensors.numpy import load_file, save_file

    tensors = torch_tensors(model, variables)
    # The properties that names and shapes do not show, for `torch_weights.read`.
    properties = {"image_size": image_size, "max_pool": model.encoder.max_pool}
    properties |= {key: getattr(model, key) for key in INPUT_KEYS if key not in properties}
    properties |= classes if "fc.weight" in tensors else {}
    metadata = {"format": "pt", METADATA: json.dumps(properties)}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    saved = load_file(folder / "model.safetensors")
    written, read = (
        {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()} for arrays in (tensors, saved)
    )
    if written != read:
        raise UserError(f"{folder} reads otherwise than it was written: choose an --output on another disk")
    return 0.0


def torch_tensors(model, variables) -> dict[str, np.ndarray]:
    """Returns the encoder, and a classifier that reads its features, under torchvision's names.

    Raises:
      UserError: torchvision has no layers for what this network has.
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
    return to_torch(variables, model.supervised_layer)
