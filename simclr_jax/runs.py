"""One run of any task in its workdir, as the command line and `simclr_jax.run` both start it."""

import importlib
import time
from contextlib import ExitStack, suppress

import jax
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simclr_jax import checkpoint, pretrained, train
from simclr_jax.config import shipped
from simclr_jax.config.saved import complete
from simclr_jax.evaluation import parts, stored
from simclr_jax.process import escape, files, group, machine, reason_of, trial
from simclr_jax.workdir import lock, records, report, trackers


def run(config, workdir, defaults: dict | None = None, **options) -> dict:
    """Runs `config.task` to its end, or continues the run in `workdir`.

    Args:
      config: checked, and complete.
      workdir: folder that keeps everything; see docs/faults.md.
      defaults: values in the file of the config, for keys that an older run in `workdir` has not saved.
      options: further arguments of the task, such as the `view` of pretraining.

    Returns:
      The summary of the task with its `seconds`, as in `WORKDIR/summary.json`. A run that is over is not
      repeated: its summary is returned.

    Raises:
      UserError: something is wrong with config, data or workdir.
    """
    workdir = epath.Path(workdir)
    machine.note_unused_accelerator()
    group.check_agreement("config", flatten_dict(config.to_dict(), sep=".") | {"workdir": str(workdir)})
    train.check_batch_size(config.batch_size, jax.device_count(), train.microbatches_of(config))
    with ExitStack() as stack:
        summary = group.run_on_first(lambda: _begin(workdir, config, defaults, stack))
        if summary:
            report.say(f"{escape(workdir)} holds a run that is over: choose another --workdir for another")
        else:
            if not trial.sees_data:
                trial.end()
            task = importlib.import_module(f"simclr_jax.tasks.{config.task}")
            begun = time.monotonic()
            try:
                summary = task.run(config, workdir, **options)
            except BaseException as error:
                with suppress(Exception):
                    if jax.process_index() == 0 and files.exists(workdir / "run.json"):  # It has begun.
                        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
                        records.note(workdir, ended="stopped by a signal" if stopped else reason_of(error))
                raise
            summary |= {"seconds": round(time.monotonic() - begun, 1)}
            if jax.process_index() == 0:
                records.save_config(workdir, config.to_dict())
                files.write_json(workdir / "summary.json", summary, indent=2)
        report.print_summary(summary, workdir)
    return summary


def load_features(workdir, path=None) -> stored.StoredFeatures:
    """Reads the features of all images of a run.

    Args:
      workdir: folder of the task embed, or of a run whose images were embedded in its folder `embed`. Where
        they were not, or by another network, at another size or from other files than now, the task embed is
        run there now; features that were there before keep a folder of their own.
      path: the folder of the images, where they have moved.

    Raises:
      UserError: it is no workdir of a run with a checkpoint.
    """
    workdir = epath.Path(workdir)
    files.check_reachable(workdir)
    config = ConfigDict(complete(records.read_config(workdir)))
    records.find_images(config, path, needed=False)
    if (workdir / stored.FILE).exists():
        if outdated := parts.changes(workdir, config):
            report.say(f"note: {escape(workdir)} holds features of {', '.join(outdated.values())}")
        return stored.read(workdir, config)
    config = shipped.base().embed(config.copy_and_resolve_references())
    if checkpoint.steps_in(workdir):  # Runs that train no network, as predict, use another run's.
        config.update(pretrained=str(workdir), use_average=False)
    pretrained.inherit_settings(config, given={})
    folder = workdir / "embed"
    if (folder / stored.FILE).exists():
        saved = ConfigDict(complete(records.read_config(folder)))
        config.dataset = saved.dataset  # The images may have been embedded from another place.
        records.find_images(config, path, needed=False)
        if outdated := parts.changes(folder, config):
            aside = files.free_path(workdir / "embed-before")
            report.say(
                f"{escape(folder)} holds features of {', '.join(outdated.values())}: the images are embedded "
                f"again, and the old features move to {escape(aside)}"
            )
            with files.storage(folder):
                folder.rename(aside)
    if not (folder / stored.FILE).exists():
        records.find_images(config)
        report.say(f"features of the images of {escape(workdir)}, kept in {escape(folder)}")
        with report.quiet():
            run(config, folder)
    return stored.read(folder, config)


def _begin(workdir, config, defaults, stack):
    """Takes the workdir for this run; returns the summary of a run that is over."""
    files.check_reachable(workdir)
    records.check_config(workdir, config.to_dict(), defaults)
    if (summary := records.read_summary(workdir)) and checkpoint.newest_is_whole(workdir):
        if outdated := parts.changes(workdir, config):
            report.say(f"note: {escape(workdir)} is of {', '.join(outdated.values())}")
        return summary
    tracker = config.tracker if "tracker" in config else ""  # Tasks that report no steps have no tracker.
    if tracker:
        trackers.check(tracker)
    if trial.active:
        lock.check_free(workdir)
    lock.prepare(workdir)
    if trial.active:
        return None
    stack.enter_context(lock.locked(workdir))
    if tracker:
        stack.enter_context(trackers.following(tracker, workdir, config.to_dict()))
    return None
