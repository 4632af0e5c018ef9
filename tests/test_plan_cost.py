"""The counted cost of a step, against sums by hand."""

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_config

from simclr_jax.models import make_model
from simclr_jax.plan import cost, forecast
from simclr_jax.process.errors import UserError
from simclr_jax.profiling import chips

pytestmark = pytest.mark.slow


def count(function, *shapes, axis=None):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return cost.count(jax.make_jaxpr(function, axis_env=[axis] if axis else None)(*arguments).jaxpr)


def test_products_and_convolutions_are_counted():
    assert count(lambda a, b: a @ b, (3, 4), (4, 5)) == (2 * 3 * 4 * 5, 4 * (12 + 20 + 15), {})
    convolve = jax.lax.conv_general_dilated

    def conv(x, kernel, stride=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return convolve(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)

    flops, _, _ = count(conv, (2, 8, 8, 3), (5, 5, 3, 7))
    assert flops == 2 * (2 * 8 * 8 * 7) * (5 * 5 * 3)
    forward, *_ = count(lambda x, k: conv(x, k, 2), (2, 8, 8, 3), (3, 3, 3, 7))
    whole, *_ = count(jax.grad(lambda x, k: conv(x, k, 2).sum(), (0, 1)), (2, 8, 8, 3), (3, 3, 3, 7))
    assert whole == 3 * forward  # forward, by the image and by the kernel


def test_loops_count_as_often_as_they_run():
    def loop(a, b):
        return jax.lax.scan(lambda a, _: (a @ b, None), a, length=6)[0]

    assert count(loop, (3, 3), (3, 3)) == (6 * 2 * 27, 6 * 4 * 27, {})


def test_resnet_50_has_the_published_operations(monkeypatch):
    config = tiny_config("pretrain")
    config.model.update(depth=50, width=1.0, stem="imagenet")
    model = make_model(config.model, 0)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images.shape)))
    flops, *_ = cost.count(jax.make_jaxpr(model.apply)(variables, images).jaxpr)
    assert flops == pytest.approx(2 * 4.1e9, rel=0.02)  # 4.1 G multiply-adds, torchvision's table


def test_collectives_are_counted_with_their_bytes():
    def step(x):
        total = jax.lax.psum(x, "batch")
        return jax.lax.scan(lambda c, _: (c, jax.lax.all_gather(x, "batch")), total, length=2)

    flops, _, collectives = count(step, (4, 5), axis=("batch", 8))
    assert flops == 0 and collectives == {"psum": (1, 80), "all_gather": (2, 160)}


def test_chips_are_found_by_what_jax_calls_them():
    names = ["TPU v5 lite", "TPU v5", "TPU v4", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "cpu"]
    memory = [chips.find_chip(name) and chips.find_chip(name).memory for name in names]
    assert memory == [16, 95, 32, 59.3, 59.4, None]


def test_roofline_takes_the_peaks_of_the_chip():
    plan = {"kind": "TPU v5 lite", "devices": 4, "flops": 197e12, "bytes": 819e9 / 2, "parameters": 1}
    plan["collectives"] = {"psum": (1, 4e9), "all_gather": (1, 1e9), "reduce_scatter": (1, 4e9)}
    assert cost.roofline(plan) == pytest.approx({"compute": 1.0, "memory": 0.5, "links": 12e9 / 200e9})
    assert cost.roofline(plan | {"kind": "cpu"}) == {}


@pytest.mark.parametrize(
    "kind, views, within",
    [
        ("TPU v4", 3410, 0.05),
        ("TPU v3", 938, 0.05),
        ("NVIDIA A100-SXM4-80GB", 2180, 0.3),
        ("NVIDIA H100 80GB HBM3", 5991, 0.1),
    ],
)
def test_expected_steps_are_near_published_ones(kind, views, within):
    """docs/planning.md has their sources: ResNet-50, bfloat16, of which 128 views are these operations."""
    plan = {"kind": kind, "devices": 1, "hosts": 1, "num_steps": 1, "memory": {}, "collectives": {}}
    plan |= {"flops": 3113.2e9, "bytes": 16.67e9}
    expected = forecast.forecast(plan, tiny_config("pretrain"))
    assert 128 / expected["step"] == pytest.approx(views, rel=within)
    assert 128 / expected["least"] > views


def test_step_is_measured_on_the_devices_at_hand():
    config = tiny_config("pretrain")
    plan = cost.measure(config, "local")
    assert plan["devices"] == 8 and plan["hosts"] == 1 and plan["kind"] == "cpu"
    batches = config.batch_size // 8 * 2 * config.model.projection_dim * 4
    assert plan["collectives"]["all_gather"] == (2, batches)
    # Gradients, once, and batch norm's sums.
    assert plan["collectives"]["psum"][1] >= 4 * plan["parameters"]
    assert plan["memory"]["arguments"] > 4 * 2 * plan["parameters"]
    # Both go forward once more, which is a third of a plain step.
    for change in ({"microbatches": 4}, {"microbatches": 1, "remat": True}):
        config.update(change)
        assert 1.2 * plan["flops"] < cost.measure(config, "local")["flops"] < 1.4 * plan["flops"]


def test_unknown_sizes_and_uneven_batches_are_user_errors():
    config = tiny_config("pretrain", **{"dataset.name": "food101"})
    with pytest.raises(UserError, match="size of 'food101' is not known .*num_examples"):
        cost.measure(config, "local")
    config = tiny_config("pretrain", microbatches=3)
    with pytest.raises(UserError, match="batch_size=64 .* of 3 microbatches each"):
        cost.measure(config, "local")


def test_images_that_lie_on_a_device_are_counted():
    """In the size of the views, and the products that make the views of them."""
    config = tiny_config("pretrain", batch_size=16)
    plans = []
    for on_device in (None, True):  # None is False on CPUs
        config.dataset.on_device = on_device
        plans.append(cost.compile_step(config, jax.devices()[:1])[1])
    assert "images" not in plans[0]["memory"] and plans[1]["memory"]["images"] == 1437 * 16 * 16 * 3
    # Two products for each of 32 views, and three channels; the digits are not blurred.
    products = 32 * 3 * 2 * (2 * 16**3)
    assert plans[1]["flops"] - plans[0]["flops"] == products and plans[1]["bytes"] > plans[0]["bytes"]


@pytest.mark.parametrize(
    "file, lie_there", [("cifar10", True), ("stl10", True), ("imagenet", False), ("folder", False)]
)
def test_known_small_datasets_are_expected_on_accelerators(file, lie_there):
    config = importlib.import_module(f"configs.{file}").get_config()
    config.dataset.num_examples = config.dataset.num_examples or {"folder": 100}.get(file)
    examples = cost.Examples.from_config(config.dataset)
    on = lambda kind: cost._images_on(SimpleNamespace(device_kind=kind), config, examples)  # noqa: E731
    assert (on("TPU v4") is not None) == lie_there and on("cpu") is None
