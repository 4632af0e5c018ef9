"""The variables of google-research/simclr: in TF1 by name, in TF2 by place in an object graph."""

import re
from collections.abc import Iterator

from flax.traverse_util import flatten_dict

# Forward order within a block, which is the order in which TF1 creates (and numbers) layers.
_BLOCK = ("conv_shortcut", "bn_shortcut", "conv1", "bn1", "sk", "conv2", "bn2", "conv3", "bn3", "se")
_NESTED = ("sk", "se")

# (our name, TF1's name) in the order in which TF1 creates the variables.
_PARAMS = {
    "conv": (("kernel", "kernel"), ("bias", "bias")),
    "dense": (("kernel", "kernel"), ("bias", "bias")),
    "bn": (("scale", "gamma"), ("bias", "beta")),
}
_STATISTICS = {"bn": (("mean", "moving_mean"), ("var", "moving_variance"))}

_TF1_SCOPES = ("base_model/", "head_contrastive/", "head_supervised/")

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# The keys of a checkpoint that are not the model's.
_OTHERS = rf"global_step|beta\d_power|ema_model/.*|.*memory.*|{_GRAPH}|.*/\.OPTIMIZER_SLOT/.*|.*_CONFIG_JSON"
_OTHERS += rf"|(global_step|save_counter|optimizer/.*){_VALUE}"

Path = tuple[str, ...]  # One of our variables: ('params', 'encoder', 'conv1', 'kernel')

# TF2's attributes, relative to the stem or to a block, and our layers.
_TF2_STEM = {"0/conv2d": "conv1", "1/bn": "bn1", "2/bn": "bn1", "2/conv2d": "conv2", "3/bn": "bn2"}
_TF2_STEM |= {"4/conv2d": "conv3", "6/bn": "bn3"}
_TF2_BLOCK = {
    "shortcut/conv2d": "conv_shortcut",
    "shortcut/bn": "bn_shortcut",
    "conv2d_bn_layers/0/conv2d": "conv1",
    "conv2d_bn_layers/1/bn": "bn1",
    "conv2d_bn_layers/2/conv2d": "conv2",
    "conv2d_bn_layers/3/bn": "bn2",
    "se_layer/se_reduce": "se/conv1",
    "se_layer/se_expand": "se/conv2",
    "conv_relu_dropblock_layers/0/conv2d": "conv1",
    "conv_relu_dropblock_layers/1/bn": "bn1",
    "conv_relu_dropblock_layers/3/conv2d": "conv2",
    "conv_relu_dropblock_layers/4/bn": "bn2",
    "conv_relu_dropblock_layers/6/conv2d": "conv3",
    "conv_relu_dropblock_layers/7/bn": "bn3",
    "conv_relu_dropblock_layers/9/se_reduce": "se/conv1",
    "conv_relu_dropblock_layers/9/se_expand": "se/conv2",
    # Selective kernels are one entry of the list; a convolution and its batch norm are two.
    "conv_relu_dropblock_layers/3/conv2d_fixed_padding/conv2d": "sk/conv1",
    "conv_relu_dropblock_layers/3/batch_norm_relu/bn": "sk/bn1",
    "conv_relu_dropblock_layers/3/conv2d_0": "sk/conv2",
    "conv_relu_dropblock_layers/3/batch_norm_relu_1/bn": "sk/bn2",
    "conv_relu_dropblock_layers/3/conv2d_1": "sk/conv3",
    "conv_relu_dropblock_layers/5/conv2d": "conv3",
    "conv_relu_dropblock_layers/6/bn": "bn3",
    "conv_relu_dropblock_layers/8/se_reduce": "se/conv1",
    "conv_relu_dropblock_layers/8/se_expand": "se/conv2",
}
_TF2_LEAVES = {"kernel": "kernel", "gamma": "scale", "beta": "bias", "bias": "bias"}
_TF2_STATISTICS = {"moving_mean": "mean", "moving_variance": "var"}
# All attributes on the way to a variable of the model.
_TF2_ATTRIBUTES = {
    "model",
    "resnet_model",
    "initial_conv_relu_max_pool",
    "block_groups",
    "layers",
    "bn",
    "dense",
}
_TF2_ATTRIBUTES |= {"shortcut_layers", "projection_layers", "_projection_head", "linear_layers", "bn_relu"}
_TF2_ATTRIBUTES |= {"supervised_head", "linear_layer", *_TF2_LEAVES, *_TF2_STATISTICS}
_TF2_ATTRIBUTES |= {attribute for layer in _TF2_BLOCK for attribute in layer.split("/")}

