"""The forms for CPUs give what the plain operations give, and other platforms get the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from simclr_jax.models import on_cpu

NUMBERS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def assert_same(ours, plain, *arguments):
    """Values and gradients, by a different weight for every value."""

    def weighed(function):
        def call(*arguments):
            value = function(*arguments)
            weights = np.random.default_rng(1).standard_normal(value.shape).astype(np.float32)
            return (value * weights).sum(), value

        return jax.jit(jax.value_and_grad(call, tuple(range(len(arguments))), has_aux=True))

    actual, expected = weighed(ours)(*arguments), weighed(plain)(*arguments)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def convolutions(stride, padding):
    options = ((stride, stride), ((padding, padding),) * 2)
    return (
        lambda x, kernel: on_cpu.convolve(x, kernel, *options, **NUMBERS),
        lambda x, kernel: lax.conv_general_dilated(x, kernel, *options, **NUMBERS),
    )


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (1, 2), (4, 3), (6, 6)])
def test_images_smaller_than_the_kernel(height, width, stride):
    assert_same(*convolutions(stride, 1), *draw((5, height, width, 4), (3, 3, 4, 6)))


@pytest.mark.parametrize("images, chunk", [(5, 2**19), (5, 1), (7, 9000), (8, 9000)])
@pytest.mark.parametrize("size, stride", [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("height, width", [(8, 8), (7, 10)])
def test_larger_images_and_other_kernels(height, width, size, stride, images, chunk, monkeypatch):
    monkeypatch.setattr(on_cpu, "_CHUNK", chunk)
    arrays = draw((images, height, width, 3), (size, size, 3, 4))
    assert_same(*convolutions(stride, size // 2), *arrays)


@pytest.mark.parametrize("images, chunk", [(5, 2**19), (5, 1), (7, 9000), (8, 9000)])
@pytest.mark.parametrize("height, width", [(4, 4), (5, 8), (6, 7), (9, 9)])
@pytest.mark.parametrize("channels, filters", [(32, 32), (40, 33)])
def test_winograds_algorithm(height, width, channels, filters, images, chunk, monkeypatch):
    monkeypatch.setattr(on_cpu, "_CHUNK", chunk)
    images, kernel = draw((images, height, width, channels), (3, 3, channels, filters))
    assert_same(*convolutions(1, 1), images, kernel * 0.1)


@pytest.mark.parametrize("stride, padding", [(1, 0), (1, 2), (2, 1)])
def test_winograds_algorithm_is_for_one_padding_and_stride(stride, padding):
    images, kernel = draw((5, 8, 8, 32), (3, 3, 32, 32))
    assert_same(*convolutions(stride, padding), images, kernel * 0.1)


def test_winograds_algorithm_is_as_exact_as_the_plain_convolution():
    """The errors of values and gradients against float64 are below 2e-6 of the largest number."""
    images, kernel = draw((8, 12, 12, 64), (3, 3, 64, 64))
    ours, _ = convolutions(1, 1)
    value, pull = jax.vjp(jax.jit(ours), images, kernel)
    (weights,) = draw(value.shape)
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected, of_x, of_kernel = np.zeros(value.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i, j in np.ndindex(3, 3):
        tap = np.s_[:, i : i + 12, j : j + 12]
        expected += padded[tap] @ kernel[i, j].astype(np.float64)
        of_x[tap] += weights @ kernel[i, j].T.astype(np.float64)
        of_kernel[i, j] = np.einsum("nhwc,nhwf->cf", padded[tap], weights, optimize=True)
    for actual, exact in zip((value, *pull(weights)), (expected, of_x[:, 1:-1, 1:-1], of_kernel)):
        assert np.abs(actual - exact).max() < 2e-6 * np.abs(exact).max()


def test_winograds_algorithm_is_for_float32_alone():
    """bfloat16 would lose digits in its sums."""
    arrays = [array.astype(jnp.bfloat16) for array in draw((2, 8, 8, 32), (3, 3, 32, 32))]
    ours, plain = (jax.jit(convolve)(*arrays) for convolve in convolutions(1, 1))
    np.testing.assert_array_equal(ours.astype(np.float32), plain.astype(np.float32))


@pytest.mark.parametrize("size, stride, channels", [(1, 1, 3), (1, 2, 3), (3, 1, 3), (3, 1, 32), (3, 2, 3)])
def test_gradients_inside_vmap_scan_and_remat(size, stride, channels, monkeypatch):
    monkeypatch.setattr(on_cpu, "_CHUNK", 9000)
    images, kernel = draw((3, 5, 8, 8, channels), (size, size, channels, channels + 1))
    arrays = images, kernel * 0.3

    def mapped(convolve):
        return lambda x, kernel: jax.vmap(convolve, (0, None))(x, kernel)

    def scanned(convolve):
        return lambda x, kernel: lax.map(jax.checkpoint(lambda part: convolve(part, kernel)), x)

    ours, plain = convolutions(stride, size // 2)
    assert_same(mapped(ours), mapped(plain), *arrays)
    assert_same(scanned(ours), mapped(plain), *arrays)


@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (1, 1))])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (8, 8), (7, 12), (14, 14)])
def test_the_stems_pool_behind_its_relu(height, width, padding):
    x = np.random.default_rng(0).standard_normal((3, height, width, 5)).astype(np.float32)
    assert_same(
        lambda x: on_cpu.max_pool(nn.relu(x), padding),
        lambda x: nn.max_pool(nn.relu(x), (3, 3), (2, 2), padding),
        x,
    )


@pytest.mark.parametrize(
    "size, stride, pixels, channels",
    [(1, 1, 8, 4), (1, 2, 8, 4), (3, 1, 2, 4), (3, 1, 8, 4), (3, 1, 8, 32), (3, 2, 8, 4), (7, 2, 8, 4)],
)
def test_other_platforms_get_the_plain_convolutions(size, stride, pixels, channels):
    """Their gradients, too: three convolutions, and no product or loop. On CPUs there are fewer."""
    arrays = jnp.zeros((2, pixels, pixels, channels)), jnp.zeros((size, size, channels, 40))
    ours, plain = (
        jax.jit(jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), (0, 1))) for f in convolutions(stride, size // 2)
    )

    def operations(function, platform):
        text = function.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
        return [text.count(f"stablehlo.{name}") for name in ("convolution(", "dot_general", "while")]

    for platform in ("tpu", "cuda"):
        assert operations(ours, platform) == operations(plain, platform) == [3, 0, 0]
    assert operations(ours, "cpu")[0] < 3


def test_the_stems_pool_is_plain_on_other_platforms():
    gradient = jax.jit(jax.grad(lambda x: on_cpu.max_pool(x, "SAME").sum()))
    for platform in ("cpu", "tpu", "cuda"):
        text = gradient.trace(jnp.zeros((2, 8, 8, 4))).lower(lowering_platforms=(platform,)).as_text()
        assert ("select_and_scatter" in text) == (platform != "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_norms_activations_are_normalized(dtype):
    arrays = [array.astype(dtype) for array in draw((3, 4, 4, 5), (5,), (5,), (5,))]
    assert_same(on_cpu.normalize, lambda x, mean, scale, bias: (x - mean) * scale + bias, *arrays)


def test_the_backward_pass_of_batch_norm_subtracts_the_mean_again_on_cpus_alone():
    """The barrier keeps the compiler from reading the difference of the forward pass instead."""
    gradient = jax.jit(jax.grad(lambda *arrays: (on_cpu.normalize(*arrays) ** 2).sum(), (0, 1, 2, 3)))
    arrays = jnp.zeros((2, 8, 8, 4)), *[jnp.zeros(4)] * 3
    for platform in ("cpu", "tpu", "cuda"):
        text = gradient.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("optimization_barrier") == (platform == "cpu")
        assert text.count("stablehlo.subtract") == 1 + (platform == "cpu")
