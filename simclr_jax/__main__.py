"""The command `simclr-jax`, and `python -m simclr_jax`: the same as `python -m simclr_jax.main`."""

import sys

from simclr_jax.process import stopping


def main() -> None:
    stopping.take_signals()  # the next import takes seconds
    from simclr_jax import main

    sys.modules["__main__"].__doc__ = main.__doc__  # --help shows it
    main.run()


if __name__ == "__main__":
    main()
