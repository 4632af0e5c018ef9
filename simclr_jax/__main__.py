"""The command `simclr-jax`, and `python -m simclr_jax`: see `simclr_jax.config.verbs`."""

import sys

from simclr_jax.process import stopping


def main() -> None:
    stopping.take_signals()  # the next import takes seconds
    from simclr_jax.config import verbs

    verbs.main(sys.argv[1:])


if __name__ == "__main__":
    main()
