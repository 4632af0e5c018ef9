"""What XLA does slowly on CPUs, done otherwise there, in training: the same numbers, within rounding.

Of a step of configs/digits.py (2 cores, jax 0.10) the gradient of the stem's pool took a sixth, and a third
convolutions of images smaller than their kernel, for which XLA leaves its fast ones. Other platforms get the
plain operations.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def convolve(x, kernel, strides, padding, **options):
    """`lax.conv_general_dilated` of [n, h, w, c]: one product where 3 x 3 gives fewer than 3 x 3 pixels."""
    plain = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    largest = max(-(-side // stride) for side, stride in zip(x.shape[1:3], strides))
    if kernel.shape[:2] != (3, 3) or largest > 2:
        return plain(x, kernel)
    product = functools.partial(_as_product, stride=strides[0], padding=padding[0][0])
    return lax.platform_dependent(x, kernel, cpu=product, default=plain)


def max_pool(x, padding):
    """`nn.max_pool` of 3 x 3 at stride 2, behind a ReLU, whose gradient is 0 where values tie at 0."""
    plain = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=padding)
    twice = functools.partial(_pool_along_both, padding=padding)
    return lax.platform_dependent(x, cpu=twice, default=plain)


def _as_product(x, kernel, *, stride, padding):
    """A product with the matrix [h w c, h' w' c'] that the kernel makes."""
    n, height, width, channels = x.shape
    *sides, _, filters = kernel.shape
    out = [(side + 2 * padding - of) // stride + 1 for side, of in zip((height, width), sides)]
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


def _pool_along_both(x, *, padding):
    for axis in (1, 2):
        size = x.shape[axis]
        if padding == "SAME":
            missing = max(2 * (-(-size // 2) - 1) + 3 - size, 0)
            around = missing // 2, missing - missing // 2
        else:
            around = padding[axis - 1]
        edges = [(0, 0)] * x.ndim
        edges[axis] = around
        length = 2 * ((size + sum(around) - 3) // 2) + 1
        padded = jnp.pad(x, edges, constant_values=-jnp.inf)
        parts = [lax.slice_in_dim(padded, start, start + length, 2, axis) for start in range(3)]
        x = functools.reduce(jnp.maximum, parts)
    return x
