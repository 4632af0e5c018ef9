"""Makes configs: reads the file, changes keys, and checks the result.

A file is one of configs/, wherever the working directory is, or a user's own. Both import the shipped
`configs.base`.
"""

import ast
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import FrozenConfigDict

from simclr_jax.config import shipped, validation
from simclr_jax.process import UserError

_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_PARSERS = {
    int: lambda text: int(text, 0 if re.match("[+-]?0[xo]", text) else 10),
    float: float,
    bool: lambda text: _BOOLS[text.lower()],
    str: str,
    tuple: lambda text: tuple(ast.literal_eval(text)),
}


def make(file: str, overrides: Iterable[tuple[str, Any]], *, as_text: bool) -> tuple[ConfigDict, dict, list]:
    """Makes the config of a file with some of its keys changed, ready to run.

    Args:
      file: 'FILE' or 'FILE:TASK'.
      overrides: pairs of a dotted key and its new value.
      as_text: whether the values are texts of a command line, parsed by the kind of their key. 'None' unsets
        a key whose default is None; a switch without a text, None, becomes True.

    Returns:
      The config, locked; {key: value} of the changed keys; notes on settings that are odd but may be meant.

    Raises:
      UserError: something is wrong with the file, a key or a value.
    """
    config = load(file)
    validation.check_keys(config, file=file)  # before overrides, which could not find a key that it lacks
    reference = shipped.defaults_of(config.task)
    given = {}
    for key, value in overrides:
        _check_known(reference, key)
        given[key] = _parse(config, reference, key, value) if as_text else value
        section, name = validation.section_of(config, key)
        with section.ignore_type():  # a user's file may have 1 where a key takes 0.5
            section[name] = given[key]
    notes = _settle_length(config, file, given)
    notes += validation.check(config, file=file, given=given)
    if config.pretrained:
        config.pretrained = os.path.expanduser(config.pretrained)
    return config.lock(), given, notes


def defaults(file: str) -> ConfigDict:
    """Returns the config as its file has it, with None for keys that are required and not set."""
    return ConfigDict(unflatten_dict(validation.flatten(load(file), strict=False), sep="."))


def load(file: str) -> ConfigDict:
    """Returns the config that `get_config` of a config file returns; `file` is 'FILE' or 'FILE:TASK'.

    Raises:
      UserError: it is no config file, or something in it fails; the message has the line.
    """
    path, colon, task = file.partition(":")
    path = _locate(path)
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "does not exist" if missing else f"cannot be read ({error.strerror})"
        raise UserError(f"--config={file} {reason}: give a file of configs/, as configs/digits.py") from None
    module = types.ModuleType("config_file")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        with shipped.importable():
            exec(compile(text, path, "exec"), module.__dict__)
            get_config = getattr(module, "get_config", None)
            if not callable(get_config):
                raise UserError(f"{path} has no get_config: define get_config(), as configs/digits.py does")
            config = get_config(*_arguments(get_config, file, [task] if colon else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if task and isinstance(error, ValueError) and f"'{task}'" in str(error):  # raised by base.task_config
            raise UserError(f"--config={file}: {one_line(error)}") from None
        raise UserError(f"{_explain(error, path)}; mend the config") from None
    if not isinstance(config, ConfigDict):
        kind = "None" if config is None else f"a {type(config).__name__}"
        raise UserError(f"get_config of {path} returned {kind}: end it with 'return config', a ConfigDict")
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
    """Returns 'FILE:LINE: KIND: MESSAGE' for an exception of a config file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    place = f"{path}:{lines[-1]}" if lines else path
    if isinstance(error, SyntaxError) and error.filename:  # perhaps that of a file that it imports
        place, error = f"{error.filename}:{error.lineno}", type(error)(error.msg)
    message = error  # ConfigDict wraps a KeyError, which shows its message in quotes
    while isinstance(message, AttributeError | KeyError) and message.args:
        message = message.args[0]
    return f"{place}: {type(error).__name__}: {one_line(message)}"


def one_line(error) -> str:
    """Returns the message of an exception as one line."""
    return " ".join(str(error).split())[:300]


def _locate(path):
    """Returns the path of a config file; a missing 'configs/NAME.py' gives the shipped one of that name."""
    file = shipped.FOLDER / Path(path).name
    is_shipped = os.path.normpath(path) == os.path.join("configs", file.name)
    return str(file) if is_shipped and not os.path.exists(path) and file.exists() else path


def _parse(config, reference, key, text):
    """Returns the value that a text of the command line gives to a key, or raises a UserError."""
    section, name = validation.section_of(reference, key)
    default, kind = section[name], section.get_type(name)
    description, example = validation.expected(key, kind)
    current = validation.flatten(config, strict=False)[key]
    example = f"--config.{key}={example if current is None else current}"
    text = "True" if text is None and kind is bool else text
    if text is None or (text == "" and "" not in shipped.base().CHOICES.get(key, ())):
        raise UserError(f"--config.{key} has no value: expected {description}, as in {example}")
    try:
        return None if text == "None" and default is None else _PARSERS[kind](text)
    except (ValueError, KeyError, TypeError, SyntaxError):  # the last two from tuples
        raise UserError(f"--config.{key}={text}: expected {description}, as in {example}") from None


def _check_known(reference, key):
    """Raises a UserError unless the reference has a key of this dotted name."""
    names = [f"config.{name}" for name in validation.flatten(reference, strict=False)]
    if f"config.{key}" not in names:
        inner = [name for name in names if name.startswith(f"config.{key}.")]
        if inner:
            raise UserError(f"--config.{key} is a section: set its keys one by one, as in --{inner[0]}=VALUE")
        raise UserError(unknown(f"config.{key}", names))


def unknown(flag: str, names: Iterable[str]) -> str:
    """Returns the message that there is no such flag; it names the flag that was probably meant."""
    near = validation.nearest(flag, names)
    hint = f"did you mean --{near}?" if near else "configs/base.py lists the keys, --help the flags"
    return f"--{flag} is unknown: {hint}"


def _settle_length(config, file, given):
    """Lets a num_epochs that the user gave win over a num_steps of the file; returns a note about it."""
    if given.get("num_epochs") is None or config.num_steps is None:
        return []
    if "num_steps" in given:
        raise UserError(
            f"--config.num_epochs={given['num_epochs']} and --config.num_steps={given['num_steps']} both "
            "say how long to train: give one of them"
        )
    steps, config.num_steps = config.num_steps, None
    return [f"--config.num_epochs={given['num_epochs']} replaces num_steps={steps} of {file}"]
