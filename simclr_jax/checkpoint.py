"""Checkpoints in Orbax's format: `WORKDIR/checkpoints/<step>`, written in the background, atomically.

Each holds `state`, the whole train state, and `meta`, a JSON object with the resolved config and the
number of classes, from which the model can be rebuilt. One that is damaged is moved to `WORKDIR/damaged`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from simclr_jax import parallel
from simclr_jax.process import RunError, UserError, escape, files, reason_of, say
from simclr_jax.workdir import records


def open_manager(path, *, keep: int, best: str | None = None) -> ocp.CheckpointManager:
    """Opens a workdir for `save` and `restore`; close it to wait for the last save.

    Args:
      path: local or gs:// workdir.
      keep: number of newest checkpoints to keep.
      best: name of the metric whose highest value marks one more checkpoint to keep.
    """
    score = itemgetter(best) if best else None
    policies = [LatestN(keep)]
    if best:
        policies.append(BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        best_fn=score,
        cleanup_tmp_directories=True,
    )
    folder = _folder(path)
    _set_aside(folder, {step: reason for step in steps_in(path) if (reason := _damage(folder / str(step)))})
    with files.storage(folder):
        manager = ocp.CheckpointManager(folder, options=options)
    delete = manager._checkpoint_deleter.delete

    def delete_or_note(step):
        try:
            delete(step)
        except Exception as error:  # another owner's files, or some that NFS keeps while they are open
            if not (folder / str(step)).exists():
                raise
            _note_unremovable(folder / str(step), error)

    manager._checkpoint_deleter.delete = delete_or_note
    return manager


def _note_unremovable(saved, error):
    place = escape(files.user_path(saved))
    say(f"note: {place} cannot be removed ({reason_of(error)}): the run goes on; remove it yourself")


@contextmanager
def opened(path, **options) -> Iterator[ocp.CheckpointManager]:
    """Opens a manager and closes it at the end, unless storage failed: it would wait for saves forever."""
    manager = open_manager(path, **options)
    try:
        yield manager
    except RunError:
        raise
    except BaseException:
        with suppress(Exception):
            manager.close()
        raise
    with files.storage(path):
        manager.close()
        manager.check_for_errors()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float] | None = None,
) -> None:
    """Saves the train state after `step` steps; returns as soon as the device memory may be reused.

    Args:
      manager: from `open_manager`.
      step: number of steps behind `state`.
      state: the train state, equal on all devices.
      meta: values that JSON can hold: the config and the number of classes, see above.
      metrics: results of the evaluation at this step; they decide which checkpoint is the best.

    Raises:
      StorageError: it cannot be written.
    """
    if step in manager.all_steps():
        return
    if jax.process_count() > 1:  # pmap returns arrays of this process's devices
        state = jax.tree.map(ocp.utils.fully_replicated_host_local_array_to_global_array, state)
    meta = {"schema_version": records.SCHEMA_VERSION, **meta}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with files.storage(manager.directory / str(step)):
        manager.save(step, args=items, metrics=metrics or None)


def check(manager: ocp.CheckpointManager) -> None:
    """Raises a StorageError if a save in the background has failed; does not wait for those under way."""
    with files.storage(manager.directory):
        manager.check_for_errors()


def restore(manager: ocp.CheckpointManager, state: dict[str, Any]) -> dict[str, Any]:
    """Reads the newest whole train state, laid out over devices like `state`; `state` if there is none.

    Newer checkpoints that are damaged are moved to `WORKDIR/damaged`, and a line says so.

    Raises:
      UserError: every checkpoint is damaged.
    """
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
            saved, reason = _read_tree(manager.directory / str(step) / "state", target), None
        except Exception as error:
            _raise_unless_damage(error, manager.directory / str(step))
            saved, reason = None, reason_of(error)
        if not parallel.gather(np.array([reason is not None])).any():  # processes agree on the step
            _set_aside(manager.directory, damaged)
            if damaged:
                manager.reload()
            return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), saved, state)
        damaged[step] = reason or "another process cannot read it"
    _set_aside(manager.directory, damaged)
    return state


def newest_is_whole(path) -> bool:
    """Returns whether the newest checkpoint of a workdir can be read to its end; True if there is none."""
    steps = steps_in(path)
    if not steps:
        return True
    saved = _folder(path) / str(steps[-1])
    try:
        return not _damage(saved) and bool(_read_tree(saved / "state", _saved_structure(saved)))
    except Exception as error:
        _raise_unless_damage(error, saved)
        return False


def steps_in(path) -> list[int]:
    """Returns the steps of the checkpoints in a workdir, sorted; some checkpoints may be damaged."""
    folder = epath.Path(path) / "checkpoints"
    with files.storage(folder):
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _folder(path):
    """Returns the folder of the checkpoints in a workdir, under a name that Orbax takes."""
    return files.portable_path(epath.Path(path).absolute()) / "checkpoints"


def _saved_structure(saved):
    """Returns shapes and dtypes of all arrays in a checkpoint, as nested dicts."""
    tree = ocp.PyTreeCheckpointHandler().metadata(saved / "state").tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _read_tree(path, target, **options):
    """Reads a checkpoint as numpy arrays in the structure of `target`, without the other processes."""
    arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), target)
    arguments = ocp.args.PyTreeRestore(item=target, restore_args=arguments, **options)
    tree = ocp.PyTreeCheckpointHandler().restore(path, args=arguments)
    for expected, leaf in zip(jax.tree.leaves(target), jax.tree.leaves(tree), strict=True):
        if expected.shape != leaf.shape or expected.dtype != leaf.dtype:
            raise ValueError(f"an array is {leaf.dtype}{leaf.shape}, not {expected.dtype}{expected.shape}")
    return tree


def _read_meta(saved) -> dict[str, Any]:
    return records.without_schema(files.user_path(saved), files.read_json(saved / "meta" / "metadata"))


def _damage(saved) -> str | None:
    """Looks for damage in the small files of a checkpoint; returns a description of it, or None."""
    try:
        if not saved.is_dir():
            return "it is no folder"
        if not (saved / "state" / "_METADATA").exists():
            return "it has no state, or not all of it"
        _read_meta(saved)
        if (saved / "metrics").exists():
            files.read_json(saved / "metrics" / "metrics")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):  # a later version has written it
            raise
        _raise_unless_damage(error, saved)
        return reason_of(error)
    return None


def _raise_unless_damage(error, path):
    """Raises a StorageError where permissions, memory or the network are to blame, not the checkpoint."""
    names = ("PERMISSION_DENIED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")
    if isinstance(error, PermissionError | MemoryError) or any(name in str(error) for name in names):
        raise files.StorageError(
            f"{escape(files.user_path(path))} cannot be read: {reason_of(error)}; mend that first"
        ) from error


def _set_aside(folder, damaged: dict[int, str]) -> None:
    """Moves damaged checkpoints to `WORKDIR/damaged`.

    Args:
      folder: the folder of the checkpoints.
      damaged: step -> what is wrong with its checkpoint.

    Raises:
      UserError: all checkpoints are damaged; nothing is moved.
    """
    if not damaged:
        return
    run = folder.parent
    kept = [step for step in steps_in(run) if step not in damaged]
    if not kept:
        reasons = ", ".join(f"{step} ({reason})" for step, reason in sorted(damaged.items()))
        raise UserError(
            f"every checkpoint in {escape(files.user_path(folder))} is damaged: {escape(reasons)}; put a "
            "whole copy of one back, or start again with another --workdir"
        )
    parallel.gather(np.zeros(1))  # waits until every process has looked at the checkpoints
    if jax.process_index() == 0:
        with files.storage(run):
            (run / "damaged").mkdir(exist_ok=True)
            for step, reason in sorted(damaged.items()):
                aside = files.free_path(run / "damaged" / str(step))
                try:
                    (folder / str(step)).rename(aside)
                except OSError as error:
                    if step > max(kept):
                        raise
                    _note_unremovable(folder / str(step), error)
                    continue
                place = escape(files.user_path(aside))
                print(f"checkpoint {step} is damaged ({escape(reason)}): moved to {place}", flush=True)
        if (newest := max(kept)) < max(damaged):
            print(f"going on from step {newest}: the steps to {max(damaged)} are repeated", flush=True)
    parallel.gather(np.zeros(1))


def split(path) -> tuple[epath.Path, int | None]:
    """Splits `WORKDIR/checkpoints/<step>` into WORKDIR and the step; a workdir into itself and None."""
    path = epath.Path(path)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def load_params(
    path, *, step: int | None = None, average: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model, without its optimiser state, from a workdir or one checkpoint of it.

    Args:
      path: a workdir, whose newest checkpoint is taken, or `WORKDIR/checkpoints/<step>`.
      step: the step of the checkpoint in the workdir.
      average: take the moving average of the weights, see `simclr_jax.memory`.

    Returns:
      variables: {'params', 'batch_stats'} as numpy arrays.
      meta: {'config', 'num_classes'} as saved.

    Raises:
      UserError: nothing is saved there, or it cannot be read.
    """
    return _load(path, step, partial(_read_model, average=average))


