"""Learning rate schedules, and the optimisers with their masks of parameters."""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from simclr_jax.config import ranges

# Paths of parameters that LARS neither decays nor adapts (arXiv 2002.05709, section 2.2 and appendix B.6).
_LARS_EXCLUDES = re.compile(r"batch_?norm|\bbn|\b(bias|scale|gamma|beta)\b|supervised", re.IGNORECASE)
_BATCH_NORM = re.compile(r"batch_?norm|\bbn", re.IGNORECASE)


def total_steps(*, batch_size: int, num_examples: int, epochs: float) -> int:
    """Returns the number of train steps in `epochs`, as the official code counts them."""
    return int(num_examples * epochs) // batch_size + 1


def scaled_learning_rate(base_learning_rate: float, *, scaling: str, batch_size: int) -> float:
    """Returns the peak learning rate for a global batch.

    The scaling 'linear' gives base * batch / 256, 'sqrt' gives base * sqrt(batch) (appendix B.1).

    Raises:
      UserError: the scaling is another one.
    """
    ranges.check("optimizer.scaling", scaling)
    if scaling == "linear":
        return base_learning_rate * batch_size / 256
    return base_learning_rate * math.sqrt(batch_size)


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
    """Builds a schedule of linear warmup from 0, then cosine decay to 0 (arXiv 2002.05709, section 2.2).

    Args:
      base_learning_rate: before scaling by the batch size.
      scaling: 'linear' or 'sqrt', see `scaled_learning_rate`.
      batch_size: examples of a step, over all devices.
      num_examples: training examples of an epoch.
      epochs: length of training, in epochs.
      warmup_epochs: length of the warmup at its beginning, in epochs.
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
    """Builds an optimiser of the papers that behaves as in the official code.

    Args:
      name: one of `OPTIMIZERS`: 'lars' (arXiv 1708.03888), 'sgd' (Nesterov momentum) or 'adam'.
      schedule: learning rate, or step -> learning rate.
      weight_decay: this times the weight is added to the gradient. LARS decays kernels only; batch norm,
        biases and the supervised head are neither decayed nor adapted: they see plain momentum at the
        full learning rate. sgd and adam decay all parameters but those of batch norm.
      momentum: momentum of lars and sgd; the first decay rate of adam.

    Returns:
      An optax transformation of a dict of parameters, whose paths decide: names with `batch_norm`, or that
      begin with `bn`, are batch norm's, `bias` is a bias and `supervised` the classifier's head.

    Raises:
      UserError: there is no such optimiser.
    """
    ranges.check_choice("optimizer.name", name, OPTIMIZERS)
    return OPTIMIZERS[name](schedule, weight_decay, momentum)


def _lars(schedule, weight_decay, momentum):
    adapted = _paths_without(_LARS_EXCLUDES)
    return optax.lars(
        schedule,
        weight_decay=weight_decay,
        weight_decay_mask=adapted,
        trust_coefficient=0.001,
        trust_ratio_mask=adapted,
        momentum=momentum,
    )


def _sgd(schedule, weight_decay, momentum):
    return optax.chain(_decay(weight_decay), optax.sgd(schedule, momentum=momentum, nesterov=True))


def _adam(schedule, weight_decay, momentum):
    return optax.chain(_decay(weight_decay), optax.adam(schedule, b1=momentum))


# Optimisers by the names that `config.optimizer.name` may have. Each is called as
# (schedule, weight_decay, momentum). Add an optimiser of your own before a config names it.
OPTIMIZERS: dict[str, Callable] = {"lars": _lars, "sgd": _sgd, "adam": _adam}


def _decay(weight_decay):
    return optax.add_decayed_weights(weight_decay, mask=_paths_without(_BATCH_NORM))


def _paths_without(pattern: re.Pattern):
    """Builds a mask function: parameters -> True where a parameter's path does not match the pattern."""

    def mask(params):
        return jax.tree.map_with_path(
            lambda path, _: not pattern.search(jax.tree_util.keystr(path, simple=True, separator="/")), params
        )

    return mask
