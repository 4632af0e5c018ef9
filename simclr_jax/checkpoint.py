"""Checkpoints, all of Orbax: `WORKDIR/checkpoints/<step>`, written in the background, atomically.

Each holds `state`, the whole train state, and `meta`, a JSON object with the resolved config and the
number of classes, from which the model can be rebuilt. One that is damaged is moved to `WORKDIR/damaged`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from simclr_jax import parallel
from simclr_jax.process import files
from simclr_jax.process.console import escape
from simclr_jax.process.errors import RunError, UserError, reason_of
from simclr_jax.workdir import records


def open_manager(path, *, keep: int, best: str | None = None) -> ocp.CheckpointManager:
    """Opens a workdir for `save` and `restore`; close it to wait for the last save.

    Args:
      path: local or gs:// workdir.
      keep: number of newest checkpoints to keep.
      best: name of the metric whose highest value marks one more checkpoint to keep.
    """
    policies = [checkpoint_managers.LatestN(keep)]
    if best:
        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[best], n=1, keep_checkpoints_without_metrics=False
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=(lambda metrics: metrics[best]) if best else None,
        cleanup_tmp_directories=True,
    )
    folder = files.portable_path(epath.Path(path).absolute()) / "checkpoints"
    _set_aside(folder, {step: reason for step in steps_in(path) if (reason := _damage(folder / str(step)))})
    with files.storage(folder):
        return ocp.CheckpointManager(folder, options=options)


@contextmanager
def opened(path, **options) -> Iterator[ocp.CheckpointManager]:
    """A manager that is closed at the end, except where storage failed: its saves would never be done."""
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
    """Raises a StorageError if a save in the background has failed; waits for none."""
    with files.storage(manager.directory):
        manager.check_for_errors()


def restore(manager: ocp.CheckpointManager, state: dict[str, Any]) -> dict[str, Any]:
    """The newest whole train state, laid out over devices like `state`; `state` itself if none was saved.

    Damaged ones that are newer are moved to `WORKDIR/damaged`, and a line says so.

    Raises:
      UserError: every checkpoint is damaged.
    """
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            saved, reason = _read_state(manager.directory / str(step), state), None
        except Exception as error:
            _raise_unless_damage(error, manager.directory / str(step))
            saved, reason = None, reason_of(error)
        if not parallel.gather(np.array([reason is not None])).any():  # all processes take the same step
            _set_aside(manager.directory, damaged)
            if damaged:
                manager.reload()
            return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), saved, state)
        damaged[step] = reason or "another process cannot read it"
    _set_aside(manager.directory, damaged)
    return state


def newest_is_whole(path) -> bool:
    """Whether the newest checkpoint of a workdir can be read to its end; True where there is none."""
    steps = steps_in(path)
    saved = files.portable_path(epath.Path(path).absolute()) / "checkpoints" / str(max(steps, default=0))
    if not steps:
        return True
    try:
        return not _damage(saved) and bool(_read_tree(saved / "state", _saved_tree(saved)))
    except Exception as error:
        _raise_unless_damage(error, saved)
        return False


def steps_in(path) -> list[int]:
    """The steps of the checkpoints in a workdir, sorted; not all need be whole."""
    folder = epath.Path(path) / "checkpoints"
    with files.storage(folder):
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _read_state(path, like):
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    return _read_tree(path / "state", target)


def _saved_tree(saved):
    """Shapes and types of everything in a checkpoint, as nested dicts."""
    tree = ocp.PyTreeCheckpointHandler().metadata(saved / "state").tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _read_tree(path, target, **options):
    """Arrays of a checkpoint as numpy's, in the structure of `target`, without asking other processes."""
    arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), target)
    arguments = ocp.args.PyTreeRestore(item=target, restore_args=arguments, **options)
    tree = ocp.PyTreeCheckpointHandler().restore(path, args=arguments)
    for wanted, leaf in zip(jax.tree.leaves(target), jax.tree.leaves(tree), strict=True):
        if wanted.shape != leaf.shape or wanted.dtype != leaf.dtype:
            raise ValueError(f"an array is {leaf.dtype}{leaf.shape} instead of {wanted.dtype}{wanted.shape}")
    return tree


def _read_meta(saved) -> dict[str, Any]:
    meta = files.read_json(saved / "meta" / "metadata")
    records.check_schema(files.user_path(saved), meta)
    meta.pop("schema_version", None)
    return meta


