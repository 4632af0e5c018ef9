"""The losses of both papers, as pure functions of one device's arrays.

Every mean is over this device's rows. Average losses and gradients over the devices (`lax.pmean`)
to get those of the global batch: the devices hold equally many rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_HIGHEST = jax.lax.Precision.HIGHEST  # TPUs multiply float32 in one bfloat16 pass otherwise.
TILE = 1024  # rows and columns of a tile of similarities: 4 MiB
_TILED_ABOVE = 2**24  # similarities of two sets of views, 64 MiB; more are computed tile by tile
_MASKED = -1e30  # similarity of a masked key: its exponential is 0


def nt_xent(
    view1: jax.Array,
    view2: jax.Array,
    *,
    temperature: float,
    hidden_norm: bool = True,
    axis_name: str | None = None,
    tile: int | None = None,
    keys: tuple[jax.Array, jax.Array] | None = None,
    memory: jax.Array | None = None,
    memory_rows: jax.Array | int | None = None,
    decoupled: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709, equation 1), in float32.

    Row i of `view1` and row i of `view2` are the two views of one image: a positive pair. All other
    views of the batch, over every device of `axis_name`, are its negatives, unless `keys` take their place.

    Args:
      view1: projections of the first views on this device, [b, d].
      view2: projections of the second views, [b, d].
      temperature: divides the similarities; a positive float.
      hidden_norm: whether similarities are cosines (the paper) or dot products.
      axis_name: mapped axis to gather projections over; None uses this device's alone. Gradients
        flow through the gathered projections too: average gradients over the axis, do not sum them.
      tile: side of a tile: `tile` x `tile` similarities are computed at a time, in memory that grows with the
        batch, not with its square. 0 computes all at once; None does so up to 2**24 similarities of the first
        with the second views and the memory.
      keys: projections of both views by another network, each [b, d], which take the place of the views as
        positives and negatives. No gradient flows through them.
      memory: further negatives of every view, [m, d], the same on every device, without a gradient.
      memory_rows: how many rows of the memory count, from the first on; None: all.
      decoupled: leaves the positive out of the denominator; see `dcl`.

    Returns:
      loss: scalar, scaled as in the official code: the mean over pairs of the SUM of both directions,
        which is twice the paper's mean over 2N views. Published weight decays assume this scale.
      metrics: `contrastive_accuracy`, the share of first views whose positive is the most similar of all
        second views, and `contrastive_entropy`, in nats, of the softmax over these similarities. Like the
        official code, neither counts the negatives among the first views, nor those of the memory.
    """
    prepare = _l2_normalize if hidden_norm else lambda projections: projections
    view1, view2 = (prepare(view.astype(jnp.float32)) for view in (view1, view2))
    all1, all2 = view1, view2
    if keys is not None:
        all1, all2 = (jax.lax.stop_gradient(prepare(key.astype(jnp.float32))) for key in keys)
    rows = view1.shape[0]
    positives = jnp.arange(rows)
    if axis_name is not None:
        all1, all2 = (jax.lax.all_gather(v, axis_name, tiled=True) for v in (all1, all2))
        positives += jax.lax.axis_index(axis_name) * rows
    memory = jnp.zeros((0, view1.shape[1])) if memory is None else memory
    memory = jax.lax.stop_gradient(prepare(memory.astype(jnp.float32)))
    memory_rows = len(memory) if memory_rows is None else memory_rows
    if tile is None:
        tile = TILE if rows * (all1.shape[0] + len(memory)) > _TILED_ABOVE else 0
    if tile:
        negatives = memory, memory_rows
        return _tiled_nt_xent(view1, view2, all1, all2, positives, negatives, temperature, decoupled, tile)
    mask = jax.nn.one_hot(positives, all1.shape[0], dtype=bool)  # a view is no negative of itself

    def similarities(a, b):
        return jnp.matmul(a, b.T, precision=_HIGHEST) / temperature

    def direction(across, view, within):
        remembered = jnp.where(jnp.arange(len(memory)) < memory_rows, similarities(view, memory), -jnp.inf)
        within = jnp.where(mask, -jnp.inf, similarities(view, within))
        if not decoupled:
            logits = jnp.concatenate([across, within, remembered], axis=1)
            return softmax_cross_entropy(logits, positives)
        logits = jnp.concatenate([jnp.where(mask, -jnp.inf, across), within, remembered], axis=1)
        return (jax.nn.logsumexp(logits, axis=1) - across[jnp.arange(rows), positives]).mean()

    across_12, across_21 = similarities(view1, all2), similarities(view2, all1)
    loss = direction(across_12, view1, all1) + direction(across_21, view2, all2)

    probabilities = jax.nn.softmax(jax.lax.stop_gradient(across_12))
    return loss, {
        "contrastive_accuracy": top_k_correct(across_12, positives, k=1).mean(),
        "contrastive_entropy": -(probabilities * jnp.log(probabilities + 1e-8)).sum(axis=1).mean(),
    }


