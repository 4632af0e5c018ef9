"""Reads the command line: `--config=FILE:TASK`, `--config.KEY=VALUE` and the flags of the process.

All of it is checked before a run begins; every mistake is reported in one line.
"""

import os
import re
import sys

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from simclr_jax.config import manual, settings, shipped, validation
from simclr_jax.process import UserError, console, errors, group, say, stopping

_CONFIG = flags.DEFINE_string(
    "config", None, "File of configs/, as in configs/digits.py:pretrain; --config.KEY=VALUE sets its keys."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where neither Cloud TPU nor Slurm tells it."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the run; needs coordinator_address, but where it is 1."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0; needs coordinator_address.")
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "Seconds in which all processes of the run have to be there.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Local or gs:// folder; default: runs/DATASET/TASK.")


_parsed = {}  # 'config', 'given' and 'notes' from `parse`, kept as absl keeps the values of other flags


def this_process() -> dict[str, str | int | None]:
    """Returns the number of this process and of all, as `group.join` takes them."""
    return {flag.name: flag.value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}


def join_timeout() -> int:
    """Returns the seconds in which all processes have to be there."""
    return _JOIN_TIMEOUT.value


def file() -> str:
    """Returns the config file, without the task."""
    return _CONFIG.value.partition(":")[0]


def workdir(config) -> epath.Path:
    """Returns the folder of the run."""
    variant = _CONFIG.value.partition(":")[2] or config.task
    place = _WORKDIR.value or f"runs/{config.dataset.name.replace('/', '-')}/{variant}"
    return epath.Path(os.path.expanduser(place))  # shells leave the ~ of --workdir=~/run alone


def given() -> dict[str, object]:
    """Returns the keys that the user gave as `--config.KEY=VALUE`, dotted, with their values."""
    return dict(_parsed["given"])


def defaults() -> ConfigDict:
    """Returns the config as its file has it; see `settings.defaults`."""
    return settings.defaults(_CONFIG.value)


def read_config() -> ConfigDict:
    """Returns the config of the command line, and prints notes on what is odd about it."""
    for note in _parsed["notes"]:
        say(f"note: {note}")
    return _parsed["config"]


def run(command) -> None:
    """Runs a command line with a config: user errors are one line and exit code 2.

    Args:
      command: function that `absl.app.run` calls with the remaining arguments, once all are checked.
    """
    console.keep_temporary_files_apart()
    with errors.one_line_errors(group.leave, "--config."), stopping.handled():
        try:
            app.run(command, flags_parser=parse)
        except errors.UserError:
            raise
        except SystemExit as end:
            if group.alone():
                stopping.leave(end.code)
            raise
        except Exception:
            group.wait_for_other_processes()
            raise


def parse(argv: list[str]) -> list[str]:
    """Parses the command line and checks the config; for `absl.app.run`.

    Raises:
      UserError: something is wrong with either.
    """
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # --help of every command shows them
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    flags_of_command = flags.FLAGS.get_key_flags_for_module(argv[0])
    wants_help = not {"--help", "-help", "-h"}.isdisjoint(argv[1:])
    argv = [argv[0]] + [word for word in argv[1:] if word not in ("--help", "-help", "-h")]
    try:
        words = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=True)
        overrides, words = _split(words)
        pairs = _pairs(words)
        arguments = flags.FLAGS([argv[0], *words])
    except UserError:
        raise
    except flags.UnrecognizedFlagError as error:
        names = [flag.name for flag in flags_of_command]
        keys = [f"config.{key}" for key in validation.flatten(shipped.defaults_of("pretrain"))]
        raise UserError(settings.unknown(error.flagname, names + keys)) from None
    except flags.IllegalFlagValueError as error:
        name = re.match(r"flag --(\w+)", str(error)).group(1)
        kind = {"int": int, "float": float, "bool": bool}.get(flags.FLAGS[name].flag_type())
        if kind is None:  # absl's own kinds, as that of --stderrthreshold
            raise UserError(f"{settings.one_line(error)}: see --helpfull") from None
        value, (expected, example) = dict(pairs)[name], validation.KINDS[kind]
        raise UserError(f"--{name}={value}: expected {expected}, as in --{name}={example}") from None
    except (flags.Error, ValueError) as error:
        raise UserError(f"{settings.one_line(error)}: write --NAME=VALUE, see --help") from None
    if wants_help:
        print(manual.text(flags_of_command, _CONFIG.value))
        sys.exit(0)
    if len(arguments) > 1:
        raise UserError(f"'{arguments[1]}' is not a flag: write --config.KEY=VALUE")
    if not _CONFIG.value:
        raise UserError("--config is missing: give a file of configs/, as in --config=configs/digits.py")
    if _WORKDIR.value is not None:
        validation.check_place("workdir", _WORKDIR.value)
    _check_processes()

    config, given, notes = settings.make(_CONFIG.value, overrides, as_text=True)
    repeated = _note_repeated([(f"config.{key}", text) for key, text in overrides] + pairs)
    _parsed.update(config=config, given=given, notes=repeated + notes)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # errors that libraries log become a line here
    return arguments


def _split(words):
    """Splits words into overrides of config keys and the rest.

    Returns:
      (KEY, VALUE) of every --config.KEY=VALUE or --config.KEY VALUE, with None for a missing value; the other
      words.
    """
    overrides, others, words = [], [], list(words)
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL)
        if not match:
            others.append(word)
            continue
        negated, key, text = match.groups()
        if negated and text is None:
            text = "False"
        elif text is None and words and not re.match(r"--?[a-zA-Z]", words[0]):
            text = words.pop(0)
        overrides.append((key, text))
    return overrides, others


def _pairs(words):
    """Returns (NAME, VALUE) of every flag among the words, with '' for a missing value."""
    pairs = []
    for word, after in zip(words, [*words[1:], "-"]):
        if word.startswith("-"):
            name, equals, text = word.lstrip("-").partition("=")
            takes_value = name in flags.FLAGS and not flags.FLAGS[name].boolean
            if takes_value and not equals and after.startswith("--"):
                raise UserError(f"--{name} has no value: write --{name}=VALUE")
            pairs.append((name, text if equals or after.startswith("-") else after))
    return pairs


def _note_repeated(pairs):
    """Returns notes on the names that have several values among (NAME, VALUE) pairs."""
    values = {}
    for name, value in pairs:
        values.setdefault(name, []).append(str(value))
    return [
        f"--{name} is given more than once, as {' and '.join(texts)}: the last counts"
        for name, texts in values.items()
        if len(set(texts)) > 1
    ]


def _check_processes():
    """Raises a UserError unless the flags of the process are all missing, or all there and consistent."""
    values = this_process()
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values) or values == {"num_processes": 1} | dict.fromkeys(missing):
        return
    if missing:
        raise UserError(
            f"--{missing[0]} is missing beside --{(values.keys() - missing).pop()}: give "
            "--coordinator_address=HOST:PORT, --num_processes=N and --process_id=I together, or none of them"
        )
    address, count, index = values.values()
    port = re.fullmatch(r"[^:/]+:(\d+)|\[[0-9a-fA-F:.]+\]:(\d+)", address)
    if not port or not 0 < int(port.group(1) or port.group(2)) < 65536:
        raise UserError(f"--coordinator_address={address}: expected HOST:PORT, as in 10.0.0.2:1234")
    if count < 1:
        raise UserError(f"--num_processes={count}: expected at least 1, as in --num_processes=2")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index}: expected 0 to {count - 1} of --num_processes={count}")
