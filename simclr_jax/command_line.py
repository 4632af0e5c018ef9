"""What the command line says: `--config=FILE:TASK`, `--config.KEY=VALUE` and the flags of the process."""

import difflib
import os
import pkgutil
import re

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from simclr_jax import checkpoint, tasks
from simclr_jax.errors import UserError

_POSITIVE = ("batch_size", "num_epochs", "num_steps", "image_size", "temperature", "log_every_steps")
_POSITIVE += ("checkpoint_every_steps", "keep_checkpoints", "labels_per_class", "evaluate.every_epochs")
_POSITIVE += ("draws", "k", "examples_per_part", "microbatches")
_RANGES = {
    "augment.color_jitter_strength": (0, 1.25),
    "augment.min_area": (0, 1),
    "optimizer.momentum": (0, 1),
    "label_weight": (0, 1),
    "fine_tune_after_block": (-1, 4),
}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of configs/, as in configs/digits.py:pretrain."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where neither Cloud TPU nor Slurm tells it."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the run; needs coordinator_address."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0; needs coordinator_address.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Local or gs:// folder of the run; default: runs/DATASET/TASK."
)


def processes() -> dict[str, str | int | None]:
    """Which process this is and of how many, as `parallel.initialize` takes it."""
    return {
        "coordinator_address": _COORDINATOR.value,
        "num_processes": _NUM_PROCESSES.value,
        "process_id": _PROCESS_ID.value,
    }


def workdir(config) -> epath.Path:
    """The folder of the run."""
    variant = _config_filename().partition(":")[2] or config.task
    return epath.Path(_WORKDIR.value or f"runs/{config.dataset.name.replace('/', '-')}/{variant}")


def given() -> dict[str, object]:
    """The keys that the user gave as `--config.KEY=VALUE`, dotted, with their values."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def defaults() -> ConfigDict:
    """The config as its file has it, without what the command line changes."""
    return config_flags.ConfigFileFlagParser("defaults").parse(_config_filename())


def read_config() -> ConfigDict:
    """The config of the command line.

    Raises:
      UserError: a value is out of range.
    """
    config = _CONFIG.value
    known = [module.name for module in pkgutil.iter_modules(tasks.__path__)]
    if config.task not in known:
        raise UserError(f"task '{config.task}' is unknown: set --config.task to one of {', '.join(known)}")
    values = checkpoint.flatten(config.to_dict())
    for key in _POSITIVE:
        if values.get(key) is not None and not values[key] > 0:
            raise UserError(f"{key}={values[key]}: set --config.{key} to a number above 0")
    for key, (low, high) in _RANGES.items():
        if key in values and not low <= values[key] <= high:
            raise UserError(f"{key}={values[key]}: set --config.{key} to a number from {low} to {high}")
    return config


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; whatever is wrong with it, one line says so."""
    words = [word for argument in argv[1:] for word in argument.split("=", 1)]
    named = {word.lstrip("-"): value for word, value in zip(words, [*words[1:], ""]) if word.startswith("-")}
    path = named.get("config", "").partition(":")[0]
    if not path and not any("help" in name for name in named):
        raise UserError("--config is missing: give a file of configs/, as in --config=configs/digits.py")
    if path and not os.path.exists(path):
        raise UserError(f"--config={path} does not exist: give a file of configs/, as in configs/digits.py")
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # which --help shows of every command
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, ["config", "workdir"], n=1)
        raise UserError(_unknown(error.flagname, near and near[0])) from None
    except (AttributeError, KeyError) as error:  # how config_flags tells of an unknown key
        wrong = re.search(r"\w+", str(error)).group()
        near = re.search(r'Did you mean "(\w+)"', str(error))
        flag = next((name for name in named if wrong in name.split(".")), wrong)
        raise UserError(_unknown(flag, near and flag.replace(wrong, near.group(1)))) from None
    except (flags.Error, TypeError, ValueError) as error:
        # An exception of the config file itself comes as its whole traceback: the last line tells it.
        last = str(error).strip().splitlines()[-1]
        raise UserError(last.removeprefix("ValueError: ")) from None
    if len(rest) > 1:
        raise UserError(f"'{rest[1]}' is not a flag: write --config.KEY=VALUE")
    return rest


def _config_filename():
    return config_flags.get_config_filename(flags.FLAGS["config"])


def _unknown(flag: str, near: str | None) -> str:
    return f"--{flag} is unknown: " + (
        f"did you mean --{near}?" if near else "configs/base.py lists the keys"
    )