# Decoupled contrastive learning (arXiv 2110.06848, equation 6): NT-Xent whose positive is missing from the
# denominator, so that easy positives do not shrink the gradient, as they do in small batches.
dcl = partial(nt_xent, decoupled=True)


class StatefulLoss(NamedTuple):
    """A loss with a state that lasts from step to step, such as a queue of earlier projections.

    Attributes:
      init: projection_dim -> the state before the first step, a pytree of arrays.
      loss: (view1, view2, state, *, temperature, axis_name) -> (loss, metrics), with the state after the step
        as `kept` among the metrics. It has to be the same on every device, as gathered projections are.
    """

    init: Callable[[int], Any]
    loss: Callable[..., tuple[jax.Array, dict[str, Any]]]

    def __call__(self, *arguments, **options):
        return self.loss(*arguments, **options)


# The values of `config.loss`: functions of one device's projections, (view1 [b, d], view2 [b, d], *,
# temperature, axis_name) -> (loss, metrics), or a `StatefulLoss`. Add one before a config names it.
LOSSES: dict[str, Callable[..., tuple[jax.Array, dict[str, Any]]]] = {"nt_xent": nt_xent, "dcl": dcl}


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array, class_weights=None) -> jax.Array:
    """Mean cross entropy, in nats, of logits [b, classes] against integer labels [b]; a scalar.

    With `class_weights`, [classes], that of each row is multiplied by the weight of its label.
    """
    values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (values if class_weights is None else jnp.asarray(class_weights)[labels] * values).mean()


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy, in nats, of independent classes, [b, classes] both: a sum, its mean over the rows."""
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=1).mean()


def distillation(student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float) -> jax.Array:
    """Cross entropy of the student's predictions against the teacher's (arXiv 2006.10029, equation 2).

    Multiplied by temperature squared, as in the official code, so that gradients keep their size when
    the temperature changes. No gradient reaches the teacher.

    Args:
      student_logits: [b, classes].
      teacher_logits: [b, classes].
      temperature: divides both logits; a positive float.

    Returns:
      A scalar: the mean over the rows.
    """
    teacher = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    return optax.softmax_cross_entropy(student_logits / temperature, teacher).mean() * temperature**2


def top_k_correct(logits: jax.Array, labels: jax.Array, *, k: int) -> jax.Array:
    """Returns whether the label is among the k largest logits: [b, classes], [b] -> [b] bool."""
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return (best == labels[:, None]).any(axis=1)


def _l2_normalize(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(axis=1, keepdims=True), 1e-12))


def _tiled_nt_xent(view1, view2, all1, all2, positives, negatives, temperature, decoupled, tile):
    """Computes `nt_xent` of normalised projections without holding the whole matrix of similarities.

    The official code adds 1e-8 to each of n probabilities in the entropy; this function does not, which
    changes the entropy by at most n * 1e-8 nats.
    """
    no_key = jnp.full_like(positives, -1)

    def direction(own, own_all, partners_all):
        own = own / temperature
        positive = (own * partners_all[positives]).sum(axis=1)
        count = len(own_all)
        across, mean, most_similar = _log_sum_exp(own, partners_all, no_key, count, tile)
        within, _, _ = _log_sum_exp(own, own_all, positives, count, tile)
        others = _log_sum_exp(own, partners_all, positives, count, tile)[0] if decoupled else across
        denominator = jnp.logaddexp(others, within)
        if len(negatives[0]):
            remembered, _, _ = _log_sum_exp(own, negatives[0], no_key, negatives[1], tile)
            denominator = jnp.logaddexp(denominator, remembered)
        loss = (denominator - positive).mean()
        return loss, {
            "contrastive_accuracy": (most_similar == positives).mean(),
            "contrastive_entropy": jax.lax.stop_gradient(across - mean).mean(),
        }

    loss1, metrics = direction(view1, all1, all2)
    loss2, _ = direction(view2, all2, all1)
    return loss1 + loss2, metrics


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _log_sum_exp(queries, keys, excluded, num_keys, tile):
    """Computes the log-sum-exp of the similarities of queries with keys, tile by tile.

    It keeps a running maximum and sum over tiles, and the backward pass computes the similarities again, as
    FlashAttention does (arXiv 2205.14135). So memory grows with queries and keys, not with their product.

    Args:
      queries: [b, d].
      keys: [n, d].
      excluded: int [b], the key that each query leaves out; -1 for none.
      num_keys: how many keys count, from the first on; with none the log-sum-exp is `_MASKED`.
      tile: rows and columns of a tile.

    Returns:
      The log-sum-exp [b]; without a gradient, the mean similarity under the softmax [b] and the index of the
      most similar key [b].
    """
    return _log_sum_exp_forward(queries, keys, excluded, num_keys, tile)[0]


def _log_sum_exp_forward(queries, keys, excluded, num_keys, tile):
    key_tiles = _in_tiles(tile, keys, jnp.arange(len(keys)))

    def forward_tile(query_tile):
        query, excluded = query_tile

        def add(carry, key_tile):
            maximum, total, weighted, best = carry
            similarity = _tile_similarity(query, excluded, *key_tile, num_keys)
            highest = jnp.maximum(maximum, similarity.max(axis=1))
            best = jnp.where(highest > maximum, key_tile[1][similarity.argmax(axis=1)], best)
            rescale, weight = jnp.exp(maximum - highest), jnp.exp(similarity - highest[:, None])
            weighted = weighted * rescale + (weight * similarity).sum(axis=1)
            return (highest, total * rescale + weight.sum(axis=1), weighted, best), None

        # The dtypes are explicit: in 64-bit mode the defaults would differ from those that `add` returns.
        zeros, no_key = jnp.zeros(tile, query.dtype), jnp.full(tile, -1, key_tiles[1].dtype)
        start = (zeros + _MASKED, zeros, zeros, no_key)
        (maximum, total, weighted, best), _ = jax.lax.scan(add, start, key_tiles)
        return maximum + jnp.log(total), weighted / total, best

    tiles = jax.lax.map(forward_tile, _in_tiles(tile, queries, excluded))
    log_sum, mean, best = (rows.reshape(-1)[: len(queries)] for rows in tiles)
    return (log_sum, mean, best), (queries, keys, excluded, num_keys, log_sum)


def _log_sum_exp_backward(tile, saved, cotangents):
    queries, keys, excluded, num_keys, log_sum = saved
    key_tiles = _in_tiles(tile, keys, jnp.arange(len(keys)))

    def backward_tile(key_gradient, query_tile):
        query, excluded, log_sum, cotangent = query_tile

        def add(query_gradient, key_tile):
            similarity = _tile_similarity(query, excluded, *key_tile, num_keys)
            slope = jnp.exp(similarity - log_sum[:, None]) * cotangent[:, None]
            query_gradient += jnp.matmul(slope, key_tile[0], precision=_HIGHEST)
            return query_gradient, jnp.matmul(slope.T, query, precision=_HIGHEST)

        query_gradient, tile_gradient = jax.lax.scan(add, jnp.zeros_like(query), key_tiles)
        return key_gradient + tile_gradient, query_gradient

    query_tiles = _in_tiles(tile, queries, excluded, log_sum, cotangents[0])
    key_gradient, query_gradient = jax.lax.scan(backward_tile, jnp.zeros_like(key_tiles[0]), query_tiles)
    query_gradient = query_gradient.reshape(-1, queries.shape[1])[: len(queries)]
    key_gradient = key_gradient.reshape(-1, keys.shape[1])[: len(keys)]
    return query_gradient, key_gradient, None, None


_log_sum_exp.defvjp(_log_sum_exp_forward, _log_sum_exp_backward)


def _tile_similarity(query, excluded, key, index, num_keys):
    similarity = jnp.matmul(query, key.T, precision=_HIGHEST)
    return jnp.where((index >= num_keys) | (index == excluded[:, None]), _MASKED, similarity)


def _in_tiles(tile, *arrays):
    """Reshapes arrays of n rows to [tiles, tile, ...]; pads the last tile with zeros, or indices with n."""
    missing = -len(arrays[0]) % tile

    def split(rows):
        constant = len(rows) if jnp.issubdtype(rows.dtype, jnp.integer) else 0
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=constant)
        return rows.reshape(-1, tile, *rows.shape[1:])

    return tuple(map(split, arrays))
