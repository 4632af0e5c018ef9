"""Starts tasks from `--config.pretrained=PATH`: a workdir, a checkpoint, or weights that others trained."""

import hashlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from simclr_jax import checkpoint, models, official, torch_weights
from simclr_jax.config.saved import complete
from simclr_jax.models import make_model
from simclr_jax.process import UserError, escape, files, reason_of, say, say_once

# Keys of `config.model` that decide which parameters the encoder and the projection head have.
_ENCODER = ("channels", "encoder", "depth", "width", "sk_ratio", "se_ratio", "stem", "project_first")
_ENCODER += ("bottleneck_width",)
_HEAD = ("projection_layers", "projection_dim")


def third_party_reader(path):
    """Returns the module that reads the third-party checkpoint at `path`; None for a run of this program."""
    return next((module for module in (official, torch_weights) if module.find(path)), None)


def read(path, *, use_average: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint, a workdir's newest one, or the weights of a network that others trained.

    Args:
      path: see above.
      use_average: take the moving average of the weights: of a run with a memory, see `simclr_jax.memory`, or
        `ema_model/` of an official checkpoint.

    Returns:
      {'params', 'batch_stats'} as numpy arrays, and meta: {'config', 'num_classes'}.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    if not path:
        raise UserError("pretrained is not set: give --config.pretrained=RUN, the workdir of a run")
    reader = third_party_reader(path)
    if reader is official:
        variables, meta = official.read(path, ema=use_average)
    elif reader and use_average:
        raise UserError(f"{escape(path)} holds no moving average of the weights: leave use_average out")
    else:
        variables, meta = reader.read(path) if reader else checkpoint.load_params(path, average=use_average)
    return variables, meta | {"config": complete(meta["config"])}


def inherit_settings(config, given: dict[str, Any]) -> None:
    """Takes model, image size and split of `config.pretrained` into the config of a task that starts there.

    Distillation keeps its own model, which is the student.

    Args:
      config: changed in place.
      given: the keys that the user set, which stay; `image_size` may differ from the checkpoint's, and a
        line says so.

    Raises:
      UserError: there is no checkpoint, or the user set another model than its.
    """
    if not config.pretrained:
        return
    files.check_reachable(config.pretrained)
    meta = _read_meta(config.pretrained)
    saved, current = (flatten_dict(tree, sep=".") for tree in (complete(meta["config"]), config.to_dict()))
    saved |= {key: tuple(value) for key, value in saved.items() if isinstance(value, list)}
    keys = _model_keys(config, saved, current, given)
    inherited = {
        key: saved[key] for key in (*keys, "image_size") if key not in given and current[key] != saved[key]
    }
    if config.dataset.name == saved.get("dataset.name") == "folder":
        seed = saved["dataset.split_seed"]
        seed = saved["seed"] if seed is None else seed
        if "dataset.split_seed" not in given and seed != config.seed:
            inherited["dataset.split_seed"] = seed
        for key in ("dataset.group", "dataset.tile", "dataset.tile_overlap"):
            if key not in given and saved[key]:
                inherited[key] = saved[key]
        if "dataset.value_range" not in given and meta.get("value_range"):
            inherited["dataset.value_range"] = tuple(meta["value_range"])
    if config.dataset.name == "folder" and "dataset.channels" not in given and saved["model.channels"] != 3:
        inherited["dataset.channels"] = saved["model.channels"]
    config.update_from_flattened_dict(inherited)
    if inherited:
        settings = ", ".join(f"{key}={value}" for key, value in inherited.items())
        say(f"as in {escape(config.pretrained)}: {settings}")
    if config.image_size != saved["image_size"]:
        say(
            f"note: image_size={config.image_size}, but {escape(config.pretrained)} was trained at "
            f"{saved['image_size']}: features of another size are worse, leave --config.image_size out"
        )


def _model_keys(config, saved, current, given):
    """Returns the keys of the model that have to be those of the checkpoint; raises if a given one is not."""
    if config.task == "distill":
        return ["model.channels"]
    # Any projection head fits a checkpoint that has none.
    architecture = [*_ENCODER, *(_HEAD if saved["model.projection_layers"] else ())]
    architecture = [f"model.{key}" for key in architecture]
    differing = [key for key in architecture if key in given and current[key] != saved[key]]
    if differing:
        settings = ", ".join(f"{key}={current[key]}" for key in differing)
        remedy = " ".join(f"--config.{key}={saved[key]}" for key in differing)
        raise UserError(f"{settings} does not fit {escape(config.pretrained)}: leave it out, or set {remedy}")
    return [*architecture, *(f"model.{key}" for key in torch_weights.INPUT_KEYS)]


def load(config, model) -> dict[str, Any]:
    """Loads encoder and projection head of `config.pretrained` for `model`.

    Args:
      config: the config of a task; its `pretrained`, `use_average`, `image_size` and `model` are read.
      model: from `make_model`; a classifier and projection layers that it does without are left behind.

    Returns:
      {'params', 'batch_stats'}, each with the subtrees of the model but `supervised_head`.

    Raises:
      UserError: no checkpoint, or one of another architecture.
    """
    saved, meta = read(config.pretrained, use_average=config.use_average)
    needed = jax.eval_shape(models.make_init(model, config.image_size), jax.random.key(0))
    needed["params"].pop("supervised_head", None)
    if "projection_head" not in saved["params"] and model.projection_head.kept_layers is None:
        say_once(f"{escape(config.pretrained)} has no projection head: a new one is trained")
        for tree in needed.values():
            tree.pop("projection_head", None)
    loaded = {}
    for collection, tree in needed.items():
        expected, arrays = flatten_dict(tree, sep="/"), flatten_dict(saved[collection], sep="/")
        unused = [path for path in arrays if path.startswith("encoder/") and path not in expected]
        for path in [*expected, *unused]:
            here, there = (
                f"of shape {leaves[path].shape}" if path in leaves else "missing"
                for leaves in (expected, arrays)
            )
            if here != there:
                raise UserError(
                    f"{config.pretrained} does not fit the model: {path} is {there} there, and {here} here; "
                    f"{_remedy(config, meta['config'])}"
                )
        loaded[collection] = unflatten_dict({path: arrays[path] for path in expected}, sep="/")
    return loaded


def load_model(path, *, use_average: bool = False, **changes) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Loads the whole model of a run or checkpoint as it was trained, classifier included.

    Args:
      path: a run or checkpoint.
      use_average: see `read`.
      changes: keys of its `config.model` that leave the parameters as they are, such as `dtype`.

    Returns:
      The model, {'params', 'batch_stats'} as numpy arrays, and meta as saved: {'config', 'num_classes'}, and
      'calibration_temperature', which the logits of its classifier are divided by; None where there is none.
    """
    variables, meta = read(path, use_average=use_average)
    file = checkpoint.split(path)[0] / "summary.json"
    summary = {} if third_party_reader(path) or not files.exists(file) else read_summary(file)
    meta = {"calibration_temperature": summary.get("calibration_temperature")} | meta
    return model_of(meta, **changes), variables, meta


def probabilities(meta: dict[str, Any], logits: jax.Array) -> jax.Array:
    """Returns the calibrated probabilities of a classifier's classes: [n, classes] -> [n, classes]."""
    logits = logits / (meta["calibration_temperature"] or 1.0)
    return jax.nn.sigmoid(logits) if meta.get("several_labels") else jax.nn.softmax(logits)


def model_of(meta: dict[str, Any], **changes):
    """Builds the model of a checkpoint's meta; `changes` are those of `load_model`."""
    whole_projection = meta["config"]["task"] == "pretrain"
    model_config = ConfigDict(meta["config"]["model"] | changes)
    return make_model(model_config, meta["num_classes"], whole_projection=whole_projection)


def read_summary(file) -> dict:
    """Reads the summary of another run, which is left as it is.

    Raises:
      UserError: it is damaged.
    """
    try:
        return files.read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{escape(file)} is no JSON ({reason_of(error)}): remove it, or finish the run, which writes it"
        ) from None


