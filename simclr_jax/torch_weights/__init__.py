"""ResNets that others trained: `--config.pretrained=FILE`, .safetensors or .pth, .pt, .ckpt, .tar of PyTorch.

Whatever has torchvision's names is taken, under any prefix: torchvision, timm, MoCo, SwAV, DINO, VICReg,
Barlow Twins, lightly, solo-learn. The network is told from names and shapes. What they do not tell, how
pixels were normalised, `sources` knows; `--config.model.input_mean`, `input_std` and `max_pool` win over it.
Nothing in a file is ever executed.
"""

import hashlib
import io
import json
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simclr_jax.models import check_variables, describe, make_model, resnet
from simclr_jax.process.console import escape, say_once
from simclr_jax.process.errors import UserError, first_few, reason_of
from simclr_jax.torch_weights.names import from_torch, name_of
from simclr_jax.torch_weights.sources import ANTIALIASED, ANTIALIASED_NAMES, other_network, source_of

METADATA = "simclr_jax"  # the entry of a safetensors file's metadata that exports write
INPUT_KEYS = ("max_pool", "input_mean", "input_std")  # of `config.model`: what is done with pixels
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".tar", ".bin")
_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": jnp.bfloat16, "BOOL": "?", "U8": "u1"}
_DTYPES |= {f"I{8 * size}": f"i{size}" for size in (1, 2, 4, 8)}
_SIZE = 224  # pixels, of the training of all sources
# torchvision's Sequential(*children), as lightly has it: the places of layers.
_PLACES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def find(path) -> str | None:
    """The file of weights at `path`; None where it is none."""
    path = epath.Path(path)
    return str(path) if path.name.endswith(_SUFFIXES) and not path.is_dir() else None


