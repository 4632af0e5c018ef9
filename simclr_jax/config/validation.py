"""Whether a config is one that can be run: its keys, their kinds and ranges, and what they are together."""

import difflib
import math
import pkgutil
import re
from typing import NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from simclr_jax import losses, models, tasks
from simclr_jax.config import shipped
from simclr_jax.models import resnet
from simclr_jax.process import UserError


class _Range(NamedTuple):
    """The numbers from `low` to `high`; with `above`, `low` itself is none of them."""

    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self):
        if self.above:
            return f"a number above {self.low}" + ("" if self.high == math.inf else f" and up to {self.high}")
        if self.high == math.inf:
            return f"a number of at least {self.low}"
        return f"a number from {self.low} to {self.high}"


# Of every number of every task; None is allowed where configs/base.py has it.
_ABOVE_0 = (
    "batch_size",
    "num_epochs",
    "num_steps",
    "image_size",
    "temperature",
    "microbatches",
    "model.depth",
    "draws",
    "k",
)
_ABOVE_0 += ("labels_per_class", "examples_per_part", "keep_checkpoints", "checkpoint_every_steps")
_ABOVE_0 += ("log_every_steps", "evaluate.every_epochs", "evaluate.max_examples", "optimizer.learning_rate")
_ABOVE_0 += ("evaluate.scratch_learning_rate", "model.projection_dim", "dataset.num_examples")
_ABOVE_0 += ("dataset.num_classes", "dataset.shuffle_buffer")
RANGES = dict.fromkeys(
    _ABOVE_0,
    _Range(0, above=True),
) | {
    "seed": _Range(0, 2_000_000_000),  # further draws count on from it, within 32 bits
    "warmup_epochs": _Range(0),
    "augment.min_area": _Range(0, 1, above=True),
    "augment.color_jitter_strength": _Range(0, 1.25),
    "model.width": _Range(1 / 32, 64),  # 2 to 4,096 filters in the first group
    "model.bottleneck_width": _Range(1 / 32, 64),
    "model.sk_ratio": _Range(0, 1),
    "model.se_ratio": _Range(0, 1),
    "model.projection_layers": _Range(0, 100),
    "model.supervised_layer": _Range(0, 100),
    "optimizer.weight_decay": _Range(0),
    "optimizer.momentum": _Range(0, 0.9999),
    "label_weight": _Range(0, 1),
    "dataset.split_seed": _Range(0, 2_000_000_000),
    "dataset.max_pixels": _Range(0, above=True),
    "fine_tune_after_block": _Range(-1, 4),
}
CHOICES = {
    "augment.crop_dtype": ("float16", "float32"),
    "model.stem": ("auto", "cifar", "imagenet"),
    "model.max_pool": ("tensorflow", "torch"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "optimizer.name": ("lars", "sgd", "adam"),
    "optimizer.scaling": ("linear", "sqrt"),
    "metric": ("top1", "mean_per_class"),
    "tracker": ("", "wandb", "mlflow"),
}
PLACES = ("pretrained", "dataset.path", "dataset.data_dir", "dataset.labels")

# Keys of `config.dataset` that a dataset does not read: set, they were meant to change something ...
_SPLITS = ("train_split", "eval_split", "probe_split", "validation_split")
_OF_FOLDERS = ("path", "classes", "labels", "split_seed", "max_pixels", "value_range")
_UNREAD = {"digits": (*_OF_FOLDERS, "num_classes", *_SPLITS), "folder": _SPLITS}
_UNREAD["arrays"] = tuple(key for key in _UNREAD["digits"] if key != "path")  # which tells them from others
_UNREAD_OF_TFDS = _OF_FOLDERS
_HARMLESS = ("data_dir", "in_memory", "shuffle_buffer")  # ... but for these, of digits and folders

# What a value of a kind is called, and an example of it.
KINDS = {
    int: ("a whole number", 1),
    float: ("a number", 0.5),
    bool: ("True or False", True),
    str: ("a text", "TEXT"),
    tuple: ("two numbers", "(10,12)"),
}
_COLOURS = {
    "model.input_mean": ("three numbers", "(0.485,0.456,0.406)"),
    "model.input_std": ("three numbers", "(0.229,0.224,0.225)"),
}


def expected(key: str, kind: type) -> tuple[str, object]:
    """What a key's value is called, and an example of it."""
    return _COLOURS.get(key, KINDS[kind])


def check(config: ConfigDict, *, file: str, given=()) -> list[str]:
    """Checks a config before anything is done with it.

    Args:
      config: of a task.
      file: 'FILE' or 'FILE:TASK' that it is from, for messages.
      given: the dotted keys that the user set on top of that.

    Returns:
      What is odd but can be meant, a sentence each.

    Raises:
      UserError: a key is missing, unknown, of the wrong kind, out of range, or at odds with another.
    """
    check_keys(config, file=file, given=given)
    values, reference = flatten(config), reference_of(config.task) or config
    for key, value in values.items():
        section, name = section_of(reference, key)
        _check_value(key, value, section[name], section.get_type(name))
    notes = []
    models.check_encoder(config.model)
    _check_profile(values)
    _check_network(values, notes)
    _check_dataset(values, flatten(reference), given, notes)
    return notes


def check_keys(config: ConfigDict, *, file: str, given=()) -> None:
    """Raises a UserError unless a config has all keys of its task and no others; see `check`."""
    values = flatten(config, strict=False)
    if "task" not in values:
        raise UserError(f"{file} lacks the key task: start from configs/base.py, as configs/digits.py does")
    path, task = file.partition(":")[0], values["task"]
    if task not in known_tasks():
        raise UserError(f"task '{task}' is unknown: set --config.task to one of {', '.join(known_tasks())}")
    wanted = flatten(reference_of(task) or config, strict=False)
    missing = [key for key in wanted if key not in values]
    unknown = [key for key in values if key not in wanted]
    if (missing or unknown) and "task" in given:
        raise UserError(
            f"--config.task={task}: {file} is of another task, with other keys; use --config={path}:{task}"
        )
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more keys" if len(missing) > 3 else "")
        raise UserError(
            f"{file} lacks {some} of task {task}: start from configs/base.py, as configs/digits.py does"
        )
    if unknown:
        near = nearest(unknown[0], wanted)
        hint = f"did you mean {near}?" if near else "remove it; configs/base.py lists the keys"
        raise UserError(f"{file} sets {unknown[0]}, which task {task} does not read: {hint}")


def flatten(config: ConfigDict, prefix: str = "", *, strict: bool = True) -> dict[str, object]:
    """{'a.b': value} of all keys; unless `strict`, with None for those that are required and not set."""
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
    """Whose key a dotted key is in the end, and its name there."""
    first, _, rest = key.partition(".")
    return section_of(config[first], rest) if rest else (config, key)


def known_tasks() -> list[str]:
    """What `config.task` may be."""
    return [module.name for module in pkgutil.iter_modules(tasks.__path__)]


def reference_of(task: str) -> ConfigDict | None:
    """configs/base.py's config of a task; None where it has none of that name."""
    base = shipped.base()
    make = getattr(base, task, None) if task in known_tasks() else None
    return make and (make() if task == "pretrain" else make(base.pretrain()))


def nearest(name: str, known) -> str | None:
    """Which of the known dotted names was probably meant."""
    same = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    return next(iter(same or difflib.get_close_matches(name, known, n=1)), None)


def check_place(flag: str, place: str) -> None:
    """Raises a UserError unless files can be there: on a local path, or in gs://."""
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
    if value is None and default is None:
        return
    called, example = expected(key, kind)
    example = f"--config.{key}={example if default is None else default}"
    of_kind = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if kind is tuple and of_kind:
        of_kind = all(isinstance(part, int | float) and math.isfinite(part) for part in value)
    if not of_kind or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key}={value!r}: expected {called}, as in {example}")
    if key in PLACES:
        check_place(f"config.{key}", value)
    elif key in CHOICES and value not in CHOICES[key]:
        raise _none_of(CHOICES[key], key, value, default or CHOICES[key][-1])
    elif isinstance(value, str) and not value.strip() and key not in CHOICES:
        raise UserError(f"{key} is empty: expected {called}, as in {example}")
    elif kind in (int, float) and key in RANGES:
        allowed = RANGES[key]
        # Devices compute in 32 bits; a comparison with NaN is false.
        fits = abs(value) < 2**31 if kind is int else value == 0 or 1e-37 <= abs(value) <= 1e38
        if not (fits and allowed.holds(value)):
            limit = "" if not allowed.holds(value) else " that 32 bits hold"
            raise UserError(f"{key}={value}: set --config.{key} to {allowed}{limit}, as in {example}")


