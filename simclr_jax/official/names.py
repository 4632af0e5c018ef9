"""The variables of google-research/simclr: in TF1 by name, in TF2 by place in an object graph."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files

from flax.traverse_util import flatten_dict

# Forward order within a block, which is the order in which TF1 creates (and numbers) layers.
_BLOCK = ("conv_shortcut", "bn_shortcut", "conv1", "bn1", "sk", "conv2", "bn2", "conv3", "bn3", "se")
_NESTED = ("sk", "se")

# (collection, our name, TF1's name) of a layer's variables, in the order in which TF1 creates them.
_WEIGHTS = (("params", "kernel", "kernel"), ("params", "bias", "bias"))
_BATCH_NORM = (("params", "scale", "gamma"), ("params", "bias", "beta"))
_BATCH_NORM += (("batch_stats", "mean", "moving_mean"), ("batch_stats", "var", "moving_variance"))

_TF1_SCOPES = ("base_model/", "head_contrastive/", "head_supervised/")

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# The keys of a checkpoint that are not the model's.
_NON_MODEL_KEYS = (
    rf"global_step|beta\d_power|ema_model/.*|.*memory.*|{_GRAPH}|.*/\.OPTIMIZER_SLOT/.*|.*_CONFIG_JSON"
)
_NON_MODEL_KEYS += rf"|(global_step|save_counter|optimizer/.*){_VALUE}"

Path = tuple[str, ...]  # One of our variables: ('params', 'encoder', 'conv1', 'kernel')

# The attributes of TF2's objects: "stem" and "block" map those below a stem or a block to our layers,
# "variables" maps the last one to our variable, "others" lists the rest of those that lead to variables.
# Selective kernels are one entry of a block's list; a convolution and its batch norm are two.
_TF2 = json.loads(files("simclr_jax.official").joinpath("tf2_attributes.json").read_text())
_TF2_ATTRIBUTES = {*_TF2["others"], *_TF2["variables"], *"/".join(_TF2["block"]).split("/")}

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
    scopes, counts = {}, Counter()  # TF1's scope of each layer; how many layers of a kind there are so far
    for path in encoder_layers(variables["params"]["encoder"]):
        kind = "conv2d" if path[-1].startswith("conv") else "batch_normalization"
        number = f"_{counts[kind]}" if counts[kind] else ""
        scopes["encoder", *path] = f"base_model/{kind}{number}"
        counts[kind] += 1
    num_layers = sum(name.startswith("dense") for name in variables["params"].get("projection_head", {}))
    for layer in range(num_layers):
        scope = f"head_contrastive/{'l_0' if num_layers == 1 else f'nl_{layer}'}"
        scopes["projection_head", f"dense{layer}"] = f"{scope}/dense"
        scopes["projection_head", f"bn{layer}"] = f"{scope}/batch_normalization"
    scopes[("supervised_head",)] = "head_supervised/linear_layer/dense"

    paths, names = flatten_dict(variables), {}
    for layer, scope in scopes.items():
        for collection, leaf, tf1_leaf in _BATCH_NORM if "batch_normalization" in scope else _WEIGHTS:
            if (collection, *layer, leaf) in paths:
                names[collection, *layer, leaf] = f"{scope}/{tf1_leaf}"
    return names


def our_names(variables) -> dict[Path, str]:
    """Maps every variable, as ('params', 'encoder', 'conv1', 'kernel'), to its joined path."""
    return {path: "/".join(path) for path in flatten_dict(variables)}


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


def from_tf2_object(key: str) -> str | None:
    """Returns our variable at a place in TF2's object graph; None if the model has none there.

    'model/resnet_model/block_groups/0/layers/1/conv2d_bn_layers/3/bn/beta' ->
    'params/encoder/block_group1_1/bn2/bias'
    """
    scope, _, leaf = key.rpartition("/")
    layer = None
    if match := re.fullmatch(r"model/resnet_model/initial_conv_relu_max_pool/(.+)", scope):
        layer = _TF2["stem"].get(match[1])
    elif match := re.fullmatch(r"model/resnet_model/block_groups/(\d+)/layers/(\d+)/(.+)", scope):
        inner = _TF2["block"].get(re.sub(r"^(shortcut|projection)_layers/\d+", "shortcut", match[3]))
        layer = inner and f"encoder/block_group{int(match[1]) + 1}_{match[2]}/{inner}"
    elif match := re.fullmatch(r"model/_projection_head/linear_layers/(\d+)/(?:(dense)|bn_relu/bn)", scope):
        layer = f"projection_head/{match[2] or 'bn'}{match[1]}"
    elif scope == "model/supervised_head/linear_layer/dense":
        layer = "supervised_head"
    return _TF2["variables"][leaf].format(layer) if layer and leaf in _TF2["variables"] else None


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
      shapes: key -> shape of all tensors in the checkpoint.
      ema: take the moving average of the variables; the classifier has none.

    Returns:
      name -> key: our names where an object graph has places for them, otherwise TF1's.
      Whether shortcuts pool before they convolve, which only places show, and neither names nor shapes.
    """
    if not any(key.endswith(_VALUE) for key in shapes):
        keys = shapes.keys() - _slots(shapes)
        prefix = "ema_model/" if ema else ""
        scopes = tuple(prefix + scope for scope in _TF1_SCOPES)
        heads = {key: key for key in keys if key.startswith("head_supervised/")}
        named = heads | {key.removeprefix(prefix): key for key in keys if key.startswith(scopes)}
        if {name.split("/")[1] for name in named if name.startswith("head_contrastive/")} == {"nl_0"}:
            named = {name.replace("/nl_0/", "/l_0/"): key for name, key in named.items()}  # the same layer
        return named, False
    if ema:
        return {}, False
    nodes, places = (), [(key.removesuffix(_VALUE), key) for key in shapes]
    if _GRAPH in shapes:
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
        for child in nodes[node].children if len(place) < 12 else ():  # ends at cycles: no place is longer
            if child.local_name.isdigit() or child.local_name in _TF2_ATTRIBUTES:
                waiting.append(((*place, child.local_name), child.node_id))


def _slots(keys) -> set[str]:
    """Returns the keys of TF1's optimiser slots, which lie under the name of their variable."""
    return {key for key in keys if key.rpartition("/")[0] in keys}


def non_model_keys(keys) -> set[str]:
    """Returns the keys of the optimiser, the moving average, the memory and the like, not of the model."""
    return _slots(keys) | {key for key in keys if re.fullmatch(_NON_MODEL_KEYS, key)}
