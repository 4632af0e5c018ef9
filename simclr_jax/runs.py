"""One run of any task in its workdir, as the command line and `simclr_jax.run` both start it."""

import importlib
from contextlib import ExitStack
from functools import partial

import jax
from flax.traverse_util import flatten_dict

from simclr_jax import checkpoint, train
from simclr_jax.plots import board
from simclr_jax.process import files, group
from simclr_jax.process.console import escape
from simclr_jax.workdir import lock, records, report, trackers


def run(config, workdir, defaults: dict | None = None) -> dict:
    """Runs `config.task` to its end, or goes on with what is in `workdir`; says what it found.

    Args:
      config: checked, and complete.
      workdir: where everything is kept; see docs/faults.md.
      defaults: of the file that the config is from, for keys that an older run in `workdir` has not saved.

    Returns:
      The summary of the task, as `WORKDIR/summary.json` holds it too; of a run that is over, without
      repeating it.

    Raises:
      UserError: something is wrong with config, data or workdir.
    """
    group.check_agreement("config", flatten_dict(config.to_dict(), sep=".") | {"workdir": str(workdir)})
    train.check_batch_size(config.batch_size, jax.device_count())
    with ExitStack() as stack:
        summary = group.run_on_first(lambda: _begin(workdir, config, defaults, stack))
        begun = not summary
        if summary:
            report.say(f"{escape(workdir)} holds a run that is over: choose another --workdir for another")
        else:
            task = importlib.import_module(f"simclr_jax.tasks.{config.task}")
            with report.listening(partial(_at_start, config)):
                summary = task.run(config, workdir)
            if jax.process_index() == 0:
                records.save_config(workdir, config.to_dict())
                files.write_json(workdir / "summary.json", summary, indent=2)
        report.print_summary(summary, workdir)
        if begun and _draws(config) and jax.process_index() == 0:
            board.end(config, workdir, summary["steps"])
    return summary


def _at_start(config, workdir, step, _):
    """Pictures of what is seen, with what is measured before the first step."""
    if step == 0 and _draws(config):
        board.begin(config, workdir)


def _draws(config):
    """Whether TensorBoard gets pictures; tasks without views and a map lack the key."""
    return "evaluate" in config and "pictures" in config.evaluate and config.evaluate.pictures


def _begin(workdir, config, defaults, stack):
    """Takes the workdir for this run; returns the summary of one that is over."""
    files.check_reachable(workdir)
    records.check_config(workdir, config.to_dict(), defaults)
    if (summary := records.read_summary(workdir)) and checkpoint.newest_is_whole(workdir):
        return summary
    tracker = config.tracker if "tracker" in config else ""  # tasks that report no lines have none
    if tracker:
        trackers.check(tracker)
    lock.prepare(workdir)
    stack.enter_context(lock.locked(workdir))
    if tracker:
        stack.enter_context(trackers.following(tracker, workdir, config.to_dict()))
    return None
