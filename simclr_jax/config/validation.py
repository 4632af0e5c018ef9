"""Checks configs before they run: the keys of the task, their kinds and values, and keys that do not fit."""

import difflib
import math
import re
import sys

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from simclr_jax import losses, models, optim
from simclr_jax.config import ranges, shipped
from simclr_jax.models import resnet
from simclr_jax.process import UserError, first_few

# Keys whose value is a path, local or in gs://.
PLACES = ("pretrained", "embeddings", "dataset.path", "dataset.data_dir", "dataset.labels")

# Keys of `config.dataset` that a dataset does not read: to set one is an error.
_SPLIT_KEYS = ("train_split", "eval_split", "probe_split", "validation_split")
_FOLDER_KEYS = ("path", "classes", "labels", "several_labels", "group", "split_seed", "max_pixels")
_FOLDER_KEYS += ("value_range", "channels", "tile", "tile_overlap")
_UNREAD_KEYS = {"digits": (*_FOLDER_KEYS, "num_classes", *_SPLIT_KEYS), "folder": _SPLIT_KEYS}
_UNREAD_KEYS["arrays"] = _UNREAD_KEYS["digits"][1:]  # their path holds a digest
_HARMLESS_KEYS = ("data_dir", "in_memory", "shuffle_buffer")  # unread as well, where it does no harm

# Name of the values of a kind, or of a key that differs from its kind, and an example of one.
KINDS = {
    int: ("a whole number", 1),
    float: ("a number", 0.5),
    bool: ("True or False", True),
    str: ("a text", "TEXT"),
    tuple: ("two numbers", "(10,12)"),
    "model.input_mean": ("three numbers", "(0.485,0.456,0.406)"),
    "model.input_std": ("three numbers", "(0.229,0.224,0.225)"),
}


def expected(key: str, kind: type) -> tuple[str, object]:
    """Returns the name of a key's values, and an example of one."""
    return KINDS.get(key, KINDS[kind])


def check(config: ConfigDict, *, file: str, given=()) -> list[str]:
    """Checks a config before anything is done with it.

    Args:
      config: the config of a task.
      file: 'FILE' or 'FILE:TASK' that the config is from, for messages.
      given: the dotted keys that the user has set beside the file.

    Returns:
      Notes on settings that are odd but may be meant, a sentence each.

    Raises:
      UserError: a key is missing, unknown, of the wrong kind, out of range, or at odds with another.
    """
    check_keys(config, file=file, given=given)
    values, reference = flatten(config), shipped.defaults_of(config.task)
    for key, value in values.items():
        section, name = section_of(reference, key)
        _check_value(key, value, section[name], section.get_type(name))
    models.check_config(config.model)
    if "loss" in values:
        ranges.check_registered("loss", config.loss, losses.LOSSES, "losses.LOSSES")
    if "optimizer.name" in values:
        ranges.check_choice("optimizer.name", config.optimizer.name, optim.OPTIMIZERS)
    _check_profile(values.get("profile_steps"))
    _check_batch(values)
    _check_frozen_groups(values)
    _check_splits(values)
    several_labels = ("finetune", "linear_eval", "predict", "embed")
    if values["dataset.several_labels"] and config.task not in several_labels:
        raise UserError(
            f"dataset.several_labels=True: {config.task} learns one label an image; leave it out, or use "
            f"{' or '.join(several_labels[:2])}"
        )
    return _check_draws(values) + _check_unread(values, flatten(reference), given)


def check_keys(config: ConfigDict, *, file: str, given=()) -> None:
    """Raises a UserError unless a config has all keys of its task and no others; see `check`."""
    values = flatten(config, strict=False)
    if "task" not in values:
        raise UserError(f"{file} lacks the key task: start from configs/base.py, as configs/digits.py does")
    path, task = file.partition(":")[0], values["task"]
    if task not in shipped.tasks():
        raise UserError(f"task '{task}' is unknown: set --config.task to one of {', '.join(shipped.tasks())}")
    expected_keys = flatten(shipped.defaults_of(task), strict=False)
    missing = [key for key in expected_keys if key not in values]
    unknown = [key for key in values if key not in expected_keys]
    if (missing or unknown) and "task" in given:
        raise UserError(f"--config.task={task}: {file} has keys of another task; use --config={path}:{task}")
    if missing:
        raise UserError(f"{file} lacks {first_few(missing)} of task {task}: start from configs/base.py")
    if unknown:
        near = nearest(unknown[0], expected_keys)
        hint = f"did you mean {near}?" if near else "remove it; configs/base.py lists the keys"
        raise UserError(f"{file} sets {unknown[0]}, which task {task} does not read: {hint}")


def flatten(config: ConfigDict, prefix: str = "", *, strict: bool = True) -> dict[str, object]:
    """Returns {'a.b': value} of all keys.

    A key that is required and not set has None, or is a UserError where `strict`.
    """
    flat = {}
    for name in config:
        key = prefix + str(name)
        try:
            value = config[name]
        except RequiredValueError:
            if strict:
                raise UserError(f"{key} is not set: give --config.{key}=VALUE") from None
            value = None
        flat |= flatten(value, f"{key}.", strict=strict) if isinstance(value, ConfigDict) else {key: value}
    return flat


