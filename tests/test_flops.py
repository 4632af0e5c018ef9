"""The model FLOPs of a step, against sums by hand and against its gradient as jax computes it."""

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_config

from simclr_jax import supervised
from simclr_jax.models import make_init, make_model, on_cpu
from simclr_jax.parallel import AXIS
from simclr_jax.plan import cost
from simclr_jax.profiling import flops
from simclr_jax.tasks import pretrain


def shapes(*all_of_them):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in all_of_them]


def test_a_product_counts_once_and_once_more_for_each_gradient():
    data, first, second = shapes((5, 3), (3, 4), (4, 2))
    one, two = 2 * 5 * 3 * 4, 2 * 5 * 4 * 2

    def loss(params, data):
        return ((data @ params[0]) @ params[1]).sum()

    assert flops.training_flops(loss, (first, second), data) == 2 * one + 3 * two
    assert flops.training_flops(
        lambda second, first, data: loss((first, second), data), second, first, data
    ) == (one + 2 * two)


def test_what_no_gradient_reaches_counts_forwards_alone():
    data, weights = shapes((5, 3), (3, 3))

    def loss(weights, data):
        return (jax.lax.stop_gradient(data @ weights) @ weights).sum()

    assert flops.training_flops(loss, weights, data) == (2 + 2) * 2 * 5 * 3 * 3


@pytest.mark.parametrize("again", [lambda function: function, jax.checkpoint])
def test_a_loop_counts_as_often_as_it_runs_and_what_is_computed_again_once(again):
    data, weights = shapes((5, 3), (3, 3))

    def loss(weights, data):
        return jax.lax.scan(again(lambda x, _: (x @ weights, None)), data, length=6)[0].sum()

    # The data itself has no gradient, which only matters before the first round: as if it had.
    assert flops.training_flops(loss, weights, data) == 6 * 3 * 2 * 5 * 3 * 3


def conv(images, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=numbers)


def test_a_convolution_counts_its_window():
    images, first, second = shapes((2, 8, 8, 3), (3, 3, 3, 7), (3, 3, 7, 5))
    one, two = 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3), 2 * (2 * 2 * 2 * 5) * (3 * 3 * 7)

    def loss(params, images):
        return conv(jax.nn.relu(conv(images, params[0])), params[1]).sum()

    assert flops.training_flops(loss, (first, second), images) == 2 * one + 3 * two


def parts_of(config, *, task):
    """Loss, parameters, statistics and a batch of one device, of four images."""
    model = make_model(config.model, 10, remat=config.get("remat", False))
    loss = task(model, config)
    variables = jax.eval_shape(make_init(model, 32), jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8) for name in ("view1", "view2", "image")}
    batch["label"] = jax.ShapeDtypeStruct((4,), jnp.int32)

    def value(params, batch_stats, batch):
        return loss(params, batch_stats, batch)[0]

    return value, variables["params"], variables["batch_stats"], batch


@pytest.mark.parametrize("form", [{}, {"microbatches": 2}, {"remat": True}])
def test_pretraining_counts_what_its_gradient_computes_but_nothing_twice(form):
    plain, ours = (
        parts_of(tiny_config("pretrain", **settings), task=pretrain.make_loss) for settings in ({}, form)
    )
    gradient = jax.make_jaxpr(jax.grad(plain[0]), axis_env=[(AXIS, 8)])(*plain[1:])
    assert flops.training_flops(*ours) == cost.count(gradient.jaxpr)[0]


def test_a_frozen_encoder_counts_forwards_alone():
    def task(model, config):
        return supervised.make_loss(model, config, after_block=None)

    loss, params, *others = parts_of(tiny_config("linear_eval"), task=task)
    forward = cost.count(jax.make_jaxpr(loss, axis_env=[(AXIS, 8)])(params, *others).jaxpr)[0]
    head = params["supervised_head"]["kernel"]

    def of_head(head, *others):
        return loss(params_with(head), *others)

    def params_with(head):
        rest = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), params)
        return rest | {"supervised_head": rest["supervised_head"] | {"kernel": head}}

    assert flops.training_flops(of_head, head, *others) == forward + 2 * 4 * head.size


def test_what_cpus_compute_otherwise_counts_as_the_plain_convolution():
    """Once, not once a platform, and for the gradients that there are."""
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    x, kernel = (
        jax.ShapeDtypeStruct((5, 2, 2, 4), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32),
    )
    ours, plain = (
        flops.training_flops(
            lambda kernel, x, convolve=convolve: convolve(
                x, kernel, (1, 1), ((1, 1), (1, 1)), **options
            ).sum(),
            kernel,
            x,
        )
        for convolve in (on_cpu.convolve, jax.lax.conv_general_dilated)
    )
    assert ours == plain > 0
