"""What a task takes from the checkpoint it starts from: `--config.pretrained=<workdir or checkpoint>`."""

from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from simclr_jax import checkpoint, official, torch_weights, train
from simclr_jax.config.saved import complete
from simclr_jax.models import make_model
from simclr_jax.process import UserError, escape, files, reason_of
from simclr_jax.workdir import records, report

# The keys that decide which parameters a model has, and their shapes.
_ARCHITECTURE = (
    "encoder",
    "depth",
    "width",
    "sk_ratio",
    "se_ratio",
    "stem",
    "project_first",
    "bottleneck_width",
)
_HEAD = ("projection_layers", "projection_dim")


def others_format(path):
    """The module that reads what lies at `path`, of networks that others trained; None of runs of ours."""
    return next((module for module in (official, torch_weights) if module.find(path)), None)


def read(path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was saved under `path`.

    Returns:
      {'params', 'batch_stats'} as numpy arrays, and meta: {'config', 'num_classes'}.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    if not path:
        raise UserError(
            "pretrained is not set: give --config.pretrained=RUN, the workdir of a pretraining run"
        )
    others = others_format(path)
    variables, meta = others.read(path) if others else checkpoint.load_params(path)
    return variables, meta | {"config": complete(meta["config"])}


def inherit_settings(config, given: dict[str, Any]) -> None:
    """Takes model, image size and split of `config.pretrained` into the config of a task that starts there.

    The model of distillation is the student's own.

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
    meta = _meta(config.pretrained)
    saved = complete(meta["config"])
    theirs, ours = records.flatten(saved), records.flatten(config.to_dict())
    theirs |= {key: tuple(value) for key, value in theirs.items() if isinstance(value, list)}
    # What has no projection head fits any.
    model = (*_ARCHITECTURE, *(_HEAD if theirs["model.projection_layers"] else ()))
    model = () if config.task == "distill" else tuple(f"model.{key}" for key in model)
    wrong = [key for key in model if key in given and ours[key] != theirs[key]]
    if wrong:
        settings = " ".join(f"--config.{key}={theirs[key]}" for key in wrong)
        raise UserError(
            f"{', '.join(f'{key}={ours[key]}' for key in wrong)} does not fit {escape(config.pretrained)}: "
            f"leave it out, or set {settings} as there"
        )
    inputs = tuple(f"model.{key}" for key in torch_weights.INPUT_KEYS) if model else ()
    taken = {
        key: theirs[key]
        for key in (*model, *inputs, "image_size")
        if key not in given and ours[key] != theirs[key]
    }
    if config.dataset.name == "folder" and theirs.get("dataset.name") == "folder":
        seed = theirs["dataset.split_seed"]
        seed = theirs["seed"] if seed is None else seed
        if "dataset.split_seed" not in given and seed != config.seed:
            taken["dataset.split_seed"] = seed
        if "dataset.value_range" not in given and meta.get("value_range"):
            taken["dataset.value_range"] = tuple(meta["value_range"])
    config.update_from_flattened_dict(taken)
    if taken:
        told = ", ".join(f"{key}={value}" for key, value in taken.items())
        report.say(f"as in {escape(config.pretrained)}: {told}")
    if config.image_size != theirs["image_size"]:
        report.say(
            f"note: image_size={config.image_size}, but {escape(config.pretrained)} was trained at "
            f"{theirs['image_size']}: features of another size are worse, leave --config.image_size out"
        )


def load(config, model) -> dict[str, Any]:
    """Encoder and projection head of `config.pretrained`, for `model`.

    Args:
      config: of a task; its `pretrained`, `image_size` and `model` are read.
      model: from `make_model`; projection layers that it does without are left behind, and so is a
        classifier.

    Returns:
      {'params', 'batch_stats'}, each with the subtrees of the model but `supervised_head`.

    Raises:
      UserError: no checkpoint, or one of another architecture.
    """
    saved, meta = read(config.pretrained)
    needed = jax.eval_shape(train.make_init(model, config.image_size), jax.random.key(0))
    needed["params"].pop("supervised_head", None)
    if "projection_head" not in saved["params"] and model.projection_head.kept_layers is None:
        report.say_once(f"{escape(config.pretrained)} has no projection head: a new one is trained")
        for tree in needed.values():
            tree.pop("projection_head", None)
    loaded = {}
    for collection, tree in needed.items():
        ours, theirs = (flatten_dict(of, sep="/") for of in (tree, saved[collection]))
        unused = [path for path in theirs if path.startswith("encoder/") and path not in ours]
        for path in [*ours, *unused]:
            here, there = (f"of shape {of[path].shape}" if path in of else "missing" for of in (ours, theirs))
            if here != there:
                raise UserError(
                    f"{config.pretrained} does not fit the model: {path} is {there} there, and {here} here; "
                    f"{_remedy(config, meta['config'])}"
                )
        loaded[collection] = unflatten_dict({path: theirs[path] for path in ours}, sep="/")
    return loaded


def load_model(path, **changes) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The whole model of a run or checkpoint as it was trained, classifier included.

    Args:
      path: of the run or checkpoint.
      changes: keys of its `config.model` that leave the parameters as they are, such as `dtype`.

    Returns:
      model, {'params', 'batch_stats'} as numpy arrays, and meta as saved: {'config', 'num_classes'}, with the
      'calibration_temperature' that the logits of its classifier are divided by, None where there is none.
    """
    variables, meta = read(path)
    meta = {"calibration_temperature": _calibration_temperature(path)} | meta
    whole = meta["config"]["task"] == "pretrain"
    model_config = ConfigDict(meta["config"]["model"] | changes)
    return make_model(model_config, meta["num_classes"], whole_projection=whole), variables, meta


def _calibration_temperature(path):
    """As the summary of a run tells it."""
    file = None if others_format(path) else epath.Path(checkpoint.split(path)[0]) / "summary.json"
    return read_summary(file).get("calibration_temperature") if file and files.exists(file) else None


def read_summary(file) -> dict:
    """The summary of another run, which stays as it is.

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
    """`Task.init` that starts from `config.pretrained`; the classifier starts afresh."""
    init, loaded = train.make_init(model, config.image_size), load(config, model)
    return lambda key: {name: tree | loaded.get(name, {}) for name, tree in init(key).items()}


def source_of(config) -> dict[str, Any] | None:
    """Of the weights of others that `config.pretrained` is or came from: `source` of `torch_weights.read`."""
    if not config.pretrained or official.find(config.pretrained):  # whose files take seconds to read
        return None
    return _meta(config.pretrained).get("source")


def _meta(path):
    return read(path)[1] if others_format(path) else checkpoint.load_meta(path)


def _remedy(config, saved):
    theirs, ours = saved["model"], config.model.to_dict()
    options = [
        f"--config.model.{key}={theirs[key]}"
        for key in (*_ARCHITECTURE, *_HEAD)
        if theirs.get(key) != ours.get(key)
    ]
    if not options and ours["stem"] == "auto":
        options = [f"--config.image_size={saved['image_size']}"]
    return f"set {' '.join(options)} as in the checkpoint"
