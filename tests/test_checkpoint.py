"""Checkpoints: what is saved, what is kept, and what comes back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import checkpoint, parallel
from simclr_jax.process.errors import UserError
from simclr_jax.workdir import records

META = {"config": {"model": {"depth": 8}}, "num_classes": 3}


def state_of(step):
    return parallel.replicate(
        {
            "step": jnp.int32(step),
            "params": {"conv": {"kernel": jnp.full((2, 3), step, jnp.float32)}},
            "batch_stats": {"bn": {"mean": jnp.full(3, -step, jnp.float32)}},
            "opt_state": (jnp.full((2, 3), 0.5 * step), ()),
        }
    )


def save(workdir, *steps, keep=3, best=None, scores=None):
    manager = checkpoint.open_manager(workdir, keep=keep, best=best)
    for step in steps:
        checkpoint.save(manager, step, state_of(step), META, scores and scores[step])
    manager.close()


def test_restore_returns_exactly_what_was_saved(tmp_path):
    save(tmp_path, 7)
    manager = checkpoint.open_manager(tmp_path, keep=1)
    restored = checkpoint.restore(manager, state_of(0))
    manager.close()
    expected = state_of(7)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() & (a.dtype == b.dtype), restored, expected))
    assert restored["params"]["conv"]["kernel"].sharding == expected["params"]["conv"]["kernel"].sharding


def test_restore_of_nothing_is_the_initial_state(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    initial = state_of(0)
    assert checkpoint.restore(manager, initial) is initial
    manager.close()


def test_newest_and_best_are_kept(tmp_path):
    scores = {1: {"top1": 0.1}, 2: {"top1": 0.9}, 3: {"top1": 0.2}, 4: None, 5: {"top1": 0.3}}
    save(tmp_path, 1, 2, 3, 4, 5, keep=2, best="top1", scores=scores)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")) == [2, 4, 5]


def test_a_checkpoint_that_cannot_be_removed_is_a_note(tmp_path, monkeypatch, capsys):
    kind = type(checkpoint.epath.Path(tmp_path))
    rmtree, rename = kind.rmtree, kind.rename

    def refuse_the_first(path, **options):
        if path.name == "1":
            (path / "state" / "_METADATA").unlink()  # as where the rest is another owner's
            raise PermissionError(1, "Operation not permitted")
        rmtree(path, **options)

    monkeypatch.setattr(kind, "rmtree", refuse_the_first)
    save(tmp_path, 1, 2, 3, keep=1)
    steps = checkpoint.steps_in(tmp_path)
    note = f"note: {tmp_path}/checkpoints/1 cannot be removed (Operation not permitted): the run goes on"
    assert steps == [1, 3] and note in capsys.readouterr().out

    def refuse_to_move_the_first(path, target):
        if path.name == "1":
            raise PermissionError(1, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(kind, "rename", refuse_to_move_the_first)
    save(tmp_path, 4, keep=1)
    assert 4 in checkpoint.steps_in(tmp_path) and note in capsys.readouterr().out


def test_load_params_reads_the_newest_or_the_named_step(tmp_path):
    save(tmp_path, 1, 2)
    for path, step in [(tmp_path, 2), (tmp_path / "checkpoints" / "1", 1)]:
        variables, meta = checkpoint.load_params(path)
        assert set(variables) == {"params", "batch_stats"}
        np.testing.assert_array_equal(variables["params"]["conv"]["kernel"], np.full((2, 3), step))
        np.testing.assert_array_equal(variables["batch_stats"]["bn"]["mean"], np.full(3, -step))
        assert isinstance(variables["params"]["conv"]["kernel"], np.ndarray)
        assert meta == META
    variables, _ = checkpoint.load_params(tmp_path, step=1)
    assert variables["params"]["conv"]["kernel"][0, 0] == 1


def test_missing_checkpoints_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load_params(tmp_path)
    save(tmp_path, 3)
    with pytest.raises(UserError, match=r"steps \[3\]"):
        checkpoint.load_params(tmp_path, step=4)


def test_unfinished_save_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 3)
    unfinished = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "state").write_text("half of it")
    variables, _ = checkpoint.load_params(tmp_path)
    assert variables["params"]["conv"]["kernel"][0, 0] == 3
    manager = checkpoint.open_manager(tmp_path, keep=1)
    assert int(checkpoint.restore(manager, state_of(0))["step"]) == 3
    manager.close()


def test_workdir_of_another_config_is_a_user_error(tmp_path):
    config = {"seed": 0, "log_every_steps": 1, "model": {"depth": 50}}
    records.check_config(tmp_path, config)
    records.save_config(tmp_path, config)
    records.check_config(tmp_path, config)
    records.check_config(tmp_path, config | {"log_every_steps": 2})
    with pytest.raises(
        UserError, match=r"another config \(model.depth is 50 there and 18 here\).*another --workdir"
    ):
        records.check_config(tmp_path, config | {"model": {"depth": 18}})
    with pytest.raises(UserError, match="extra is None there and 1 here"):
        records.check_config(tmp_path, config | {"extra": 1})


@pytest.mark.parametrize("damage", ["empty", "without meta", "truncated"])
def test_damaged_checkpoint_is_a_user_error(damage, tmp_path):
    save(tmp_path, 3)
    saved = tmp_path / "checkpoints" / "3"
    if damage == "empty":
        shutil.rmtree(saved)
        saved.mkdir()
    elif damage == "without meta":
        shutil.rmtree(saved / "meta")
    else:
        for path in (saved / "state").rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match="3 is empty or damaged .*: give another"):
        checkpoint.load_params(tmp_path)
