"""Faster forms of operations that XLA computes slowly on CPUs; other platforms get the plain operations.

Both forms are equal within rounding.

Three are slow there (2 cores, jax 0.10): convolutions of images smaller than their kernel; gradients of
kernels, which XLA computes as convolutions whose window is the whole image (from 8 pixels a side on mostly at
a half to a fifth of the rate of products of matrices); and the gradient of the stem's pool.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_CHUNK = 2**19  # Numbers of a matrix of neighbourhoods: 2 MB stay in the cache.


def convolve(x, kernel, strides, padding, **options):
    """Computes `lax.conv_general_dilated` of x [n, h, w, c].

    On CPUs a 1 x 1 kernel at stride 1 and a 3 x 3 kernel that gives at most 2 x 2 pixels become one matrix
    product; the gradients of all other kernels become products of matrices, some images at a time.
    """
    plain = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    largest = max(-(-side // stride) for side, stride in zip(x.shape[1:3], strides))
    if kernel.shape[:2] == (3, 3) and largest <= 2:
        on_cpu = functools.partial(_as_product, stride=strides[0], padding=padding[0][0])
    elif kernel.shape[:2] == (1, 1) and strides[0] == 1:
        on_cpu = _pixelwise
    else:
        on_cpu = _with_products_for_gradient(plain, strides, padding)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


def _pixelwise(x, kernel):
    return x @ kernel[0, 0]


def _with_products_for_gradient(plain, strides, padding):
    """Gives a convolution another gradient of its kernel."""

    def backward(saved, gradient):
        x, kernel = saved
        (of_x,) = jax.vjp(lambda x: plain(x, kernel), x)[1](gradient)
        return of_x, _kernel_gradient(x, gradient, kernel, strides, padding)

    convolution = jax.custom_vjp(plain)
    convolution.defvjp(lambda x, kernel: (plain(x, kernel), (x, kernel)), backward)
    return convolution


def _kernel_gradient(x, gradient, kernel, strides, padding):
    """Sums products of the output's gradient [n h' w', o] and the neighbourhoods in x [n h' w', k k c]."""
    n, *out, filters = gradient.shape
    *sides, channels, _ = kernel.shape
    window = sides[0] * sides[1] * channels
    most = max(1, _CHUNK // (out[0] * out[1] * window))
    size = min(n, 2 ** (most.bit_length() - 1))  # a power of two, which mostly divides n
    parts = -(-n // size)
    images, gradients = (
        jnp.pad(rows, ((0, parts * size - n), (0, 0), (0, 0), (0, 0))).reshape(parts, size, *rows.shape[1:])
        for rows in (x, gradient)  # images of zeros add nothing
    )

    def add(total, part):
        images, gradient = part
        images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
        taps = [
            images[:, i : i + strides[0] * out[0] : strides[0], j : j + strides[1] * out[1] : strides[1]]
            for i in range(sides[0])
            for j in range(sides[1])
        ]
        neighbourhoods = jnp.concatenate(taps, axis=-1).reshape(-1, window)
        gradient = lax.optimization_barrier(gradient.reshape(-1, filters).T)  # else the product is slower
        return total + jnp.matmul(gradient, neighbourhoods, preferred_element_type=jnp.float32), None

    total, _ = lax.scan(add, jnp.zeros((filters, window)), (images, gradients))
    return total.T.reshape(kernel.shape).astype(kernel.dtype)


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
