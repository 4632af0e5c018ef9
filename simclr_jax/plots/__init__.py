"""Pictures of a run: `python -m simclr_jax.plots RUN`"""
