"""Checkpoints, all of Orbax: `WORKDIR/checkpoints/<step>`, written in the background, atomically.

Each holds `state`, the whole train state, and `meta`, a JSON object with the resolved config and the
number of classes, from which the model can be rebuilt. `WORKDIR/config.json` tells whose run it is.
"""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from simclr_jax.errors import UserError

# What may differ between a run and its continuation: it changes neither the model nor what it sees.
_FREE_KEYS = ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "dataset.data_dir")
_FREE_KEYS += ("microbatches", "remat")  # which other machines may need


def open_manager(workdir, *, keep: int, best: str | None = None) -> ocp.CheckpointManager:
    """Opens `workdir` for `save` and `restore`; close it to wait for the last save.

    Args:
      workdir: local or gs:// path.
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
    return ocp.CheckpointManager(epath.Path(workdir).absolute() / "checkpoints", options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float] | None = None,
) -> None:
    """Saves the train state after `step` steps; returns as soon as the device memory may be reused."""
    if step in manager.all_steps():
        return
    if jax.process_count() > 1:  # pmap returns arrays of this process's devices
        state = jax.tree.map(ocp.utils.fully_replicated_host_local_array_to_global_array, state)
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    manager.save(step, args=items, metrics=metrics or None)


def restore(manager: ocp.CheckpointManager, state: dict[str, Any]) -> dict[str, Any]:
    """The newest saved train state, laid out over devices like `state`; `state` itself if there is none."""
    step = manager.latest_step()
    if step is None:
        return state
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state


def split(path) -> tuple[epath.Path, int | None]:
    """`WORKDIR/checkpoints/<step>` -> WORKDIR and the step; a workdir -> itself and None."""
    path = epath.Path(path)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def check_new(folder) -> None:
    """Raises a UserError if there is anything under `folder`, so that nothing saved is ever lost."""
    folder = epath.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: choose another --output, or remove it")


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
    steps = sorted(int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdigit())
    if not steps or step not in (None, *steps):
        found = f"steps {steps}" if steps else "no checkpoint"
        raise UserError(
            f"{path} holds {found}: give the workdir of a run, WORKDIR/checkpoints/<step>, or a checkpoint "
            "of google-research/simclr"
        )
    saved = path / "checkpoints" / str(steps[-1] if step is None else step)
    try:
        return _read_model(saved)
    except (OSError, ValueError, KeyError) as error:  # how Orbax and TensorStore tell of missing bytes
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{saved} is empty or damaged ({reason}): give another checkpoint") from None


def _read_model(saved):
    structure = ocp.PyTreeCheckpointHandler().metadata(saved / "state").tree
    wanted = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), structure[name])
        for name in ("params", "batch_stats")
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        variables = checkpointer.restore(
            saved / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
                partial_restore=True,
            ),
        )
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        meta = checkpointer.restore(saved / "meta")
    return variables, meta


def check_config(workdir, config: dict[str, Any]) -> None:
    """Raises a UserError if `workdir` holds a run with another config than this resolved one."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    saved, ours = flatten(json.loads(path.read_text())), flatten(config)
    differing = [
        f"{key} is {saved.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted(saved | ours)
        if saved.get(key) != ours.get(key) and key not in _FREE_KEYS
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(differing)}): "
            "choose another --workdir, or the settings of that run to continue it"
        )


def save_config(workdir, config: dict[str, Any]) -> None:
    """Writes the resolved config beside the checkpoints, in one piece."""
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    unfinished = workdir / "config.json.tmp"
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    unfinished.replace(workdir / "config.json")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