def section_of(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the innermost section that a dotted key is in, and the key's name there."""
    first, _, rest = key.partition(".")
    return section_of(config[first], rest) if rest else (config, key)


def nearest(name: str, names) -> str | None:
    """Returns the one of some dotted names that was probably meant by another; None where none is near."""
    same = [other for other in names if other.split(".")[-1] == name.split(".")[-1]]
    return next(iter(same or difflib.get_close_matches(name, names, n=1)), None)


def check_place(flag: str, place: str) -> None:
    """Raises a UserError unless a path is local or in gs://."""
    scheme, separator, path = place.partition("://")
    if not place.strip():
        raise UserError(f"--{flag} is empty: give a folder, as in --{flag}=runs/digits, or leave it out")
    if not separator or not re.fullmatch(r"[a-zA-Z][\w+.-]*", scheme):
        return
    if scheme == "file":
        raise UserError(f"--{flag}={place}: leave file:// away, as in --{flag}={path}")
    if scheme != "gs":
        raise UserError(
            f"--{flag}={place}: only local folders and gs:// are read and written; copy it to one, as in "
            f"--{flag}=gs://BUCKET/RUN"
        )
    if not path.strip("/"):
        raise UserError(f"--{flag}={place} names no bucket: write --{flag}=gs://BUCKET/RUN")


def _check_value(key, value, default, kind):
    """Checks the kind and the value of one key, whose default and kind are given."""
    if value is None and default is None:
        return
    name, example = expected(key, kind)
    example = f"--config.{key}={example if default is None else default}"
    is_kind = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if kind is tuple and is_kind:
        parts = [part for each in value for part in (each if isinstance(each, list | tuple) else (each,))]
        is_kind = all(isinstance(part, int | float) and math.isfinite(part) for part in parts)
    if not is_kind or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key}={value!r}: expected {name}, as in {example}")
    if key in PLACES:
        check_place(f"config.{key}", value)
    elif isinstance(value, str) and not value.strip() and key not in shipped.base().CHOICES:
        raise UserError(f"{key} is empty: expected {name}, as in {example}")
    ranges.check(key, value, example if default or kind is not str else "")


def _check_profile(steps):
    whole = steps is None or all(type(step) is int for step in steps)
    if steps is not None and not (whole and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(
            f"profile_steps={steps}: expected the first and the last step of a trace, whole numbers from 1 "
            "on; set --config.profile_steps=10,12, or leave it out"
        )


def _check_batch(values):
    if values["task"] == "pretrain" and values["batch_size"] < 2:
        raise UserError(
            f"batch_size={values['batch_size']}: pretraining tells the images of a batch apart; set "
            "--config.batch_size to at least 2, as in --config.batch_size=256"
        )


def _check_draws(values):
    if values.get("draws", 1) > 1 and values["labels_per_class"] is None:
        return [f"draws={values['draws']} are of labels_per_class, which is None: there is one run"]
    return []


def _check_frozen_groups(values):
    """Checks that the block group that `fine_tune_after_block` names is there."""
    encoder, depth = values["model.encoder"], values["model.depth"]
    block = values.get("fine_tune_after_block", -1)
    if encoder != "resnet" and block != -1:
        raise UserError(
            f"fine_tune_after_block={block} is of ResNets, not of model.encoder={encoder!r}: set "
            "--config.fine_tune_after_block=-1, which trains all"
        )
    if encoder == "resnet" and block > (groups := len(resnet.RESNETS[depth].args[1])):
        raise UserError(
            f"fine_tune_after_block={block}, but a ResNet-{depth} has {groups} block groups: set "
            f"--config.fine_tune_after_block to -1 (trains all) to {groups}"
        )


def _check_unread(values, defaults, given):
    """Checks keys that the dataset does not read; returns notes on those that are harmless."""
    name = values["dataset.name"]
    for key in (f"dataset.{unread}" for unread in _UNREAD_KEYS.get(name, _unread_elsewhere(name))):
        # A file that sets a key whose default is None is wrong as well; the other keys need some value.
        if values.get(key) is not None and (key in given or defaults[key] is None):
            remedy = "leave it away" if key in given else f"set --config.{key}=None"
            remedy += ", or use --config=configs/folder.py" if key == "dataset.path" else ""
            raise UserError(f"{key}={values[key]!r} is not read where dataset.name={name}: {remedy}")
    harmless = [f"dataset.{unread}" for unread in (_HARMLESS_KEYS if name in _UNREAD_KEYS else ())]
    return [f"--config.{key} has no effect where dataset.name={name}" for key in harmless if key in given]


def _unread_elsewhere(name):
    """Returns the keys that another dataset does not read: none of a source that the user has added.

    The module that added it has imported `datasets`; a check of other configs does without TensorFlow.
    """
    datasets = sys.modules.get("simclr_jax.data.datasets")
    return () if datasets and name in datasets.SOURCES else _FOLDER_KEYS


def _check_splits(values):
    """Checks that the dataset has the splits that `splits` names."""
    if values.get("splits") is None:
        return
    names = ["train", "eval"]
    names += [split for split in ("probe", "validation") if values[f"dataset.{split}_split"]]
    names += ["all"] if values["dataset.name"] == "folder" else []
    words = values["splits"].split("+")
    if not set(words) <= set(names) or len(set(words)) < len(words):
        raise UserError(
            f"splits={values['splits']!r}: set --config.splits to {' or '.join(names)}, or some of them "
            "joined by +, as in --config.splits=train+eval"
        )
