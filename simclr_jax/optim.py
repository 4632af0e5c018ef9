"""Learning rate schedules, and the optimisers with what they leave out."""

import math
import re

import jax
import jax.numpy as jnp
import optax

from simclr_jax.process import UserError

# What LARS neither decays nor adapts (arXiv 2002.05709, section 2.2 and appendix B.6), by parameter path.
_LARS_EXCLUDES = re.compile(r"batch_?norm|\bbn|\b(bias|scale|gamma|beta)\b|supervised", re.IGNORECASE)
_BATCH_NORM = re.compile(r"batch_?norm|\bbn", re.IGNORECASE)


def total_steps(*, batch_size: int, num_examples: int, epochs: float) -> int:
    """Number of train steps in `epochs`, as the official code counts them."""
    return int(num_examples * epochs) // batch_size + 1


def scaled_learning_rate(base_learning_rate: float, *, scaling: str, batch_size: int) -> float:
    """Peak learning rate for a global batch: `linear` base * batch / 256, `sqrt` base * sqrt(batch)."""
    if scaling == "linear":
        return base_learning_rate * batch_size / 256
    if scaling == "sqrt":
        return base_learning_rate * math.sqrt(batch_size)
    raise UserError(f"learning rate scaling is '{scaling}': set it to 'linear' or 'sqrt'")


def warmup_cosine(
    base_learning_rate: float,
    *,
    scaling: str,
    batch_size: int,
    num_examples: int,
    epochs: float,
    warmup_epochs: float,
    num_steps: int | None = None,
) -> optax.Schedule:
    """Linear warmup from zero, then cosine decay to zero without restarts (arXiv 2002.05709, section 2.2).

    Args:
      base_learning_rate: before scaling by the batch size.
      scaling: 'linear' or 'sqrt', see `scaled_learning_rate` (appendix B.1).
      batch_size: global number of examples a step.
      num_examples: training examples an epoch.
      epochs: length of training.
      warmup_epochs: share of it spent in warmup.
      num_steps: length of training in steps; wins over `epochs`.

    Returns:
      A schedule: step -> learning rate. Step 0 has rate 0 if there is a warmup.
    """
    peak = scaled_learning_rate(base_learning_rate, scaling=scaling, batch_size=batch_size)
    warmup = int(warmup_epochs * num_examples // batch_size)
    steps = num_steps or total_steps(batch_size=batch_size, num_examples=num_examples, epochs=epochs)
    decay = max(steps - warmup, 1)

    def learning_rate(step):
        progress = jnp.clip((step - warmup) / decay, 0, 1)
        cosine = peak * 0.5 * (1 + jnp.cos(math.pi * progress))
        return jnp.where(step < warmup, step / max(warmup, 1) * peak, cosine)

    return learning_rate


def make_optimizer(
    name: str, schedule: optax.ScalarOrSchedule, *, weight_decay: float, momentum: float = 0.9
) -> optax.GradientTransformation:
    """The optimisers of both papers, behaving as in the official code.

    Args:
      name: 'lars' (arXiv 1708.03888), 'sgd' (Nesterov momentum) or 'adam'.
      schedule: learning rate, or step -> learning rate.
      weight_decay: times the weight is added to its gradient. LARS decays kernels only; batch norm,
        biases and the supervised head are neither decayed nor adapted: they see plain momentum at the
        full learning rate. sgd and adam decay everything but batch norm.
      momentum: of lars and sgd; the first decay rate of adam.

    Returns:
      An optax transformation for a dict of parameters, whose paths tell what is what: names that contain
      `batch_norm` or begin with `bn`, `bias`, and `supervised` for the classifier's head.
    """
    if name == "lars":
        adapted = _paths_without(_LARS_EXCLUDES)
        return optax.lars(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=adapted,
            trust_coefficient=0.001,
            trust_ratio_mask=adapted,
            momentum=momentum,
        )
    decay = optax.add_decayed_weights(weight_decay, mask=_paths_without(_BATCH_NORM))
    if name == "sgd":
        return optax.chain(decay, optax.sgd(schedule, momentum=momentum, nesterov=True))
    if name == "adam":
        return optax.chain(decay, optax.adam(schedule, b1=momentum))
    raise UserError(f"optimizer is '{name}': set it to 'lars', 'sgd' or 'adam'")


def _paths_without(pattern: re.Pattern):
    """A mask function: parameters -> True where the parameter's path does not match."""

    def mask(params):
        return jax.tree.map_with_path(
            lambda path, _: not pattern.search(jax.tree_util.keystr(path, simple=True, separator="/")), params
        )

    return mask
