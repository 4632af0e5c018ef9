"""The names of `data.decode` and `data.sources.folder` that other programs import from here."""

from simclr_jax.data.decode import IMAGE_TYPES, decode, decode_bytes  # noqa: F401
from simclr_jax.data.sources.folder import catalogue  # noqa: F401
