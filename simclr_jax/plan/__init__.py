"""Plans the cost of a config before it runs: `python -m simclr_jax.plan --config=FILE --topology=v4:4x4x8`"""
