"""The layout of batches and states over devices."""

import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import parallel


def test_shard_puts_rows_on_devices_in_order():
    rows = np.arange(48).reshape(16, 3)
    sharded = parallel.shard({"rows": rows})["rows"]
    assert sharded.shape == (8, 2, 3)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded.reshape(16, 3), rows)


def test_pmap_reduces_over_all_devices_and_donates_the_state():
    def step(state, batch):
        mean = jax.lax.pmean(batch["rows"].mean(), parallel.bound_axis())
        return {"total": state["total"] + mean}, mean

    state = parallel.replicate({"total": np.float32(1)})
    after, mean = parallel.pmap(step, donate_state=True)(state, parallel.shard({"rows": np.arange(16.0)}))
    assert mean == 7.5 and after["total"] == 8.5
    assert state["total"].is_deleted()
    assert after["total"].shape == ()


def test_pmap_rows_keeps_every_row():
    forward = parallel.pmap_rows(lambda scale, batch: batch["rows"] * scale)
    rows = forward(jnp.float32(2), parallel.shard({"rows": np.arange(16.0)}))
    np.testing.assert_array_equal(rows.reshape(-1), 2 * np.arange(16.0))


def test_axis_is_bound_only_inside_a_mapped_step():
    assert parallel.bound_axis() is None
    bound = []
    parallel.pmap(lambda state, batch: bound.append(parallel.bound_axis()) or state)(
        0.0, parallel.shard({"rows": np.zeros(8)})
    )
    assert bound[0] == parallel.AXIS


def test_maximum_of_one_process_is_its_own():
    assert int(parallel.maximum(15)) == 15 and int(parallel.maximum(0)) == 0


def test_gather_of_one_process_is_itself():
    rows = np.arange(3)
    assert parallel.gather(rows) is rows


@pytest.mark.parametrize("in_time", [True, False])
def test_a_call_takes_the_program_that_a_thread_has_compiled(in_time, caplog):
    def step(state, batch):
        traced.append(batch)
        total = jax.lax.psum(batch["rows"].sum(), parallel.AXIS)
        return jax.tree.map(lambda leaf: leaf + total.astype(leaf.dtype), state)

    state, rows = {"mean": np.float32(1), "counts": np.zeros(3, np.int32)}, np.ones((16, 3), np.int32)
    traced, mapped = [], parallel.pmap(step, donate_state=True)
    shapes = jax.eval_shape(lambda: (state, {"rows": rows}))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        if in_time:
            parallel.compile_during(lambda: None, mapped, *shapes)()
        for _ in range(2):
            state = mapped(parallel.replicate(state), parallel.shard({"rows": rows}))
    here = [record for record in caplog.records if "Compiling jit(_fun)" in record.getMessage()]
    assert len(traced) == 1 and len(here) == (0 if in_time else 1)
    assert state["mean"] == 97 and state["counts"].tolist() == [96] * 3


def test_an_error_of_compiling_is_left_to_the_call(monkeypatch):
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    mapped = parallel.pmap(lambda state, batch: state + batch["no such rows"])
    shapes = jax.ShapeDtypeStruct((), np.float32), {"rows": jax.ShapeDtypeStruct((8,), np.float32)}
    parallel.compile_during(lambda: None, mapped, *shapes)()
    assert not printed
    with pytest.raises(KeyError, match="no such rows"):
        mapped(parallel.replicate(np.float32(0)), parallel.shard({"rows": np.zeros(8, np.float32)}))
