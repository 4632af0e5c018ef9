"""Checks the variables in files of other programs against a network of this package."""

from simclr_jax.models import describe
from simclr_jax.process import UserError, first_few


def check_variables(path: str, config, shapes: dict, expected: dict, unknown=frozenset()) -> None:
    """Checks that a file has the variables of the network that it resembles.

    Args:
      path: the file, for the message.
      config: `config.model` of that network.
      shapes, expected: name -> shape, a tuple, in the file and in the network.
      unknown: further names in the file that the network does not have.

    Raises:
      UserError: lists the variables that are missing, unknown or of another shape.
    """
    problems = {
        "missing": expected.keys() - shapes.keys(),
        "unknown": unknown | (shapes.keys() - expected.keys()),
        "of another shape": {
            f"{name} {shape} instead of {expected[name]}"
            for name, shape in shapes.items()
            if shape != expected.get(name, shape)
        },
    }
    if any(problems.values()):
        message = ", ".join(f"{kind} {first_few(names, 10)}" for kind, names in problems.items() if names)
        raise UserError(f"{path} differs from {describe(config)}, which it resembles: {message}")
