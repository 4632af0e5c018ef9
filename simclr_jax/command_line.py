"""What the command line says: `--config=FILE:TASK`, `--config.KEY=VALUE` and the flags of the process.

All of it is checked before anything begins; whatever is wrong with it is one line.
"""

import ast
import inspect
import os
import re
import sys
import traceback
import types

from absl import flags
from etils import epath
from ml_collections import ConfigDict
from ml_collections.config_dict import FrozenConfigDict, RequiredValueError

from simclr_jax import metrics, validation
from simclr_jax.errors import UserError

_CONFIG = flags.DEFINE_string(
    "config", None, "File of configs/, as in configs/digits.py:pretrain; --config.KEY=VALUE sets its keys."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where neither Cloud TPU nor Slurm tells it."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the run; needs coordinator_address."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0; needs coordinator_address.")
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "Seconds in which all processes of the run have to be there.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Local or gs:// folder of the run; default: runs/DATASET/TASK."
)


_PARSERS = {
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    bool: flags.BooleanParser().parse,
    str: str,
    tuple: lambda text: tuple(ast.literal_eval(text)),
}
_parsed = {}  # by `parse`: 'config', 'given' and 'notes', as absl keeps the other flags


def processes() -> dict[str, str | int | None]:
    """Which process this is and of how many, as `processes.join` takes it."""
    return {
        "coordinator_address": _COORDINATOR.value,
        "num_processes": _NUM_PROCESSES.value,
        "process_id": _PROCESS_ID.value,
    }


def join_timeout() -> int:
    """Seconds in which all processes have to be there."""
    return _JOIN_TIMEOUT.value


def workdir(config) -> epath.Path:
    """The folder of the run."""
    variant = _CONFIG.value.partition(":")[2] or config.task
    place = _WORKDIR.value or f"runs/{config.dataset.name.replace('/', '-')}/{variant}"
    return epath.Path(os.path.expanduser(place))  # shells leave the ~ of --workdir=~/run alone


def given() -> dict[str, object]:
    """The keys that the user gave as `--config.KEY=VALUE`, dotted, with their values."""
    return dict(_parsed["given"])


def defaults() -> ConfigDict:
    """The config as its file has it, without what the command line changes; None where it has to."""
    config = load(_CONFIG.value)
    for key in validation.flatten(config, strict=False):
        section, name = validation.section_of(config, key)
        try:
            section[name]
        except RequiredValueError:
            del section[name]
            section[name] = None
    return config


def read_config() -> ConfigDict:
    """The config of the command line; says what is odd about it."""
    for note in _parsed["notes"]:
        metrics.say(f"note: {note}")
    return _parsed["config"]


def parse(argv: list[str]) -> list[str]:
    """Parses the command line and checks the config; for `absl.app.run`.

    Raises:
      UserError: something is wrong with either.
    """
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # which --help shows of every command
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    try:
        words = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=True)
        overrides, rest = _split(words)
        pairs = _pairs(rest)
        left = flags.FLAGS([argv[0], *rest])
    except UserError:
        raise
    except flags.UnrecognizedFlagError as error:
        names = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(argv[0])]
        keys = [f"config.{key}" for key in validation.flatten(validation.reference_of("pretrain"))]
        raise UserError(_unknown(error.flagname, names + keys)) from None
    except flags.IllegalFlagValueError as error:
        name = re.match(r"flag --(\w+)", str(error)).group(1)
        kinds = {"int": int, "float": float, "bool": bool}
        kind = kinds.get(flags.FLAGS[name].flag_type())
        if kind is None:  # words that absl alone knows, as of --stderrthreshold
            raise UserError(f"{_one_line(error)}: see --helpfull") from None
        expected, example = validation.KINDS[kind]
        raise UserError(
            f"--{name}={dict(pairs)[name]}: expected {expected}, as in --{name}={example}"
        ) from None
    except (flags.Error, ValueError) as error:
        raise UserError(f"{_one_line(error)}: write --NAME=VALUE, see --help") from None
    if len(left) > 1:
        raise UserError(f"'{left[1]}' is not a flag: write --config.KEY=VALUE")
    if not _CONFIG.value:
        raise UserError("--config is missing: give a file of configs/, as in --config=configs/digits.py")
    if _WORKDIR.value is not None:
        validation.check_place("workdir", _WORKDIR.value)
    _check_processes()

    config = load(_CONFIG.value)
    validation.check_keys(config, file=_CONFIG.value)  # what it lacks, overrides could not find
    reference = validation.reference_of(config.task) or config
    values = {key: override(config, reference, key, text) for key, text in overrides}
    notes = [
        f"--{name} is given more than once, as {' and '.join(texts)}: the last counts"
        for name, texts in _repeated([(f"config.{key}", text) for key, text in overrides] + pairs)
    ]
    notes += _settle_length(config, values)
    notes += validation.check(config, file=_CONFIG.value, given=values)
    if config.pretrained:
        config.pretrained = os.path.expanduser(config.pretrained)
    _parsed.update(config=config.lock(), given=values, notes=notes)
    return left


