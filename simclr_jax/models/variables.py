"""Compares the variables in the files of other programs with those of the network that they resemble."""

from simclr_jax.models import describe
from simclr_jax.process.errors import UserError, first_few


def check_variables(path: str, config, found: dict, expected: dict, unknown=frozenset()) -> None:
    """Holds the variables of a file against those of the network that it resembles.

    Args:
      path: of the file, for the message.
      config: `config.model` of that network.
      found, expected: name -> shape, a tuple.
      unknown: further names that the network does not have.

    Raises:
      UserError: some are missing, unknown or of another shape, which it lists.
    """
    problems = {
        "missing": expected.keys() - found.keys(),
        "unknown": unknown | (found.keys() - expected.keys()),
        "of another shape": {
            f"{name} {shape} instead of {expected[name]}"
            for name, shape in found.items()
            if shape != expected.get(name, shape)
        },
    }
    if any(problems.values()):
        told = ", ".join(f"{kind} {first_few(names, 10)}" for kind, names in problems.items() if names)
        raise UserError(f"{path} differs from {describe(config)}, which it resembles: {told}")
