"""ResNets that others trained: `--config.pretrained=FILE`, .safetensors or .pth, .pt, .ckpt, .tar of PyTorch.

Any file with torchvision's names is accepted, under any prefix: torchvision, timm, MoCo, SwAV, DINO, VICReg,
Barlow Twins, lightly, solo-learn. The network is inferred from names and shapes, and the normalisation of
pixels from `sources`; `--config.model.input_mean`, `input_std` and `max_pool` override it.
Nothing in a file is ever executed.
"""

import hashlib
import io
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simclr_jax.models import describe, make_init, make_model, resnet
from simclr_jax.models.variables import check_variables
from simclr_jax.process import UserError, escape, first_few, reason_of, say_once
from simclr_jax.torch_weights import tensors_only
from simclr_jax.torch_weights.names import from_torch, name_of, torch_shape
from simclr_jax.torch_weights.sources import ANTIALIASED, ANTIALIASED_NAMES, other_network, source_of

METADATA = "simclr_jax"  # The entry that exports write into the metadata of a safetensors file.
INPUT_KEYS = ("max_pool", "input_mean", "input_std")  # Keys of `config.model` on the treatment of pixels.
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".tar", ".bin")
_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": jnp.bfloat16, "BOOL": "?", "U8": "u1"}
_DTYPES |= {f"I{8 * size}": f"i{size}" for size in (1, 2, 4, 8)}
_IMAGE_SIZE = 224  # Pixels of the images that all sources trained on.
# Layers by their places in Sequential(*children) of torchvision's ResNet, as lightly has it.
_PLACES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def find(path) -> str | None:
    """Returns `path` if it is a file of weights, else None."""
    path = epath.Path(path)
    return str(path) if path.name.endswith(_SUFFIXES) and not path.is_dir() else None


