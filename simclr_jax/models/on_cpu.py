"""Faster forms of operations that XLA computes slowly on CPUs; other platforms get the plain operations.

Both forms are equal within rounding.

Five are slow there (2 cores, jax 0.10): convolutions of images smaller than their kernel; those of 3 x 3 at
stride 1, for which Winograd's algorithm needs 4 of 9 multiplications; gradients of kernels, which XLA
computes as convolutions whose window is the whole image (from 8 pixels a side on mostly at a half to a fifth
of the rate of products of matrices); the gradient of the stem's pool; and that of batch norm, for which the
forward pass writes x - mean to memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

_CHUNK = 2**18  # Numbers of the operand of a product: 1 MB stays in the cache.

# Winograd's F(2 x 2, 3 x 3) of Lavin and Gray (arXiv 1509.09308, section 4.1): 4 x 4 pixels of the input make
# 2 x 2 of the output. These are B^T, G and A^T there.
_INPUT = (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)
_KERNEL = (1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)
_OUTPUT = (1, 1, 1, 0), (0, 1, -1, -1)


def convolve(x, kernel, strides, padding, **options):
    """Computes `lax.conv_general_dilated` of x [n, h, w, c].

    On CPUs a 1 x 1 kernel at stride 1 and a 3 x 3 kernel that gives at most 2 x 2 pixels become one matrix
    product; in float32 a 3 x 3 kernel at stride 1 and its input's gradient follow Winograd; the gradients of
    1 x 1 and all other kernels become products of matrices. The last two take some images at a time.
    """
    plain = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    largest = max(-(-side // stride) for side, stride in zip(x.shape[1:3], strides))
    if kernel.shape[:2] == (3, 3) and largest <= 2:
        on_cpu = functools.partial(_as_product, stride=strides[0], padding=padding[0][0])
    elif kernel.shape[:2] == (1, 1) and strides[0] == 1:
        on_cpu = _with_products_for_gradient(_pixelwise, strides, padding)
    elif _suits_winograd(x, kernel, strides, padding):
        on_cpu = _winograd
    else:
        on_cpu = _with_products_for_gradient(plain, strides, padding)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


def _suits_winograd(x, kernel, strides, padding):
    """Returns whether Winograd's algorithm is faster: its sums cost as much as few channels' products."""
    *sides, channels, filters = kernel.shape
    same = sides == [3, 3] and strides[0] == 1 and [*map(tuple, padding)] == [(1, 1), (1, 1)]
    return same and x.dtype == jnp.float32 and min(x.shape[1:3]) > 3 and min(channels, filters) >= 32


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
    _, *out, filters = gradient.shape
    *sides, channels, _ = kernel.shape
    window = sides[0] * sides[1] * channels
    take, parts = _parts(len(x), out[0] * out[1] * window)
    axes = [*zip((1, 2), sides, strides, out)]

    def add(total, part):
        rows = jnp.pad(take(x, part), ((0, 0), *padding, (0, 0)))
        for axis, side, stride, places in reversed(axes):  # Both at once would take more slices.
            last = stride * (places - 1) + 1
            taps = [lax.slice_in_dim(rows, tap, tap + last, stride, axis) for tap in range(side)]
            rows = jnp.concatenate(taps, axis=-1)
        neighbourhoods = rows.reshape(-1, window)
        gradients = take(gradient, part).reshape(-1, filters)
        return total + jnp.matmul(gradients.T, neighbourhoods, preferred_element_type=jnp.float32), None

    total, _ = lax.scan(add, jnp.zeros((filters, window)), parts)
    return total.T.reshape(kernel.shape).astype(kernel.dtype)


def _parts(n, numbers):
    """Divides n images, each of which makes so many `numbers` of an operand, into equal parts.

    Returns:
      (array [n, ...], part) -> that part of the array; the parts.
    """
    most = max(1, _CHUNK // numbers)
    size = max(size for size in range(1, min(n, most) + 1) if n % size == 0)
    # A loop over slices keeps x once; a loop over the rows of x reshaped makes a copy for each loop.
    return lambda x, part: lax.dynamic_slice_in_dim(x, part * size, size), jnp.arange(n // size)


@jax.custom_vjp
def _winograd(x, kernel):
    """Convolves x [n, h, w, c] with a kernel [3, 3, c, f] at stride 1, padded by 1."""
    n, height, width, channels = x.shape
    transformed = np.kron(_KERNEL, _KERNEL).astype(kernel.dtype) @ kernel.reshape(9, -1)
    kernels = transformed.reshape(4, 4, *kernel.shape[2:])
    take, parts = _parts(n, 4 * height * width * channels)

    def convolve(part):
        inputs = _transform(_INPUT, _tiles(take(x, part)))
        products = [[a @ b for a, b in zip(*rows)] for rows in zip(inputs, kernels)]
        rows = [jnp.stack(row, 3) for row in _transform(_OUTPUT, products)]
        y = jnp.stack(rows, 2)  # [size, h / 2, 2, w / 2, 2, f]
        return y.reshape(len(y), 2 * y.shape[1], 2 * y.shape[3], -1)[:, :height, :width]

    y = lax.map(convolve, parts)
    return y.reshape(n, *y.shape[2:])


def _winograd_backward(saved, gradient):
    x, kernel = saved
    input_gradient = _winograd(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    return input_gradient, _kernel_gradient(x, gradient, kernel, (1, 1), ((1, 1), (1, 1)))


_winograd.defvjp(lambda x, kernel: (_winograd(x, kernel), (x, kernel)), _winograd_backward)


def _tiles(x):
    """Returns the pixels [n, h / 2, w / 2, c] at each place of the 4 x 4 tiles of x [n, h, w, c]."""
    out = [side + side % 2 for side in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *((1, 1 + side % 2) for side in x.shape[1:3]), (0, 0)))
    return [[x[:, i : i + out[0] : 2, j : j + out[1] : 2] for j in range(4)] for i in range(4)]


def _transform(matrix, rows):
    """Computes matrix @ rows @ matrix.T, of rows of arrays."""

    def combine(arrays):
        return [sum(weight * array for weight, array in zip(line, arrays) if weight) for line in matrix]

    columns = [combine(column) for column in zip(*rows)]
    return [combine(row) for row in zip(*columns)]


def normalize(x, mean, scale, bias):
    """Computes (x - mean) * scale + bias, of x [..., c] and arrays [c].

    On CPUs the backward pass computes x - mean again instead of reading it from memory. Elsewhere that would
    make a tenth more traffic, by the compilers for TPU v4 and H100.
    """

    def plain(x, mean, scale, bias):
        return (x - mean) * scale + bias

    return lax.platform_dependent(x, mean, scale, bias, cpu=jax.checkpoint(plain), default=plain)


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
    n, *sides, _ = x.shape
    *taps, _, filters = kernel.shape
    out = [(side + 2 * padding - count) // stride + 1 for side, count in zip(sides, taps)]

    def taps_of(axis):
        """Returns the tap between each pixel and output, [side, out]; where there is none, the last one."""
        tap = np.arange(sides[axis])[:, None] + padding - np.arange(out[axis]) * stride
        return np.where((tap >= 0) & (tap < taps[axis]), tap, taps[axis])

    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))  # Its last taps are 0.
    matrix = kernel[taps_of(0)[:, None, :, None], taps_of(1)[:, None]].transpose(0, 1, 4, 2, 3, 5)
    return (x.reshape(n, -1) @ matrix.reshape(x[0].size, -1)).reshape(n, *out, filters)


def _separable_max_pool(x, *, padding):
    if padding == "SAME":
        padding = lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), padding)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        length = 2 * ((padded.shape[axis] - 3) // 2) + 1
        parts = [lax.slice_in_dim(padded, start, start + length, 2, axis) for start in range(3)]
        padded = functools.reduce(jnp.maximum, parts)
    return padded
