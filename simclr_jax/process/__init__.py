"""The process around a run: console, errors, files, signals, and the other processes of the run."""

from simclr_jax.process.console import escape, say, say_once
from simclr_jax.process.errors import RunError, UserError, first_few, reason_of

__all__ = ["RunError", "UserError", "escape", "first_few", "reason_of", "say", "say_once"]