def _none_of(choices, key, value, example) -> UserError:
    """The error of a value that is none of the choices."""
    *others, last = map(repr, choices)
    return UserError(
        f"{key}={value!r}: set it to {', '.join(others)} or {last}, as in --config.{key}={example}"
    )


def _check_profile(values):
    steps = values.get("profile_steps")
    whole = steps is None or all(type(step) is int for step in steps)
    if steps is not None and not (whole and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(
            f"profile_steps={steps}: expected the first and the last step of a trace, whole numbers from 1 "
            "on; set --config.profile_steps=10,12, or leave it out"
        )


def _check_network(values, notes):
    if values["task"] == "pretrain" and values["batch_size"] < 2:
        raise UserError(
            f"batch_size={values['batch_size']}: pretraining tells the images of a batch apart; set "
            "--config.batch_size to at least 2, as in --config.batch_size=256"
        )
    layers, layer = values["model.projection_layers"], values["model.supervised_layer"]
    if layer > layers:
        raise UserError(
            f"model.supervised_layer={layer}, but there are {layers} projection layers: set "
            f"--config.model.supervised_layer to 0 (the features) to {layers}, or raise "
            "--config.model.projection_layers"
        )
    mean, std = values["model.input_mean"], values["model.input_std"]
    if (mean or std) and not (len(mean or ()) == len(std or ()) == 3 and min(std) > 0):
        raise UserError(
            f"model.input_mean={mean} with model.input_std={std}: expected three numbers each, std above 0, "
            "or None for both, as in --config.model.input_mean=0.485,0.456,0.406 "
            "--config.model.input_std=0.229,0.224,0.225"
        )
    if values.get("draws", 1) > 1 and values["labels_per_class"] is None:
        notes.append(f"draws={values['draws']} are of labels_per_class, which is None: there is one run")
    if values.get("loss", "nt_xent") not in losses.LOSSES:
        raise UserError(
            f"loss={values['loss']!r}: known here are {', '.join(map(repr, losses.LOSSES))}; one of your own "
            "is added to simclr_jax.losses.LOSSES by a module that is imported before"
        )
    _check_encoder(values["model.encoder"], values["model.depth"], values.get("fine_tune_after_block", -1))


def _check_encoder(encoder, depth, block):
    """What of the keys of ResNets holds for this encoder; `block` is `fine_tune_after_block`."""
    if encoder == "resnet" and depth not in resnet.RESNETS:
        raise _none_of(resnet.RESNETS, "model.depth", depth, 50)
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


def _check_dataset(values, defaults, given, notes):
    name = values["dataset.name"]
    ours = name in _UNREAD
    for unread in _UNREAD.get(name, _UNREAD_OF_TFDS):
        key = f"dataset.{unread}"
        # What is None by default is wrong in a file as well; the others have to be something.
        if values.get(key) is not None and (key in given or defaults[key] is None):
            remedy = "leave it away" if key in given else f"set --config.{key}=None"
            remedy += ", or use --config=configs/folder.py" if unread == "path" else ""
            raise UserError(f"{key}={values[key]!r} is not read where dataset.name={name}: {remedy}")
    for unread in _HARMLESS if ours else ():
        if f"dataset.{unread}" in given:
            notes.append(f"--config.dataset.{unread} has no effect where dataset.name={name}")
    if values.get("splits") is not None:
        known = ["train", "eval"]
        known += [split for split in ("probe", "validation") if values[f"dataset.{split}_split"]]
        known += ["all"] if name == "folder" else []
        words = values["splits"].split("+")
        if not set(words) <= set(known) or len(set(words)) < len(words):
            raise UserError(
                f"splits={values['splits']!r}: set --config.splits to {' or '.join(known)}, or some of them "
                "joined by +, as in --config.splits=train+eval"
            )
