"""The peaks of accelerators, for plans: those of `simclr_jax.chips`."""

from simclr_jax.chips import CHIPS, Chip, find_chip

__all__ = ["CHIPS", "Chip", "find_chip"]