def _split(words):
    """(KEY, VALUE) of every --config.KEY=VALUE or --config.KEY VALUE, VALUE None where missing; the rest."""
    overrides, rest, words = [], [], list(words)
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL)
        if not match:
            rest.append(word)
            continue
        negated, key, text = match.groups()
        if negated and text is None:
            text = "False"
        elif text is None and words and not re.match(r"--?[a-zA-Z]", words[0]):
            text = words.pop(0)
        overrides.append((key, text))
    return overrides, rest


def _pairs(words):
    """(NAME, VALUE) of every flag among the words, VALUE '' where there is none."""
    pairs = []
    for word, after in zip(words, [*words[1:], "-"]):
        if word.startswith("-"):
            name, equals, text = word.lstrip("-").partition("=")
            takes_value = name in flags.FLAGS and not flags.FLAGS[name].boolean
            if takes_value and not equals and after.startswith("--"):
                raise UserError(f"--{name} has no value: write --{name}=VALUE")
            pairs.append((name, text if equals or after.startswith("-") else after))
    return pairs


def _repeated(pairs):
    texts = {}
    for name, text in pairs:
        texts.setdefault(name, []).append(str(text))
    return [(name, found) for name, found in texts.items() if len(set(found)) > 1]


def _settle_length(config, values):
    """Lets a num_epochs that the user gave win over a num_steps of the file."""
    if values.get("num_epochs") is None or config.num_steps is None:
        return []
    if "num_steps" in values:
        raise UserError(
            f"--config.num_epochs={values['num_epochs']} and --config.num_steps={values['num_steps']} both "
            "say how long to train: give one of them"
        )
    steps, config.num_steps = config.num_steps, None
    return [f"--config.num_epochs={values['num_epochs']} replaces num_steps={steps} of {_CONFIG.value}"]


def _check_processes():
    """Raises a UserError unless this process is one of those that there are."""
    told = processes()
    missing = [name for name, value in told.items() if value is None]
    if len(missing) == len(told):
        return
    if missing:
        raise UserError(
            f"--{missing[0]} is missing beside --{(told.keys() - missing).pop()}: give "
            "--coordinator_address=HOST:PORT, --num_processes=N and --process_id=I together, or none of them"
        )
    address, count, index = told.values()
    port = re.fullmatch(r"[^:/]+:(\d+)|\[[0-9a-fA-F:.]+\]:(\d+)", address)
    if not port or not 0 < int(port.group(1) or port.group(2)) < 65536:
        raise UserError(
            f"--coordinator_address={address}: expected HOST:PORT, as in --coordinator_address=10.0.0.2:1234"
        )
    if count < 1:
        raise UserError(f"--num_processes={count}: expected at least 1, as in --num_processes=2")
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index}: expected 0 to {count - 1}, since --num_processes={count} counts from 0"
        )


