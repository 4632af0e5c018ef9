"""The implementation of `simclr_jax.get_config` and `simclr_jax.run`, imported when they are called."""

import math
import os
from contextlib import nullcontext

import jax
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import pretrained, runs
from simclr_jax.config import settings, shipped, validation
from simclr_jax.process import UserError, errors, say_once, stopping
from simclr_jax.workdir import report


@errors.naming_python_keys()
def get_config(name: str | os.PathLike, overrides: dict) -> ConfigDict:
    """See `simclr_jax.get_config`."""
    stem, colon, task = os.fspath(name).partition(":")
    names = shipped.files()
    if stem in names:
        stem = os.path.join("configs", f"{stem}.py")
    elif not stem.endswith(".py"):
        near = validation.nearest(stem, names)
        hint = f"did you mean {near!r}?" if near else "or a path, as in 'own.py'"
        raise UserError(f"get_config({name!r}): expected one of {', '.join(names)}; {hint}")
    config, given, notes = settings.make(stem + colon + task, overrides.items(), as_text=False)
    for note in notes:
        say_once(f"note: {note}")
    with config.unlocked():
        pretrained.inherit_settings(config, given)
    return config


@errors.naming_python_keys()
def run(config: ConfigDict, workdir, on_report=None, train=None, held_out=None, view=None) -> dict | None:
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
            dataset = shipped.defaults_of(config.task).dataset
            kept = {key: config.dataset[key] for key in ("num_examples", "on_device") if key in dataset}
            dataset.update(name="arrays", path=digest, **kept)
            config.dataset = dataset
            return run(config, workdir, on_report, view=view)
    if held_out is not None:
        raise UserError("run() got held_out without train: give both, or neither")
    if view is not None:
        _check_view(view, config)
    given = {key: value for key, value in validation.flatten(config).items() if value is not None}
    for note in validation.check(config, file="the config"):
        say_once(f"note: {note}")
    listening = report.listening(_mark_errors(on_report)) if on_report else nullcontext()
    try:
        outside = errors.outside_errors_as_run_errors("config.")
        with outside, stopping.handled(ends_process=False), listening:
            pretrained.inherit_settings(config, given)
            defaults = shipped.defaults_of(config.task).to_dict()
            options = {} if view is None else {"view": view}
            from simclr_jax.data import eager_execution

            with eager_execution():
                return runs.run(config, epath.Path(os.path.expanduser(workdir)), defaults, **options)
    except _CallbackError as error:
        raise (error.__cause__ or error) from None
    except stopping.Stopped:
        return None
    except KeyboardInterrupt:
        if jax.process_count() > 1:  # the other processes would wait for this one
            raise
        return None


def _check_view(view, config):
    if not callable(view):
        raise UserError(f"run() got view={view!r}: expected a function of an image and a seed")
    if config.task != "pretrain":
        raise UserError(f"run() got a view for the task {config.task}: only pretrain makes such views")
    for section in ("augment", "dataset"):
        if config[section].on_device:
            raise UserError(
                f"run() got a view with {section}.on_device=True, which makes the recipe's views on the "
                f"devices: set {section}.on_device to False"
            )


class _CallbackError(Exception):
    """`on_report` raised the cause of this exception, which has no message that might look like storage's."""


def _mark_errors(on_report):
    def call(_, step, metrics):
        try:
            on_report(step, {"loss": math.nan} | metrics)  # Step 0 has none.
        except Exception as error:
            raise _CallbackError from error

    return call
