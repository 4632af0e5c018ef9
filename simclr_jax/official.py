"""Checkpoints of google-research/simclr: how their variables are called."""

import re
from collections.abc import Iterator

# Forward order within a block, which is the order in which TF1 creates (and numbers) layers.
_BLOCK = ("conv_shortcut", "bn_shortcut", "conv1", "bn1", "sk", "conv2", "bn2", "conv3", "bn3", "se")
_NESTED = ("sk", "se")

# (ours, TF1's) in the order in which TF1 creates them.
_PARAMS = {
    "conv": (("kernel", "kernel"), ("bias", "bias")),
    "dense": (("kernel", "kernel"), ("bias", "bias")),
    "bn": (("scale", "gamma"), ("bias", "beta")),
}
_STATISTICS = {"bn": (("mean", "moving_mean"), ("var", "moving_variance"))}

Path = tuple[str, ...]


def tf1_names(variables) -> dict[Path, str]:
    """Maps our variables to the names that the TF1 code gives them.

    Args:
      variables: of a `models.SimCLR` (arrays or shapes): 'params' and, if the names of the moving statistics
        are wanted, 'batch_stats'.

    Returns:
      (collection, module, ..., variable) -> TF1 name, such as
      ('params', 'encoder', 'block_group1_0', 'conv1', 'kernel') -> 'base_model/conv2d_2/kernel'
      in TF1's creation order. The encoder's layers are numbered by kind in that order.
    """
    params = variables["params"]
    counts = {"conv2d": 0, "batch_normalization": 0}
    names = {}
    for path in _encoder_layers(params["encoder"]):
        kind = _kind(path[-1])
        base = "conv2d" if kind == "conv" else "batch_normalization"
        suffix = f"_{counts[base]}" if counts[base] else ""
        counts[base] += 1
        names |= _layer_names(variables, ("encoder", *path), kind, f"base_model/{base}{suffix}")

    num_layers = sum(name.startswith("dense") for name in params.get("projection_head", {}))
    for layer in range(num_layers):
        scope = f"head_contrastive/{'l_0' if num_layers == 1 else f'nl_{layer}'}"
        path = ("projection_head", f"dense{layer}")
        names |= _layer_names(variables, path, "dense", f"{scope}/dense")
        path = ("projection_head", f"bn{layer}")
        names |= _layer_names(variables, path, "bn", f"{scope}/batch_normalization")

    if "supervised_head" in params:
        scope = "head_supervised/linear_layer/dense"
        names |= _layer_names(variables, ("supervised_head",), "dense", scope)
    return names


def _kind(layer: str) -> str:
    return re.match("conv|bn", layer).group()


def _encoder_layers(encoder) -> Iterator[Path]:
    """Paths of convolutions and batch norms, in forward order."""
    yield from _block_layers(encoder)  # the stem: conv1, bn1, ...
    blocks = [re.fullmatch(r"block_group(\d+)_(\d+)", name) for name in encoder]
    blocks = [match for match in blocks if match]
    for match in sorted(blocks, key=lambda match: (int(match[1]), int(match[2]))):
        yield from ((match[0], *path) for path in _block_layers(encoder[match[0]]))


def _block_layers(block) -> Iterator[Path]:
    for name in _BLOCK:
        if name in block and name in _NESTED:
            yield from ((name, *path) for path in _block_layers(block[name]))
        elif name in block:
            yield (name,)


def _layer_names(variables, path: Path, kind: str, scope: str) -> dict[Path, str]:
    names = {}
    for collection, leaves in (("params", _PARAMS), ("batch_stats", _STATISTICS)):
        layer = variables.get(collection, {})
        for key in path if kind in leaves else ():
            layer = layer.get(key, {})
        for ours, theirs in leaves.get(kind, ()):
            if ours in layer:
                names[collection, *path, ours] = f"{scope}/{theirs}"
    return names
