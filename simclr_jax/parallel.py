"""The seam between per-device functions and the devices: everything that knows of pmap is here.

A step is written for one device and names the axis `AXIS` where it needs the others. `pmap` maps it
over the local devices of every process, so that the axis spans the whole run. The train state
has no leading device axis: it is an ordinary pytree, the same on every device.
"""

import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def this_process() -> dict[str, int]:
    """This process and how many there are, as the pipeline takes them."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def bound_axis() -> str | None:
    """`AXIS` inside a mapped step; None outside one, where there is nothing to reduce over."""
    try:
        jax.lax.axis_index(AXIS)
    except NameError:
        return None
    return AXIS


def pmap(step, *, donate_state: bool = False, devices=None):
    """Maps `step(state, batch) -> output` over all devices, or over these, which need not be here.

    `state` and the output are the same on every device; the arrays of `batch` are as `shard` lays them out.
    `state` holds an array at least: of an empty tree jax.pmap would take the axes for the batch's.
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
    """Maps `function(variables, batch) -> rows` over all devices; rows come back [local devices, b, ...]."""
    return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0))


def replicate(tree):
    """Puts a tree of host arrays, equal in every process, onto every device of the run."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec()))


def shard(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Spreads this process's rows over its devices: [rows, ...] -> [local devices, rows / devices, ...]."""
    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return {
        name: jax.device_put(rows.reshape(len(devices), -1, *rows.shape[1:]), sharding)
        for name, rows in batch.items()
    }


def maximum(value: int) -> jax.Array:
    """The largest value of all processes, an int32 scalar; every process has to ask. Returns at once."""
    values = np.full(jax.local_device_count(), value, np.int32)
    return _maximum()(np.int32(0), shard({"value": values}))


@functools.cache
def _maximum():
    return pmap(lambda _, batch: jax.lax.pmax(batch["value"].max(), AXIS))


def gather(rows: np.ndarray) -> np.ndarray:
    """Concatenates the rows of all processes, in the order of the processes, on each of them."""
    if jax.process_count() == 1:
        return rows
    return multihost_utils.process_allgather(rows, tiled=True)
