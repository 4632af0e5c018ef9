"""The command `simclr-jax`, and `python -m simclr_jax`: `simclr_jax.main`, or a verb, `check` or `status`."""

import runpy
import sys

from simclr_jax.process import stopping

_VERBS = {"check": "simclr_jax.check", "status": "simclr_jax.workdir.status"}


def main() -> None:
    stopping.take_signals()  # the next import takes seconds
    if sys.argv[1:2] and sys.argv[1] in _VERBS:
        runpy.run_module(_VERBS[sys.argv.pop(1)], run_name="__main__", alter_sys=True)
        return
    from simclr_jax import main

    sys.modules["__main__"].__doc__ = main.__doc__  # --help shows it
    main.run()


if __name__ == "__main__":
    main()
