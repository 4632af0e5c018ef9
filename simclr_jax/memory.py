"""The memory of negatives of SimCLR v2 (arXiv 2006.10029, section 2), after MoCo (arXiv 1911.05722).

A second network follows the one that learns: its weights are a moving average. It embeds both views of every
batch. These projections are the keys: the key of an image's other view is the positive of a view, and the
keys of all other images, of this batch and of earlier ones, are its negatives. Where the paper leaves a
choice:

- The learning network's own projections are no negatives: "the contrasting examples are from momentum encoder
  from current and past batches, which is consistent with MoCo" (issue 115 of the official repository).
- Batch norm of the average takes the statistics of its batch, as that of MoCo's second network does. Its
  running statistics are a moving average, too, and serve after pretraining.
- One queue holds the keys of both views. Every device has the same rows in the same order.
"""

import jax
import jax.numpy as jnp
import optax

from simclr_jax.parallel import AXIS


def init(variables, *, size: int, dim: int) -> dict:
    """Makes the memory before the first step, a `train.Task.extra`.

    Args:
      variables: {'params', 'batch_stats'} of the network that learns.
      size: rows of the queue.
      dim: dimensions of a projection.

    Returns:
      `average`, the second network's variables; `queue`, float32 [size, dim]; `rows`, how many of its rows
      hold keys, from the first on; `next`, the row that is written next.
    """
    average = {name: variables[name] for name in ("params", "batch_stats")}
    start = jnp.zeros((), jnp.int32)
    return {"average": average, "queue": jnp.zeros((size, dim)), "rows": start, "next": start}


def contrast(loss, pairs, memory, **options) -> tuple[jax.Array, dict]:
    """Applies a loss to the views, with the keys and the memory as positives and negatives.

    Args:
      loss: `losses.nt_xent` or one with its arguments.
      pairs: this device's `projection` and `keys` of both views, each [b, dim].
      memory: from `init` or `update`.
      options: further arguments of the loss.

    Returns:
      The loss and its metrics, with the keys as `kept` for `update`.
    """
    keys = pairs["keys"]
    value, metrics = loss(
        *pairs["projection"], keys=keys, memory=memory["queue"], memory_rows=memory["rows"], **options
    )
    return value, metrics | {"kept": keys}


def update(state, keys, *, decay: float) -> dict:
    """Returns the memory after a step, with its keys in the place of the oldest; a `train.Task.after_update`.

    Args:
      state: the train state after the update, with the memory before it as `extra`.
      keys: the second network's projections of both views of this device's images, each [b, dim].
      decay: share of the average that a step keeps.
    """
    memory = state["extra"]
    size = len(memory["queue"])
    rows = jnp.concatenate([jax.lax.all_gather(key, AXIS, tiled=True) for key in keys])[-size:]
    learning = {name: state[name] for name in memory["average"]}
    places = (memory["next"] + jnp.arange(len(rows))) % size
    return {
        "average": optax.incremental_update(learning, memory["average"], 1 - decay),
        "queue": memory["queue"].at[places].set(rows.astype(jnp.float32)),
        "rows": jnp.minimum(memory["rows"] + len(rows), size),
        "next": (memory["next"] + len(rows)) % size,
    }
