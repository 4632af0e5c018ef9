"""The boundary between per-device functions and the devices; no other module knows of pmap.

A step is written for one device and names the axis `AXIS` where it needs the others. `pmap` maps it
over the local devices of every process, so that the axis spans the whole run. The train state
has no leading device axis: it is an ordinary pytree, the same on every device.
"""

import functools
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"
planned_processes = 0  # those of machines elsewhere, for a check of a run on them


def this_process() -> dict[str, int]:
    """Returns the index of this process and the number of processes, as arguments of the input pipeline."""
    return {"process_index": jax.process_index(), "process_count": planned_processes or jax.process_count()}


def bound_axis() -> str | None:
    """Returns `AXIS` inside a mapped step, and None outside, where there is nothing to reduce over."""
    try:
        jax.lax.axis_index(AXIS)
    except NameError:
        return None
    return AXIS


def pmap(step, *, donate_state: bool = False, devices=None):
    """Maps `step(state, batch) -> output` over all devices.

    `state` and the output are the same on every device; `batch` holds arrays as `shard` lays them out.

    Args:
      step: the function of one device. Its `state` must hold an array: of an empty tree, jax.pmap would apply
        the axes to the batch.
      donate_state: lets the output reuse the memory of `state`, which is deleted.
      devices: other devices to compile for, which may belong to another machine.
    """
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0 if donate_state else (),
        devices=devices,
    )


def pmap_rows(function):
    """Maps `function(variables, batch) -> rows` over all devices; returns rows [local devices, b, ...]."""
    return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0))


def replicate(tree, devices=None):
    """Puts a tree of host arrays onto every device of the run, or onto `devices`.

    It is equal in every process, which jax checks, unless `devices` are this process's own.
    """
    return jax.device_put(tree, _sharding(devices or jax.devices()))


def shard(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Spreads this process's rows over its devices: [rows, ...] -> [local devices, rows / devices, ...]."""
    devices = jax.local_devices()
    sharding = _sharding(devices, AXIS)
    return {
        name: jax.device_put(rows.reshape(len(devices), -1, *rows.shape[1:]), sharding)
        for name, rows in batch.items()
    }


def _sharding(devices, *axes) -> NamedSharding:
    """Returns the layout over devices of arrays whose first axis is `AXIS`; without it, of copies."""
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(*axes))


def compile_during(call, step, state, batch):
    """Compiles a mapped step in a thread while other work goes on; its first call takes that program.

    It does so on the CPUs of one process: XLA for GPUs times kernels, which the other work would disturb.

    Args:
      call: a function that the work ends with.
      step: from `pmap`.
      state: shapes and dtypes of a state; calls get one that `replicate` has laid out.
      batch: shapes and dtypes of a global batch, [rows, ...]; calls get one from `shard`.

    Returns:
      The function `call`, which waits for the thread in the end.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return call
    devices = jax.devices()

    def replicated(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(devices))

    def sharded(rows):
        shape = len(devices), rows.shape[0] // len(devices), *rows.shape[1:]
        return jax.ShapeDtypeStruct(shape, rows.dtype, sharding=_sharding(devices, AXIS))

    def compile_step():
        with suppress(Exception):  # The call of the step meets the same error.
            step.lower(jax.tree.map(replicated, state), jax.tree.map(sharded, batch)).compile()

    thread = threading.Thread(target=compile_step)
    thread.start()

    def call_and_wait(*arguments):
        result = call(*arguments)
        thread.join()
        return result

    return call_and_wait


def prefetch_to_devices(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, jax.Array]]:
    """Shards batches, and keeps two of them on their way to the devices ahead of the one in use.

    The arrays `index`, which only the host needs, stay behind.
    """
    queue = deque()
    for batch in batches:
        queue.append(shard({name: rows for name, rows in batch.items() if name != "index"}))
        if len(queue) > 2:
            yield queue.popleft()
    yield from queue


def maximum(value: int) -> jax.Array:
    """Returns the largest value of all processes, an int32 scalar, without waiting for it.

    Every process has to call this function.
    """
    values = np.full(jax.local_device_count(), value, np.int32)
    return _mapped_maximum()(np.int32(0), shard({"value": values}))


@functools.cache
def _mapped_maximum():
    return pmap(lambda _, batch: jax.lax.pmax(batch["value"].max(), AXIS))


def gather(rows: np.ndarray) -> np.ndarray:
    """Concatenates the rows of all processes, in the order of the processes, on each of them."""
    if jax.process_count() == 1:
        return rows
    return multihost_utils.process_allgather(rows, tiled=True)