# TF2's variables also have names, whose layers Keras numbers as TF1 does.
_TF2_NAMES = (
    (r"resnet/(?:.+/)?(conv2d(?:_\d+)?)/(kernel|bias)", r"base_model/\1/\2"),
    (r"resnet/(?:.+/)?(?:sync_)?(batch_normalization(?:_\d+)?)/(\w+)", r"base_model/\1/\2"),
    (r"projection_head/(\w+)/dense(?:_\d+)?/(\w+)", r"head_contrastive/\1/dense/\2"),
    (
        r"projection_head/(\w+)/(?:.+/)?(?:sync_)?batch_normalization(?:_\d+)?/(\w+)",
        r"head_contrastive/\1/batch_normalization/\2",
    ),
    (r"head_supervised/linear_layer/dense(?:_\d+)?/(\w+)", r"head_supervised/linear_layer/dense/\1"),
)


def tf1_names(variables) -> dict[Path, str]:
    """Maps our variables to the names that the TF1 code gives them.

    Args:
      variables: the variables of a `models.SimCLR` (arrays or shapes): 'params', and 'batch_stats' if the
        names of the moving statistics are needed.

    Returns:
      (collection, module, ..., variable) -> TF1 name, such as
      ('params', 'encoder', 'block_group1_0', 'conv1', 'kernel') -> 'base_model/conv2d_2/kernel'
      in TF1's creation order. The encoder's layers are numbered by kind in that order.
    """
    params = variables["params"]
    counts = {"conv2d": 0, "batch_normalization": 0}
    names = {}
    for path in encoder_layers(params["encoder"]):
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


def our_names(variables) -> dict[Path, str]:
    """Maps every variable, as ('params', 'encoder', 'conv1', 'kernel'), to its joined path."""
    return {path: "/".join(path) for path in flatten_dict(variables)}


def _kind(layer: str) -> str:
    return re.match("conv|bn", layer).group()


def encoder_layers(encoder) -> Iterator[Path]:
    """Yields the paths of an encoder's convolutions and batch norms, in forward order."""
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
        for our_leaf, tf1_leaf in leaves.get(kind, ()):
            if our_leaf in layer:
                names[collection, *path, our_leaf] = f"{scope}/{tf1_leaf}"
    return names


def from_tf2_object(key: str) -> str | None:
    """Returns our variable at a place in TF2's object graph; None if the model has none there.

    'model/resnet_model/block_groups/0/layers/1/conv2d_bn_layers/3/bn/beta' ->
    'params/encoder/block_group1_1/bn2/bias'
    """
    scope, _, leaf = key.rpartition("/")
    layer = None
    if match := re.fullmatch(r"model/resnet_model/initial_conv_relu_max_pool/(.+)", scope):
        layer = f"encoder/{_TF2_STEM[match[1]]}" if match[1] in _TF2_STEM else None
    elif match := re.fullmatch(r"model/resnet_model/block_groups/(\d+)/layers/(\d+)/(.+)", scope):
        inner = re.sub(r"^(shortcut|projection)_layers/\d+", "shortcut", match[3])
        block = f"block_group{int(match[1]) + 1}_{match[2]}"
        layer = f"encoder/{block}/{_TF2_BLOCK[inner]}" if inner in _TF2_BLOCK else None
    elif match := re.fullmatch(r"model/_projection_head/linear_layers/(\d+)/(?:(dense)|bn_relu/bn)", scope):
        layer = f"projection_head/{match[2] or 'bn'}{match[1]}"
    elif scope == "model/supervised_head/linear_layer/dense":
        layer = "supervised_head"
    if layer and leaf in _TF2_LEAVES:
        return f"params/{layer}/{_TF2_LEAVES[leaf]}"
    return f"batch_stats/{layer}/{_TF2_STATISTICS[leaf]}" if layer and leaf in _TF2_STATISTICS else None


