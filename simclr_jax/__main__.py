"""The command `simclr-jax`, and `python -m simclr_jax`: the same as `python -m simclr_jax.main`."""

from simclr_jax import stopping


def main() -> None:
    stopping.take()  # before what takes seconds to import
    from simclr_jax.main import run

    run()


if __name__ == "__main__":
    main()