def _damage(saved) -> str | None:
    """What is wrong with a checkpoint as far as its small files tell; None where nothing is."""
    try:
        if not saved.is_dir():
            return "it is no folder"
        if not (saved / "state" / "_METADATA").exists():
            return "it has no state, or not all of it"
        _read_meta(saved)
        if (saved / "metrics").exists():
            files.read_json(saved / "metrics" / "metrics")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):  # of a later version
            raise
        _raise_unless_damage(error, saved)
        return reason_of(error)
    return None


def _raise_unless_damage(error, path):
    """Reading fails where permissions, memory or the network do: no reason to call a checkpoint damaged."""
    names = ("PERMISSION_DENIED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")
    if isinstance(error, PermissionError | MemoryError) or any(name in str(error) for name in names):
        raise files.StorageError(
            f"{escape(files.user_path(path))} cannot be read: {reason_of(error)}; mend that first"
        ) from error


def _set_aside(folder, damaged: dict[int, str]) -> None:
    """Moves damaged checkpoints out of the way, unless no other is left.

    Raises:
      UserError: no other is left.
    """
    if not damaged:
        return
    run = folder.parent
    kept = [step for step in steps_in(run) if step not in damaged]
    told = ", ".join(f"{step} ({reason})" for step, reason in sorted(damaged.items()))
    if not kept:
        raise UserError(
            f"every checkpoint in {escape(files.user_path(folder))} is damaged: {escape(told)}; put a whole copy "
            "of one back, or start again with another --workdir"
        )
    parallel.gather(np.zeros(1))  # every process has looked before anything moves
    if jax.process_index() == 0:
        with files.storage(run):
            (run / "damaged").mkdir(exist_ok=True)
            for step, reason in sorted(damaged.items()):
                aside = run / "damaged" / str(step)
                number = 1
                while files.exists(aside):
                    aside, number = run / "damaged" / f"{step}-{number}", number + 1
                (folder / str(step)).rename(aside)
                print(
                    f"checkpoint {step} is damaged ({escape(reason)}): moved to {escape(files.user_path(aside))}",
                    flush=True,
                )
        newest = max(kept)
        if newest < max(damaged):
            print(f"going on from step {newest}: the steps to {max(damaged)} are repeated", flush=True)
    parallel.gather(np.zeros(1))


def split(path) -> tuple[epath.Path, int | None]:
    """`WORKDIR/checkpoints/<step>` -> WORKDIR and the step; a workdir -> itself and None."""
    path = epath.Path(path)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def load_params(path, *, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model, without its optimiser state, from a workdir or one checkpoint of it.

    Args:
      path: a workdir, whose newest checkpoint is taken, or `WORKDIR/checkpoints/<step>`.
      step: which checkpoint of the workdir.

    Returns:
      variables: {'params', 'batch_stats'} as numpy arrays.
      meta: {'config', 'num_classes'} as saved.

    Raises:
      UserError: nothing is saved there, or it cannot be read.
    """
    path, named = split(epath.Path(path).absolute())
    step = step if named is None else named
    steps = steps_in(path)
    if not steps or step not in (None, *steps):
        found = f"steps {steps}" if steps else "no checkpoint"
        raise UserError(
            f"{escape(path)} holds {found}: give the workdir of a run, WORKDIR/checkpoints/<step>, or a "
            "checkpoint of google-research/simclr"
        )
    saved = path / "checkpoints" / str(steps[-1] if step is None else step)
    try:
        return _read_model(files.portable_path(saved))
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore tell of missing bytes in many ways
        raise UserError(
            f"{escape(saved)} is empty or damaged ({reason_of(error, 100)}): give another checkpoint"
        ) from None


def load_meta(path) -> dict[str, Any]:
    """`meta` of a workdir's newest checkpoint, or of a named one, as `load_params` gives it."""
    path, step = split(epath.Path(path).absolute())
    steps = steps_in(path)
    if not steps:
        raise UserError(f"{escape(path)} holds no checkpoint: give the workdir of a run")
    saved = path / "checkpoints" / str(steps[-1] if step is None else step)
    try:
        return _read_meta(saved)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{escape(saved)} is empty or damaged ({reason_of(error, 100)}): give another checkpoint"
        ) from None


def _read_model(saved):
    structure = _saved_tree(saved)
    wanted = {name: structure[name] for name in ("params", "batch_stats")}
    return _read_tree(saved / "state", wanted, partial_restore=True), _read_meta(saved)
