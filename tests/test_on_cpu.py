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


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (1, 2), (4, 3), (6, 6)])
def test_convolutions(height, width, stride):
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((5, height, width, 4), (3, 3, 4, 6))
    )
    options = ((stride, stride), ((1, 1), (1, 1)))
    assert_same(
        lambda x, kernel: on_cpu.convolve(x, kernel, *options, **NUMBERS),
        lambda x, kernel: lax.conv_general_dilated(x, kernel, *options, **NUMBERS),
        x,
        kernel,
    )


@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (1, 1))])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (8, 8), (7, 12), (14, 14)])
def test_the_stems_pool_behind_its_relu(height, width, padding):
    x = np.random.default_rng(0).standard_normal((3, height, width, 5)).astype(np.float32)
    assert_same(
        lambda x: on_cpu.max_pool(nn.relu(x), padding),
        lambda x: nn.max_pool(nn.relu(x), (3, 3), (2, 2), padding),
        x,
    )


def test_other_platforms_get_the_plain_operations():
    def stem(x, kernel):
        return on_cpu.max_pool(on_cpu.convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), **NUMBERS), "SAME")

    shapes = jnp.zeros((2, 2, 2, 4)), jnp.zeros((3, 3, 4, 6))
    gradient = jax.jit(jax.grad(lambda *arguments: stem(*arguments).sum()))
    text = {
        platform: gradient.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert all(
        ("stablehlo.convolution" in module) == (platform != "cpu") for platform, module in text.items()
    )
    assert all(("select_and_scatter" in module) == (platform != "cpu") for platform, module in text.items())
