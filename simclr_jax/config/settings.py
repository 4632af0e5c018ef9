"""A config: what its file gives, changed key by key, and checked.

The files are those of configs/, wherever the working directory is, or anybody's own; they import
`configs.base`, which is this repository's.
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

from ml_collections import ConfigDict
from ml_collections.config_dict import FrozenConfigDict, RequiredValueError

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
    """The config of a file with some of its keys changed, ready to run.

    Args:
      file: 'FILE' or 'FILE:TASK'.
      overrides: (dotted key, value) of what to change.
      as_text: the values are texts, as of a command line; see `override`.

    Returns:
      The config, locked; {key: value} of what was changed; what is odd but can be meant, a sentence each.

    Raises:
      UserError: something is wrong with the file, a key or a value.
    """
    config = load(file)
    validation.check_keys(config, file=file)  # what it lacks, overrides could not find
    reference = validation.reference_of(config.task) or config
    given = {
        key: (override if as_text else assign)(config, reference, key, value) for key, value in overrides
    }
    notes = _settle_length(config, file, given)
    notes += validation.check(config, file=file, given=given)
    if config.pretrained:
        config.pretrained = os.path.expanduser(config.pretrained)
    return config.lock(), given, notes


def defaults(file: str) -> ConfigDict:
    """The config as its file has it; None where it has no value."""
    config = load(file)
    for key in validation.flatten(config, strict=False):
        section, name = validation.section_of(config, key)
        try:
            section[name]
        except RequiredValueError:
            del section[name]
            section[name] = None
    return config


def load(file: str) -> ConfigDict:
    """What `get_config` of a config file returns; `file` is 'FILE' or 'FILE:TASK'.

    Raises:
      UserError: it is no config file, or something in it goes wrong: with the line where it does.
    """
    path, colon, task = file.partition(":")
    path = _found(path)
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
        with shipped.importable():
            exec(compile(text, path, "exec"), module.__dict__)
            get_config = getattr(module, "get_config", None)
            if not callable(get_config):
                raise UserError(f"{path} has no get_config: define get_config(), as configs/digits.py does")
            config = get_config(*_arguments(get_config, file, [task] if colon else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if task and isinstance(error, ValueError) and f"'{task}'" in str(error):  # as base.task_config tells
            raise UserError(f"--config={file}: {one_line(error)}") from None
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
    return f"{place}: {type(error).__name__}: {one_line(said)}"


def one_line(error) -> str:
    """What an exception says."""
    return " ".join(str(error).split())[:300]


def _found(path):
    """The path of a config file: here, or where the shipped ones are."""
    file = shipped.FOLDER / Path(path).name
    meant = os.path.normpath(path) == os.path.join("configs", file.name)
    return str(file) if meant and not os.path.exists(path) and file.exists() else path


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
    _check_known(reference, key)
    section, name = validation.section_of(reference, key)
    default, kind = section[name], section.get_type(name)
    called, example = validation.expected(key, kind)
    ours = validation.flatten(config, strict=False)[key]
    example = f"--config.{key}={example if ours is None else ours}"
    text = "True" if text is None and kind is bool else text
    if text is None or (text == "" and "" not in validation.CHOICES.get(key, ())):
        raise UserError(f"--config.{key} has no value: expected {called}, as in {example}")
    try:
        value = None if text == "None" and default is None else _PARSERS[kind](text)
    except (ValueError, KeyError, TypeError, SyntaxError):  # the last two of pairs
        raise UserError(f"--config.{key}={text}: expected {called}, as in {example}") from None
    return _set(config, key, value)


def assign(config: ConfigDict, reference: ConfigDict, key: str, value):
    """Sets a dotted key of a config to a value, which `validation.check` has yet to see; returns it.

    Raises:
      UserError: there is no such key.
    """
    _check_known(reference, key)
    return _set(config, key, value)


def _set(config, key, value):
    section, name = validation.section_of(config, key)
    with section.ignore_type():  # an own file may have 1 where 0.5 is meant to fit
        section[name] = value
    return value


def _check_known(reference, key):
    known = [f"config.{known}" for known in validation.flatten(reference, strict=False)]
    if f"config.{key}" not in known:
        inner = [name for name in known if name.startswith(f"config.{key}.")]
        if inner:
            raise UserError(f"--config.{key} is a section: set its keys one by one, as in --{inner[0]}=VALUE")
        raise UserError(unknown(f"config.{key}", known))


def unknown(flag: str, known: Iterable[str]) -> str:
    """That there is no such flag, and which one of the known was probably meant."""
    near = validation.nearest(flag, known)
    hint = f"did you mean --{near}?" if near else "configs/base.py lists the keys, --help the flags"
    return f"--{flag} is unknown: {hint}"


def _settle_length(config, file, given):
    """Lets a num_epochs that the user gave win over a num_steps of the file."""
    if given.get("num_epochs") is None or config.num_steps is None:
        return []
    if "num_steps" in given:
        raise UserError(
            f"--config.num_epochs={given['num_epochs']} and --config.num_steps={given['num_steps']} both "
            "say how long to train: give one of them"
        )
    steps, config.num_steps = config.num_steps, None
    return [f"--config.num_epochs={given['num_epochs']} replaces num_steps={steps} of {file}"]
