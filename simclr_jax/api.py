"""What stands behind `simclr_jax.get_config` and `simclr_jax.run`."""

import os
from contextlib import nullcontext

import jax
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import pretrained, runs
from simclr_jax.config import settings, shipped, validation
from simclr_jax.process import errors, stopping
from simclr_jax.process.console import say_once
from simclr_jax.process.errors import UserError
from simclr_jax.workdir import report


def get_config(name: str, overrides: dict) -> ConfigDict:
    """See `simclr_jax.get_config`."""
    stem, colon, task = os.fspath(name).partition(":")
    known = shipped.files()
    if stem in known:
        stem = os.path.join("configs", f"{stem}.py")
    elif not stem.endswith(".py"):
        near = validation.nearest(stem, known)
        hint = f"did you mean {near!r}?" if near else "or a path, as in 'own.py'"
        raise UserError(f"get_config({name!r}): expected one of {', '.join(known)}; {hint}")
    config, given, notes = settings.make(stem + colon + task, overrides.items(), as_text=False)
    for note in notes:
        say_once(f"note: {note}")
    with config.unlocked():
        pretrained.inherit_settings(config, given)
    return config


def run(config: ConfigDict, workdir, on_report=None, train=None, held_out=None) -> dict | None:
    """See `simclr_jax.run`."""
    if not isinstance(config, ConfigDict):
        raise UserError(f"run() got a config of type {type(config).__name__}: expected that of get_config()")
    validation.check_keys(config, file="the config")
    if not isinstance(workdir, str | os.PathLike):
        raise UserError(f"run() got the workdir {workdir!r}: expected a folder, as in 'runs/digits'")
    validation.check_place("workdir", os.fspath(workdir))
    config = config.copy_and_resolve_references()
    if train is not None:
        from simclr_jax.data.sources import arrays

        with arrays.given(train, held_out) as digest:
            config.dataset = _of_arrays(config.task, digest, config.dataset.num_examples)
            return run(config, workdir, on_report)
    if held_out is not None:
        raise UserError("run() got held_out without train: give both, or neither")
    keys = validation.flatten(config)
    for note in validation.check(config, file="the config"):
        say_once(f"note: {note}")
    listening = report.listening(_told_apart(on_report)) if on_report else nullcontext()
    try:
        with errors.storage_errors_as_run_errors(), stopping.handled(ends=False), listening:
            pretrained.inherit_settings(
                config, {key: value for key, value in keys.items() if value is not None}
            )
            defaults = shipped.defaults_of(config.task).to_dict()
            return runs.run(config, epath.Path(os.path.expanduser(workdir)), defaults)
    except _OfCallback as error:
        raise error.raised from None
    except stopping.Stopped:
        return None
    except KeyboardInterrupt:
        if jax.process_count() > 1:  # the others would wait
            raise
        return None


def _of_arrays(task, digest, num_examples):
    """`config.dataset` of examples in memory, which it tells from others."""
    section = shipped.defaults_of(task).dataset
    section.update(name="arrays", path=digest, num_examples=num_examples)
    return section


class _OfCallback(Exception):
    """Holds what `on_report` raised, which is none of ours."""

    def __init__(self, raised: Exception):
        self.raised = raised


def _told_apart(on_report):
    def call(_, step, metrics):
        try:
            on_report(step, metrics)
        except Exception as error:
            raise _OfCallback(error) from error

    return call
