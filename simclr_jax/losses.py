"""The losses of both papers, as pure functions of one device's arrays.

Every mean is over this device's rows. Average losses and gradients over the devices (`lax.pmean`)
to get those of the global batch: the devices hold equally many rows.
"""

import jax
import jax.numpy as jnp
import optax

_HIGHEST = jax.lax.Precision.HIGHEST  # TPUs multiply float32 in one bfloat16 pass otherwise.


def nt_xent(
    view1: jax.Array,
    view2: jax.Array,
    *,
    temperature: float,
    hidden_norm: bool = True,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709, equation 1), in float32.

    Row i of `view1` and row i of `view2` are the two views of one image: a positive pair. All other
    views of the batch, over every device of `axis_name`, are its negatives.

    Args:
      view1: projections of the first views on this device, [b, d].
      view2: projections of the second views, [b, d].
      temperature: divides the similarities; a positive float.
      hidden_norm: whether similarities are cosines (the paper) or dot products.
      axis_name: mapped axis to gather projections over; None uses this device's alone. Gradients
        flow through the gathered projections too: average gradients over the axis, do not sum them.

    Returns:
      loss: scalar, scaled as in the official code: the mean over pairs of the SUM of both directions,
        which is twice the paper's mean over 2N views. Published weight decays assume this scale.
      metrics: `contrastive_accuracy`, how often the positive is the most similar of the other views
        of the batch's images, and `contrastive_entropy`, in nats, of that prediction. Like the
        official code, both leave out negatives of the same view.
    """
    view1, view2 = view1.astype(jnp.float32), view2.astype(jnp.float32)
    if hidden_norm:
        view1, view2 = _l2_normalize(view1), _l2_normalize(view2)
    rows = view1.shape[0]
    all1, all2, positives = view1, view2, jnp.arange(rows)
    if axis_name is not None:
        all1, all2 = (jax.lax.all_gather(v, axis_name, tiled=True) for v in (view1, view2))
        positives += jax.lax.axis_index(axis_name) * rows
    itself = jax.nn.one_hot(positives, all1.shape[0], dtype=bool)

    def similarities(a, b):
        return jnp.matmul(a, b.T, precision=_HIGHEST) / temperature

    across_12, across_21 = similarities(view1, all2), similarities(view2, all1)
    within_1 = jnp.where(itself, -jnp.inf, similarities(view1, all1))
    within_2 = jnp.where(itself, -jnp.inf, similarities(view2, all2))
    loss = softmax_cross_entropy(jnp.concatenate([across_12, within_1], axis=1), positives)
    loss += softmax_cross_entropy(jnp.concatenate([across_21, within_2], axis=1), positives)

    probabilities = jax.nn.softmax(jax.lax.stop_gradient(across_12))
    return loss, {
        "contrastive_accuracy": top_k_correct(across_12, positives, k=1).mean(),
        "contrastive_entropy": -(probabilities * jnp.log(probabilities + 1e-8)).sum(axis=1).mean(),
    }


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats, of logits [b, classes] against integer labels [b]; a scalar."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


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
    """Whether the label is among the k largest logits: [b, classes], [b] -> [b] bool."""
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return (best == labels[:, None]).any(axis=1)


def _l2_normalize(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(axis=1, keepdims=True), 1e-12))
