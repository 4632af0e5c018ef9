"""Checks values against the tables of configs/base.py, and names against registries such as `LOSSES`."""

import math
from collections.abc import Iterable
from numbers import Real

from simclr_jax.config import shipped
from simclr_jax.process import UserError


def check(key: str, value, example: str = "") -> None:
    """Raises a UserError unless a value is one of its key's choices, or within its key's range.

    Args:
      key: dotted; a key that has neither takes every value.
      value: not None.
      example: command-line flag that sets the key, for the message.
    """
    base = shipped.base()
    if key in base.CHOICES:
        check_choice(key, value, base.CHOICES[key], example)
    elif key in base.POSITIVE or key in base.RANGES:
        positive = key in base.POSITIVE
        low, high = base.RANGES.get(key, (0, math.inf))
        within = isinstance(value, Real) and low <= value <= high and not (positive and value == 0)
        if not within or not _fits_32_bits(value):
            allowed = "above 0" if positive else f"of at least {low}"
            allowed += "" if high == math.inf else f" and at most {high}"
            limit = " that 32 bits hold" if within else ""
            hint = f", as in {example}" if example else ""
            raise UserError(f"{key}={value}: set --config.{key} to a number {allowed}{limit}{hint}")


def _fits_32_bits(value):
    """Returns whether devices can hold a number; NaN has failed the comparison with the range before."""
    return abs(value) < 2**31 if isinstance(value, int) else value == 0 or 1e-37 <= abs(value) <= 1e38


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
