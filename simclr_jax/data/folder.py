"""`simclr_jax.data.sources.folder` under the name that programs know it by."""

from simclr_jax.data.sources.folder import IMAGE_TYPES, catalogue, decode, decode_bytes  # noqa: F401