def make_init(config, model):
    """Builds a `Task.init` that starts from `config.pretrained`; the classifier starts afresh."""
    init, loaded = models.make_init(model, config.image_size), load(config, model)
    return lambda key: {name: tree | loaded.get(name, {}) for name, tree in init(key).items()}


def fingerprint(path, *, use_average: bool) -> dict[str, Any]:
    """Returns the `step` of a run's newest checkpoint, None for other weights, and a digest, `network`."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten_dict(read(path, use_average=use_average)[0], sep="/").items()):
        digest.update(name.encode())
        digest.update(np.asarray(leaf).tobytes())
    return {"step": max(checkpoint.steps_in(path), default=None), "network": digest.hexdigest()[:12]}


def make_meta(config, model, source) -> dict:
    """Returns the metadata that checkpoints keep beside the train state; see `check_channels`."""
    check_channels(config, source)
    start = config.pretrained
    is_read = start and not official.find(start)  # official files take seconds to read, and have no source
    return {
        "config": config.to_dict(),
        "num_classes": model.supervised_head.features if model.supervised_head else 0,
        "class_names": list(source.class_names),
        "several_labels": bool(source.label_sets),
        "value_range": source.value_range,
        "dtype": source.dtype,
        "order": source.order,
        "source": _read_meta(start).get("source") if is_read else None,  # see `torch_weights.read`
    }


def check_channels(config, source) -> None:
    """Raises a UserError where the images have other channels than the model."""
    if source.channels != config.model.channels:
        raise UserError(
            f"{source.name} has {source.channels} channels, the network {config.model.channels}: choose "
            f"others, or set --config.dataset.channels={config.model.channels}, which takes the first ones"
        )


def _read_meta(path):
    return read(path)[1] if third_party_reader(path) else checkpoint.load_meta(path)


def _remedy(config, saved):
    """Returns the settings that give the config the model of the checkpoint, for a message."""
    settings = [
        f"--config.model.{key}={saved['model'][key]}"
        for key in (*_ENCODER, *_HEAD)
        if saved["model"].get(key) != config.model[key]
    ]
    if not settings and config.model.stem == "auto":
        settings = [f"--config.image_size={saved['image_size']}"]
    return f"set {' '.join(settings)} as in the checkpoint"