def read(path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the encoder, and the classifier of its features where the file has one.

    Returns:
      {'params', 'batch_stats'} as numpy arrays, float32, and meta: {'config', 'num_classes', 'source'}. The
      source is {'file', 'sha256', 'by', 'network', 'left'}: who trained it as far as names tell, which of the
      file's networks it is, and what of the file was left behind.

    Raises:
      UserError: there is no such file, it is damaged or would have to be executed, or it holds no ResNet of
        torchvision's; missing, unknown and other-shaped tensors are listed.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(
            f"{escape(path)} is not there: give a .safetensors or .pth file, or the workdir of a run"
        )
    data = path.read_bytes()
    told: dict[str, Any] = {}
    if path.name.endswith(".safetensors"):
        every, told = _read_safetensors(path, data)
    else:
        every = _read_torch(path, data)
    beside = _beside(path)
    if re.search(ANTIALIASED_NAMES, f"{path} {beside.get('architecture')}"):
        raise UserError(f"{escape(path)} holds {ANTIALIASED}, by its name: give a plain or wide ResNet")
    prefix, tensors, rivals = _choose(path, every)
    by = source_of(every)
    config, num_classes = _infer(path, tensors, classifier=by.classifier)
    config |= {"max_pool": "torch", "input_mean": by.mean, "input_std": by.std}
    told = beside | told
    config |= {key: _as_tuple(told[key]) for key in INPUT_KEYS if key in told}
    size = told.get("image_size", 32 if config["stem"] == "cifar" else _SIZE)
    network = ConfigDict(config)
    model = make_model(network, num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = flatten_dict(variables, sep="/")
    expected = {name_of(place): _torch_shape(leaf.shape) for place, leaf in variables.items()}
    left = _check(path, network, tensors, expected) | _left(every, prefix)
    trees = from_torch(tensors, variables)
    source = {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "by": "simclr-jax" if "max_pool" in told else "timm" if beside else by.name,
        "network": prefix.rstrip("."),
        "left": sorted(left),
    }
    whole = {"task": "pretrain", "pretrained": str(path), "model": config, "ema": False, "seed": 0}
    _tell(path, describe(network), source, rivals)
    meta = {"config": whole | {"image_size": size}, "num_classes": num_classes, "source": source}
    if len(told.get("class_names", ())) == num_classes:  # of our exports
        meta |= {key: told[key] for key in ("class_names", "calibration_temperature") if key in told}
    return trees, meta


def _left(names, prefix: str) -> set[str]:
    """What lies beside the network of that prefix: the first parts of names after what all share with it."""
    left = set()
    for name in names:
        parts, ours = name.split("."), prefix.split(".")[:-1]
        shared = next((place for place, part in enumerate(ours) if part != parts[place]), None)
        left |= set() if shared is None else {parts[shared]}
    return left


def _tell(path, network, source, rivals):
    rest = f"; of {', '.join(rivals)} it is {source['network']}" if rivals else ""
    rest += f"; left behind: {', '.join(source['left'])}" if source["left"] else ""
    say_once(f"{escape(path)}: {network} of {source['by']}{rest}")


def _beside(path) -> dict[str, Any]:
    """What timm's config.json beside a file tells of its network; nothing where there is none."""
    try:
        read = json.loads((path.parent / "config.json").read_text())
        told = {**read["pretrained_cfg"], "architecture": read["architecture"]}
        return {
            "architecture": str(told["architecture"]),
            "input_mean": [float(value) for value in told["mean"]],
            "input_std": [float(value) for value in told["std"]],
            "image_size": int(told["input_size"][-1]),
        }
    except (OSError, ValueError, TypeError, KeyError):  # or the one of a run of ours
        return {}


def _as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _read_safetensors(path, data):
    """Its tensors by name, and what our own exports say in its metadata."""
    from safetensors import deserialize  # the library's own arrays of NumPy have no bfloat16

    try:
        tensors = {
            name: np.frombuffer(of["data"], _DTYPES[of["dtype"]]).reshape(of["shape"])
            for name, of in deserialize(data)
        }
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
    except Exception as error:  # of the library: several kinds, undocumented
        raise _damaged(path, error) from None


def _read_torch(path, data):
    """The tensors of PyTorch's file by name, of nested dictionaries as 'a.b'; nothing is executed."""
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
    import argparse

    try:
        # DINO's checkpoints hold their arguments so, which are plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{escape(path)} holds {forbidden[1]}, which is no data and could execute anything: save the "
                "state_dict alone, as safetensors, where you trust the file"
            ) from None
        raise _damaged(path, error) from None
    except Exception as error:
        raise _damaged(path, error) from None
    tensors = {
        name: value.float().numpy() if value.is_floating_point() else value.numpy()
        for name, value in _flat(loaded).items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
    }
    if not tensors:
        raise UserError(
            f"{escape(path)} holds no tensors, but {type(loaded).__name__}: give a state_dict's file"
        )
    return tensors


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.")
    return flat


def _damaged(path, error):
    reason = re.split(r"\.\s", reason_of(error, 150))[0]
    return UserError(f"{escape(path)} is damaged, or no file of that kind ({reason}): download it again")


def _choose(path, tensors):
    """The prefix of the network to take, its tensors under torchvision's names, and the prefixes of all."""
    networks = {}
    for name in sorted(tensors):
        for first, second in (("conv1.weight", "layer1.0.conv1.weight"), ("0.weight", "4.0.conv1.weight")):
            prefix = name.removesuffix(first)
            whole = prefix == "" or prefix.endswith(".")
            if name.endswith(first) and whole and prefix + second in tensors:
                networks[prefix] = first == "0.weight"
    kind = other_network(tensors)
    if not networks or kind:
        some = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{escape(path)} holds {kind or f'no ResNet of torchvision ({some}, ...)'}: give a ResNet-18 to "
            "152 under torchvision's names"
        )
    ranks = {prefix: _rank(prefix) for prefix in networks}
    best = [prefix for prefix in networks if ranks[prefix] == min(ranks.values())]
    if len(best) > 1:
        raise UserError(
            f"{escape(path)} holds several networks, {', '.join(map(repr, best))}: save one of them to a "
            "file of its own"
        )
    prefix = best[0]
    ours = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if networks[prefix]:  # by places
        ours = {
            re.sub(r"^\d+", lambda place: _PLACES.get(place[0], place[0]), name): value
            for name, value in ours.items()
        }
    return prefix, ours, sorted(name.rstrip(".") for name in networks) if len(networks) > 1 else []