def read(path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the encoder, and the classifier of its features where the file has one.

    Returns:
      {'params', 'batch_stats'} as numpy arrays, float32, and meta: {'config', 'num_classes', 'source'}. The
      source is {'file', 'sha256', 'by', 'network', 'left'}: `by` is who trained it, as far as names show,
      `network` the prefix of the chosen network, and `left` the parts of the file that were left behind.

    Raises:
      UserError: there is no such file, it is damaged or would have to be executed, or it holds no ResNet of
        torchvision's; missing, unknown and other-shaped tensors are listed.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{escape(path)} is not there: give a .safetensors or .pth file, or a run")
    data = path.read_bytes()
    timm = _read_timm_config(path)
    if path.name.endswith(".safetensors"):
        all_tensors, exported = _read_safetensors(path, data)
    else:
        all_tensors, exported = _read_torch(path, data), {}
    if re.search(ANTIALIASED_NAMES, f"{path} {timm.get('architecture')}"):
        raise UserError(f"{escape(path)} holds {ANTIALIASED}, by its name: give a plain or wide ResNet")
    prefix, tensors, prefixes = _choose(path, all_tensors)
    trainer = source_of(all_tensors)
    config, num_classes = _infer(path, tensors, classifier=trainer.classifier)
    config |= {"max_pool": "torch", "input_mean": trainer.mean, "input_std": trainer.std}
    stated = timm | exported
    for key in stated.keys() & INPUT_KEYS:
        config[key] = tuple(stated[key]) if isinstance(stated[key], list) else stated[key]
    size = stated.get("image_size", 32 if config["stem"] == "cifar" else _IMAGE_SIZE)
    network = ConfigDict(config)
    variables = jax.eval_shape(make_init(make_model(network, num_classes), 64), jax.random.key(0))
    variables = flatten_dict(variables, sep="/")
    expected = {name_of(place): torch_shape(leaf.shape) for place, leaf in variables.items()}
    left = _check(path, network, tensors, expected) | _parts_outside(all_tensors, prefix)
    source = {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "by": "simclr-jax" if "max_pool" in stated else "timm" if timm else trainer.name,
        "network": prefix.rstrip("."),
        "left": sorted(left),
    }
    note = f"; of {', '.join(prefixes)} it is {source['network']}" if len(prefixes) > 1 else ""
    note += f"; left behind: {', '.join(source['left'])}" if left else ""
    say_once(f"{escape(path)}: {describe(network)} of {source['by']}{note}")
    config = {"task": "pretrain", "pretrained": str(path), "model": config, "ema": False, "seed": 0}
    meta = {"config": config | {"image_size": size}, "num_classes": num_classes, "source": source}
    if len(exported.get("class_names", ())) == num_classes:
        keys = ("class_names", "calibration_temperature", "several_labels")
        meta |= {key: exported[key] for key in keys if key in exported}
    return from_torch(tensors, variables), meta


def _parts_outside(names, prefix: str) -> set[str]:
    """Returns the parts beside a network: for each name the first one that its prefix does not share."""
    pairs = (zip(name.split("."), prefix.split(".")[:-1]) for name in names)
    return {next((part for part, inside in parts if part != inside), "") for parts in pairs} - {""}


def _read_timm_config(path) -> dict[str, Any]:
    """Reads timm's config.json beside a file of weights; an empty dictionary where there is none."""
    try:
        config = json.loads((path.parent / "config.json").read_text())
        inputs = config["pretrained_cfg"]
        return {
            "architecture": str(config["architecture"]),
            "input_mean": [float(value) for value in inputs["mean"]],
            "input_std": [float(value) for value in inputs["std"]],
            "image_size": int(inputs["input_size"][-1]),
        }
    except (OSError, ValueError, TypeError, KeyError):  # no such file, or the config.json of a run of ours
        return {}


def _read_safetensors(path, data):
    """Returns the tensors of a file by name, and the metadata that our own exports write."""
    from safetensors import deserialize  # the library's own arrays of NumPy have no bfloat16

    try:
        tensors = {
            name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for name, tensor in deserialize(data)
        }
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
    except Exception as error:  # the library raises several undocumented kinds
        raise _damaged(path, error) from None


def _read_torch(path, data):
    """Returns the tensors of PyTorch's file by name, nested ones as 'a.b'; nothing is executed."""
    try:
        import torch
    except ImportError:
        target = re.sub(r"(\.pth)?\.\w+$", ".safetensors", path.name)
        raise UserError(
            f"{escape(path)} is PyTorch's, which is not installed: pip install torch, or make it a "
            'safetensors where it is, by python -c "import torch, safetensors.torch as s; '
            f"d = torch.load('{path.name}', map_location='cpu', weights_only=True); "
            "d = d.get('state_dict', d.get('model', d)); "
            f"s.save_file({{k: v.contiguous() for k, v in d.items()}}, '{target}')\""
        ) from None
    try:
        loaded = tensors_only.load(io.BytesIO(data))
    except tensors_only.Refused as refused:
        raise UserError(
            f"{escape(path)} holds {escape(refused)}, which could execute anything: save the state_dict "
            "alone, as safetensors, where you trust the file"
        ) from None
    except Exception as error:
        raise _damaged(path, error) from None
    leaves = flatten_dict(loaded) if isinstance(loaded, dict) else {("",): loaded}
    tensors = {
        ".".join(map(str, path)): (value.float() if value.is_floating_point() else value).numpy(force=True)
        for path, value in leaves.items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
    }
    if not tensors:
        raise UserError(f"{escape(path)} holds no tensors, but {type(loaded).__name__}: give a state_dict")
    return tensors


def _damaged(path, error):
    reason = re.split(r"\.\s", reason_of(error, 150))[0]
    return UserError(f"{escape(path)} is damaged, or no file of that kind ({reason}): download it again")


def _choose(path, tensors):
    """Returns the prefix of the network to take, its tensors under torchvision's names, and all prefixes."""
    networks = {}
    for name in sorted(tensors):
        for first, second in (("conv1.weight", "layer1.0.conv1.weight"), ("0.weight", "4.0.conv1.weight")):
            prefix = name.removesuffix(first)
            ends_part = prefix == "" or prefix.endswith(".")
            if name.endswith(first) and ends_part and prefix + second in tensors:
                networks[prefix] = first == "0.weight"
    kind = other_network(tensors)
    if not networks or kind:
        kind = kind or f"no ResNet of torchvision ({first_few(tensors)})"
        raise UserError(f"{escape(path)} holds {kind}: give a ResNet-18 to 152 under torchvision's names")
    best = [prefix for prefix in networks if _rank(prefix) == min(map(_rank, networks))]
    if len(best) > 1:
        raise UserError(f"{escape(path)} holds several networks, {first_few(map(repr, best))}: save only one")
    prefix = best[0]
    chosen = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if networks[prefix]:  # layers are named by their places
        chosen = {
            re.sub(r"^\d+", lambda place: _PLACES.get(place[0], place[0]), name): value
            for name, value in chosen.items()
        }
    return prefix, chosen, sorted(name.rstrip(".") for name in networks)


def _rank(prefix: str) -> int:
    """Ranks networks: averages of weights that are meant for use first, momentum encoders last."""
    if re.search(r"(^|[._])ema([._]|$)|teacher", prefix):
        return 0
    return 2 if re.search(r"encoder_k|momentum", prefix) else 1


def _infer(path, tensors, *, classifier: bool) -> tuple[dict[str, Any], int]:
    """Infers `config.model` without `INPUT_KEYS` and defaults, and the number of classes."""

    def shape(name):
        return tuple(tensors[name].shape) if name in tensors else ()

    stem, inner = shape("conv1.weight"), shape("layer1.0.conv1.weight")
    if len(stem) != 4 or stem[1] != 3 or stem[2] not in (3, 7):
        raise UserError(
            f"{escape(path)}: conv1.weight has the shape {stem}, expected (64, 3, 7, 7) or, of small images, "
            "(64, 3, 3, 3): networks of other inputs cannot be taken"
        )
    blocks = (re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", name) for name in tensors)
    blocks = sorted((int(match[1]), int(match[2]) + 1) for match in blocks if match)
    counts = tuple(dict(blocks).values())  # the last block of every group
    bottleneck = "layer1.0.conv3.weight" in tensors
    middle = shape("layer1.0.conv2.weight")
    if len(middle) == 4 and len(inner) == 4 and middle[1] != inner[0]:
        raise UserError(f"{escape(path)} holds a ResNeXt, with groups: give a plain or wide ResNet")
    block = resnet.BottleneckBlock if bottleneck else resnet.BasicBlock
    depths = (depth for depth, network in resnet.RESNETS.items() if network.args == (block, counts))
    depth = next(depths, None)
    if depth is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(
            f"{escape(path)} has {' + '.join(map(str, counts))} {kind} blocks, which is no ResNet-"
            f"{', '.join(map(str, resnet.RESNETS))}: give one of these"
        )
    fc = shape("fc.weight")
    num_classes = fc[0] if classifier and len(fc) == 2 and "fc.bias" in tensors else 0
    return {
        "depth": depth,
        "width": stem[0] / 64,
        "bottleneck_width": inner[0] / stem[0] if bottleneck and len(inner) == 4 else 1.0,
        "project_first": bottleneck or "layer1.0.downsample.0.weight" in tensors,
        "stem": "cifar" if stem[2] == 3 else "imagenet",
        "projection_layers": 0,
    }, num_classes


def _check(path, config, tensors, expected) -> set[str]:
    """Returns the parts to leave behind; raises a UserError that lists tensors which do not fit."""
    names = {name for name in tensors if not name.endswith(".num_batches_tracked")}
    network = {name for name in names if name in expected or re.match(r"(conv1|bn1|layer\d+)\.", name)}
    shapes = {name: tuple(tensors[name].shape) for name in network}
    check_variables(escape(path), config, shapes, expected)
    if bad := [name for name in expected if not np.isfinite(np.asarray(tensors[name], np.float32)).all()]:
        raise UserError(f"{escape(path)}: {first_few(bad, 10)} are not finite: download it again")
    return {name.split(".")[0] for name in names - network}
