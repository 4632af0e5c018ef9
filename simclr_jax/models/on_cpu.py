"""Faster forms of operations that XLA computes slowly on CPUs; other platforms get the plain operations.

Both forms are equal within rounding.

In a step of configs/digits.py (2 cores, jax 0.10), the gradient of the stem's pool took a sixth of the time,
and convolutions of images smaller than their kernel, for which XLA has no fast algorithm, took a third.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def convolve(x, kernel, strides, padding, **options):
    """Computes `lax.conv_general_dilated` of x [n, h, w, c].

    On CPUs a 3 x 3 kernel that gives at most 2 x 2 pixels becomes one matrix product.
    """
    plain = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    largest = max(-(-side // stride) for side, stride in zip(x.shape[1:3], strides))
    if kernel.shape[:2] != (3, 3) or largest > 2:
        return plain(x, kernel)
    product = functools.partial(_as_product, stride=strides[0], padding=padding[0][0])
    return lax.platform_dependent(x, kernel, cpu=product, default=plain)


def max_pool(x, padding):
    """Computes `nn.max_pool` of 3 x 3 at stride 2, of x [n, h, w, c] behind a ReLU.

    On CPUs it pools along one axis after the other. Then tied values share the gradient differently; behind a
    ReLU they tie at 0 only, where the ReLU's gradient is 0.
    """
    plain = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=padding)
    separable = functools.partial(_separable_max_pool, padding=padding)
    return lax.platform_dependent(x, cpu=separable, default=plain)


def _as_product(x, kernel, *, stride, padding):
    """Multiplies x by the matrix [h w c, h' w' c'] that the kernel makes."""
    n, height, width, channels = x.shape
    *sides, _, filters = kernel.shape
    out = [(size + 2 * padding - side) // stride + 1 for size, side in zip((height, width), sides)]
    zero = jnp.zeros((channels, filters), kernel.dtype)

    def tap(y, x, out_y, out_x):
        i, j = y - out_y * stride + padding, x - out_x * stride + padding
        return kernel[i, j] if 0 <= i < sides[0] and 0 <= j < sides[1] else zero

    matrix = jnp.block(
        [
            [tap(y, x, out_y, out_x) for out_y in range(out[0]) for out_x in range(out[1])]
            for y in range(height)
            for x in range(width)
        ]
    )
    return (x.reshape(n, -1) @ matrix).reshape(n, *out, filters)


def _separable_max_pool(x, *, padding):
    if padding == "SAME":
        padding = lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), padding)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        length = 2 * ((padded.shape[axis] - 3) // 2) + 1
        parts = [lax.slice_in_dim(padded, start, start + length, 2, axis) for start in range(3)]
        padded = functools.reduce(jnp.maximum, parts)
    return padded