def from_tf2_name(name: str) -> str | None:
    """Returns the TF1 name of a TF2 variable; None if it is not the model's.

    'resnet/block_group1/residual_block_1/batch_norm_relu_4/sync_batch_normalization_4/gamma' ->
    'base_model/batch_normalization_4/gamma'
    """
    for pattern, tf1 in _TF2_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(tf1)
    return None


def model_keys(reader, shapes, *, ema: bool) -> tuple[dict[str, str], bool]:
    """Finds the variables of the model in a checkpoint.

    Args:
      reader: from `tf.train.load_checkpoint`.
      shapes: key -> shape of everything in the checkpoint.
      ema: take the moving average of the variables; the classifier has none.

    Returns:
      name -> key: our names where an object graph has places for them, otherwise TF1's.
      Whether shortcuts pool before they convolve, which only places show, and neither names nor shapes.
    """
    if not any(key.endswith(_VALUE) for key in shapes):
        keys = shapes.keys() - _slots(shapes)
        copy = "ema_model/" if ema else ""
        scopes = tuple(copy + scope for scope in _TF1_SCOPES)
        heads = {key: key for key in keys if key.startswith("head_supervised/")}
        named = heads | {key.removeprefix(copy): key for key in keys if key.startswith(scopes)}
        if {name.split("/")[1] for name in named if name.startswith("head_contrastive/")} == {"nl_0"}:
            named = {name.replace("/nl_0/", "/l_0/"): key for name, key in named.items()}  # the same layer
        return named, False
    if ema:
        return {}, False
    if _GRAPH not in shapes:
        places, nodes = [(key.removesuffix(_VALUE), key) for key in shapes], ()
    else:
        from tensorflow.core.protobuf import trackable_object_graph_pb2

        nodes = trackable_object_graph_pb2.TrackableObjectGraph.FromString(reader.get_tensor(_GRAPH)).nodes
        places = list(_places(nodes))
    named = {name: key for place, key in places if (name := from_tf2_object(place))}
    pooled = any(re.search(r"/(shortcut|projection)_layers/[12]/conv2d/", place) for place, _ in places)
    values = [value for node in nodes for value in node.attributes]
    by_name = {from_tf2_name(value.full_name): value.checkpoint_key for value in values}
    named = named or {name: key for name, key in by_name.items() if name}
    return {name: key for name, key in named.items() if key in shapes}, pooled


def _places(nodes) -> Iterator[tuple[str, str]]:
    """Yields (place, key) of the variables that the attributes of the official model lead to."""
    waiting = [((), 0)]
    while waiting:
        place, node = waiting.pop()
        yield from (("/".join(place), value.checkpoint_key) for value in nodes[node].attributes)
        for child in nodes[node].children if len(place) < 12 else ():  # stops at rings: no place is longer
            if child.local_name.isdigit() or child.local_name in _TF2_ATTRIBUTES:
                waiting.append(((*place, child.local_name), child.node_id))


def _slots(keys) -> set[str]:
    """Returns the keys of TF1's optimiser slots, which lie under the name of their variable."""
    return {key for key in keys if key.rpartition("/")[0] in keys}


def other_keys(keys) -> set[str]:
    """Returns the keys that are not the model's: of the optimiser, the moving average, the memory, ..."""
    return _slots(keys) | {key for key in keys if re.fullmatch(_OTHERS, key)}
