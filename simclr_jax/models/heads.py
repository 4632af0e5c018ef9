"""The heads on top of the encoder: projection (SimCLR section 4.2) and linear classifier."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from simclr_jax.models.resnet import batch_norm

_initial = nn.initializers.normal(0.01)


def _dense_init(key, shape, dtype=jnp.float32):
    """Draws the same numbers as `_initial`, in one row: XLA compiles that faster."""
    return _initial(key, (math.prod(shape),), dtype).reshape(shape)


class ProjectionHead(nn.Module):
    """The projection g of SimCLR: dense layers, each batch-normalised, with ReLU between them.

    Attributes:
      num_layers: number of layers, all but the last as wide as the features: 0 projects nothing, 1 is linear,
        SimCLR v1 has 2, SimCLR v2 has 3.
      output_dim: width of the last layer.
      kept_layers: number of layers that are built, from the first on; None for all.
      sync_batch_norm: see `resnet.batch_norm`.
      dtype: dtype of the matrix products.
    """

    num_layers: int
    output_dim: int = 128
    kept_layers: int | None = None
    sync_batch_norm: bool = True
    dtype: Any = jnp.float32

    @property
    def projects(self) -> bool:
        """Whether the last layer is built, so that the last output is a projection."""
        return self.num_layers > 0 and self.kept_layers in (None, self.num_layers)

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> list[jax.Array]:
        """Returns the features [b, w] and the output of every built layer, a list of float32 arrays."""
        # The loss compares projections at high precision, and float32 costs nothing here.
        norm = batch_norm(train=train, sync=self.sync_batch_norm, dtype=jnp.float32)
        hiddens = [features]
        for layer in range(self.num_layers if self.kept_layers is None else self.kept_layers):
            last = layer == self.num_layers - 1
            width = self.output_dim if last else features.shape[-1]
            x = nn.Dense(
                width, use_bias=False, kernel_init=_dense_init, dtype=self.dtype, name=f"dense{layer}"
            )(hiddens[-1])
            x = norm(use_bias=not last, name=f"bn{layer}")(x)
            hiddens.append(x if last else nn.relu(x))
        return hiddens


def supervised_head(num_classes: int, *, zero_init: bool = False) -> nn.Dense:
    """Builds a linear classifier in float32: [b, w] -> [b, num_classes]."""
    return nn.Dense(num_classes, kernel_init=nn.initializers.zeros if zero_init else _dense_init)
