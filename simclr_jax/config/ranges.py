"""The values that keys of a config may have: ranges of numbers, choices of words, registered names."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple

from simclr_jax.process import UserError


class Range(NamedTuple):
    """The numbers from `low` to `high`; `low` itself is excluded where `above` is set."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self):
        if self.above:
            return f"a number above {self.low}" + ("" if self.high == math.inf else f" and up to {self.high}")
        if self.high == math.inf:
            return f"a number of at least {self.low}"
        return f"a number from {self.low} to {self.high}"


_ABOVE_0 = (
    "batch_size",
    "num_epochs",
    "num_steps",
    "image_size",
    "temperature",
    "microbatches",
    "draws",
    "k",
)
_ABOVE_0 += ("labels_per_class", "examples_per_part", "keep_checkpoints", "checkpoint_every_steps")
_ABOVE_0 += ("log_every_steps", "evaluate.every_epochs", "evaluate.max_examples", "optimizer.learning_rate")
_ABOVE_0 += ("evaluate.scratch_learning_rate", "model.depth", "model.projection_dim")
_ABOVE_0 += ("dataset.num_examples", "dataset.num_classes", "dataset.shuffle_buffer", "dataset.max_pixels")
_SEED = Range(0, 2_000_000_000)  # more draws count on from a seed, within 32 bits

# Every number of every task; None is allowed as well where it is the default of configs/base.py.
RANGES = dict.fromkeys(_ABOVE_0, Range(0, above=True)) | {
    "seed": _SEED,
    "warmup_epochs": Range(0),
    "augment.min_area": Range(0, 1, above=True),
    "augment.color_jitter_strength": Range(0, 1.25),
    "model.width": Range(1 / 32, 64),  # 2 to 4,096 filters in the first group
    "model.bottleneck_width": Range(1 / 32, 64),
    "model.sk_ratio": Range(0, 1),
    "model.se_ratio": Range(0, 1),
    "model.projection_layers": Range(0, 100),
    "model.supervised_layer": Range(0, 100),
    "optimizer.weight_decay": Range(0),
    "optimizer.momentum": Range(0, 0.9999),
    "label_weight": Range(0, 1),
    "dataset.split_seed": _SEED,
    "fine_tune_after_block": Range(-1, 4),
}
CHOICES = {
    "augment.crop_dtype": ("float16", "float32"),
    "model.stem": ("auto", "cifar", "imagenet"),
    "model.max_pool": ("tensorflow", "torch"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "optimizer.scaling": ("linear", "sqrt"),
    "metric": ("top1", "mean_per_class"),
    "tracker": ("", "wandb", "mlflow"),
}


def check(key: str, value, kind: type | None = None, example: str = "") -> None:
    """Raises a UserError unless a value is one of its key's choices, or within its key's range.

    Args:
      key: dotted; a key that has neither takes every value.
      value: not None.
      kind: type of the key, int or float; None: that of the value.
      example: command-line flag that sets the key, for the message.
    """
    if key in CHOICES:
        check_choice(key, value, CHOICES[key], example)
    elif key in RANGES:
        allowed = RANGES[key]
        within = isinstance(value, Real) and value in allowed
        # Devices compute in 32 bits; a comparison with NaN is false.
        fits = within and (abs(value) < 2**31 if (kind or type(value)) is int else _is_float32(value))
        if not fits:
            limit = " that 32 bits hold" if within else ""
            hint = f", as in {example}" if example else ""
            raise UserError(f"{key}={value}: set --config.{key} to {allowed}{limit}{hint}")


def _is_float32(value):
    return value == 0 or 1e-37 <= abs(value) <= 1e38


def check_choice(key: str, value, choices: Iterable, example: str = "") -> None:
    """Raises a UserError unless a key's value is one of these; `example` as in `check`."""
    if value not in choices:
        *others, last = choices
        others = ", ".join(map(repr, others))
        raise UserError(
            f"{key}={value!r}: set it to {others} or {last!r}, as in {example or f'--config.{key}={last}'}"
        )


def check_registered(key: str, name: str, registry: dict, place: str) -> None:
    """Raises a UserError unless a registry, `simclr_jax.PLACE`, has the name that a key gives."""
    if name not in registry:
        raise UserError(
            f"{key}={name!r}: known here are {', '.join(map(repr, registry))}; one of your own is added to "
            f"simclr_jax.{place} by a module that is imported before"
        )