def _rank(prefix: str) -> int:
    """Averages of weights that are meant for use come first, keys of a momentum encoder last."""
    if re.search(r"(^|[._])ema([._]|$)|teacher", prefix):
        return 0
    return 2 if re.search(r"encoder_k|momentum", prefix) else 1


def _infer(path, tensors, *, classifier: bool) -> tuple[dict[str, Any], int]:
    """`config.model`, but for `INPUT_KEYS`, and the number of classes."""

    def shape(name):
        return tuple(tensors[name].shape) if name in tensors else ()

    stem, inner = shape("conv1.weight"), shape("layer1.0.conv1.weight")
    if len(stem) != 4 or stem[1] != 3 or stem[2] not in (3, 7):
        raise UserError(
            f"{escape(path)}: conv1.weight has the shape {stem}, expected (64, 3, 7, 7) or, of small images, "
            "(64, 3, 3, 3): networks of other inputs cannot be taken"
        )
    blocks: dict[int, int] = {}
    for name in tensors:
        if match := re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", name):
            blocks[int(match[1])] = max(blocks.get(int(match[1]), 0), int(match[2]) + 1)
    counts = tuple(blocks[group] for group in sorted(blocks))
    bottleneck = "layer1.0.conv3.weight" in tensors
    middle = shape("layer1.0.conv2.weight")
    if len(middle) == 4 and len(inner) == 4 and middle[1] != inner[0]:
        raise UserError(
            f"{escape(path)} holds a ResNeXt, whose convolutions are grouped: give a plain or wide ResNet"
        )
    block = resnet.BottleneckBlock if bottleneck else resnet.BasicBlock
    depth = next((depth for depth, of in resnet.RESNETS.items() if of.args == (block, counts)), None)
    if depth is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(
            f"{escape(path)} has {' + '.join(map(str, counts))} {kind} blocks, which is no ResNet-"
            f"{', '.join(map(str, resnet.RESNETS))}: give one of these"
        )
    fc = shape("fc.weight")
    num_classes = fc[0] if classifier and len(fc) == 2 and "fc.bias" in tensors else 0
    return {
        "encoder": "resnet",
        "depth": depth,
        "width": stem[0] / 64,
        "bottleneck_width": inner[0] / stem[0] if bottleneck and len(inner) == 4 else 1.0,
        "project_first": bottleneck or "layer1.0.downsample.0.weight" in tensors,
        "sk_ratio": 0.0,
        "se_ratio": 0.0,
        "stem": "cifar" if stem[2] == 3 else "imagenet",
        "projection_layers": 0,
        "projection_dim": 128,
        "supervised_layer": 0,
        "zero_init_logits": False,
        "sync_batch_norm": True,
        "dtype": "auto",
    }, num_classes


def _check(path, config, tensors, expected) -> set[str]:
    """What of the tensors is left behind; a UserError lists those of the network that do not fit."""
    tensors = {name: of for name, of in tensors.items() if not name.endswith(".num_batches_tracked")}
    of_network = {name for name in tensors if name in expected or re.match(r"(conv1|bn1|layer\d+)\.", name)}
    found = {name: tuple(tensors[name].shape) for name in of_network}
    check_variables(escape(path), config, found, expected)
    if bad := [name for name in expected if not np.isfinite(np.asarray(tensors[name], np.float32)).all()]:
        raise UserError(
            f"{escape(path)} has numbers that are not finite, in {first_few(bad, 10)}: download it again"
        )
    return {name.split(".")[0] for name in tensors.keys() - of_network}


def _torch_shape(shape):
    return tuple(shape[axis] for axis in {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape))))