def load_meta(path) -> dict[str, Any]:
    """Reads `meta` of a workdir's newest checkpoint, or of `WORKDIR/checkpoints/<step>`, as `load_params`."""
    return _load(path, None, _read_meta)


def _load(path, step, read):
    """Returns `read(folder of the checkpoint)`; whatever is wrong with the checkpoint is a UserError."""
    path, named_step = split(epath.Path(path).absolute())
    step = step if named_step is None else named_step
    steps = steps_in(path)
    if not steps or step not in (None, *steps):
        contents = f"steps {steps}" if steps else "no checkpoint"
        raise UserError(
            f"{escape(path)} holds {contents}: give the workdir of a run, WORKDIR/checkpoints/<step>, or a "
            "checkpoint of google-research/simclr"
        )
    saved = path / "checkpoints" / str(steps[-1] if step is None else step)
    try:
        return read(files.portable_path(saved))
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore report missing bytes by many kinds of exceptions
        raise UserError(f"{escape(saved)} is empty or damaged ({reason_of(error)}): give another") from None


def _read_model(saved, average):
    structure = _saved_structure(saved)
    extra, wanted = structure.get("extra"), {name: structure[name] for name in ("params", "batch_stats")}
    if average and not (isinstance(extra, dict) and "average" in extra):
        raise UserError(
            f"{escape(files.user_path(saved))} holds no moving average of the weights: leave "
            "use_average out, or pretrain with --config.memory.size"
        )
    wanted = {"extra": {"average": extra["average"]}} if average else wanted
    tree = _read_tree(saved / "state", wanted, partial_restore=True)
    return tree["extra"]["average"] if average else tree, _read_meta(saved)