def load(file: str) -> ConfigDict:
    """What `get_config` of a config file returns; `file` is 'FILE' or 'FILE:TASK'.

    Raises:
      UserError: it is no config file, or something in it goes wrong: with the line where it does.
    """
    path, colon, task = file.partition(":")
    try:
        with open(path, "rb") as source:
            text = source.read()
    except FileNotFoundError:
        raise UserError(
            f"--config={file} does not exist: give a file of configs/, as in --config=configs/digits.py"
        ) from None
    except OSError as error:  # a folder, say
        raise UserError(
            f"--config={file} cannot be read ({error.strerror}): give a file of configs/, as in "
            "--config=configs/digits.py"
        ) from None
    module = types.ModuleType("config_file")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses look for their module
    try:
        exec(compile(text, path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"{path} has no get_config: define get_config(), as configs/digits.py does")
        config = get_config(*_arguments(get_config, file, [task] if colon else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if task and isinstance(error, ValueError) and f"'{task}'" in str(error):  # as base.task_config tells
            raise UserError(f"--config={file}: {_one_line(error)}") from None
        raise UserError(f"{_explain(error, path)}; mend the config") from None
    if not isinstance(config, ConfigDict):
        found = "None" if config is None else f"a {type(config).__name__}"
        raise UserError(
            f"get_config of {path} returned {found}: end it with 'return config', a ConfigDict, as "
            "configs/digits.py does"
        )
    return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config


def _arguments(get_config, file, arguments):
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        takes = (
            f"no task: leave ':{arguments[0]}' away" if arguments else f"a task: write --config={file}:TASK"
        )
        raise UserError(f"--config={file}: its get_config takes {takes}") from None
    return arguments


def _explain(error, path):
    """'FILE:LINE: KIND: what it says' of an exception of a config file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    place = f"{path}:{lines[-1]}" if lines else path
    if isinstance(error, SyntaxError) and error.filename:  # maybe of a file that it imports
        place, error = f"{error.filename}:{error.lineno}", type(error)(error.msg)
    said = error  # ConfigDict wraps a KeyError, which shows its message in quotes
    while isinstance(said, AttributeError | KeyError) and said.args:
        said = said.args[0]
    return f"{place}: {type(error).__name__}: {_one_line(said)}"


def _one_line(error):
    return " ".join(str(error).split())[:300]


def override(config: ConfigDict, reference: ConfigDict, key: str, text: str | None):
    """Sets a dotted key of a config to what a text says, and returns that.

    Args:
      config: is changed.
      reference: has the same keys; tells their kinds, and by a None what 'None' unsets.
      key: 'a.b'.
      text: None where the command line has no value, which makes a True of what is True or False.

    Raises:
      UserError: there is no such key, or the text is none of its kind.
    """
    known = [f"config.{known}" for known in validation.flatten(reference, strict=False)]
    if f"config.{key}" not in known:
        inner = [name for name in known if name.startswith(f"config.{key}.")]
        if inner:
            raise UserError(f"--config.{key} is a section: set its keys one by one, as in --{inner[0]}=VALUE")
        raise UserError(_unknown(f"config.{key}", known))
    section, name = validation.section_of(reference, key)
    default, kind = section[name], section.get_type(name)
    called, example = validation.KINDS[kind]
    ours = validation.flatten(config, strict=False)[key]
    example = f"--config.{key}={example if ours is None else ours}"
    text = "True" if text is None and kind is bool else text
    if not text:
        raise UserError(f"--config.{key} has no value: expected {called}, as in {example}")
    try:
        value = None if text == "None" and default is None else _PARSERS[kind](text)
    except (ValueError, TypeError, SyntaxError):  # the last two of pairs
        raise UserError(f"--config.{key}={text}: expected {called}, as in {example}") from None
    section, name = validation.section_of(config, key)
    with section.ignore_type():  # an own file may have 1 where 0.5 is meant to fit
        section[name] = value
    return value


def _unknown(flag, known):
    near = validation.nearest(flag, known)
    hint = f"did you mean --{near}?" if near else "configs/base.py lists the keys, --help the flags"
    return f"--{flag} is unknown: {hint}"
