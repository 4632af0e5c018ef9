"""Mirroring, colour and blur on the devices: the official operations, the host's pixels, and the same run."""

import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import log_of, run_task, tiny_config

from simclr_jax.data import datasets
from simclr_jax.views import batches, distort, recipe

GOLDENS = pathlib.Path(__file__).parent / "goldens"
OPERATIONS, COLORS = (dict(np.load(GOLDENS / f"{name}.npz")) for name in ("augment", "augment_color"))
ATOL = 1e-5


def planes_of(images):
    images = images / np.float32(255) if images.dtype == np.uint8 else images
    return tuple(jnp.moveaxis(jnp.asarray(images), -1, 0))


def test_jitter_in_every_order_equals_official():
    """All orders in one batch, on an image that the factors clip."""
    brightness, contrast, saturation, hue = COLORS["jitter_order/factors_b_c_s_h"]
    factors = [(f - 1 + 0.8) / 1.6 for f in (brightness, contrast, saturation)] + [(hue + 0.2) / 0.4]
    orders = [tuple(order) for order in recipe.ORDERS]
    draws = [
        [(orders.index(tuple(order)) + 0.5) / 24, *factors] for order in COLORS["jitter_order/perms"].tolist()
    ]
    draw = dict(zip(("order", *recipe.OPERATIONS), np.array(draws, np.float32).T))
    images = planes_of(np.repeat(COLORS["tf2/brightness_v2/img12_f1.0"][None], len(draws), 0))
    jitter = jax.jit(lambda images, draw: distort._jitter(images, draw, recipe.DEFAULT))
    jittered = jitter(images, draw | {"jitter": np.full(len(draws), 0.79)})
    np.testing.assert_allclose(np.stack(jittered, -1), COLORS["tf2/jitter_order/img12"], atol=ATOL)
    untouched = jitter(images, draw | {"jitter": np.full(len(draws), 0.81)})
    np.testing.assert_array_equal(np.stack(untouched, -1), np.stack(images, -1))


@pytest.mark.parametrize("key", [key for key in COLORS if re.match(r"tf2/(saturation|hue)/", key)])
def test_color_operation_equals_official(key):
    operation, image, factor = re.fullmatch(r"tf2/([a-z]+)/(\w+)_[fd](.+)", key).groups()
    planes = planes_of(COLORS[f"in/{image}"])
    value, least = distort._extremes(planes)
    adjusted = getattr(distort, f"_{operation}")(planes, value, value - least, float(factor))
    np.testing.assert_allclose(np.stack(adjusted, -1), COLORS[key], atol=ATOL)


def test_blur_equals_official():
    [key] = [key for key in OPERATIONS if key.startswith("tf2/blur_batch/")]
    kernel_size, sigma = re.search(r"_k(\d+)_s(.+)", key).groups()
    images = jnp.moveaxis(OPERATIONS["in/batch12"], -1, 1)
    sigmas = jnp.full(len(images), float(sigma))
    blurred = jnp.moveaxis(distort._blur(images, sigmas, int(kernel_size) // 2), 1, -1)
    np.testing.assert_allclose(blurred, OPERATIONS[key], atol=ATOL)
    untouched = distort._blur(images, 0 * sigmas + distort._NO_BLUR, int(kernel_size) // 2)
    np.testing.assert_array_equal(untouched, images)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return datasets.load(tiny_config("pretrain").dataset, "train", seed=0, workdir=None)


@pytest.mark.parametrize("dtype, share", [("float32", 1e-4), ("float16", 0.04)])
@pytest.mark.parametrize(
    "strength, blur, solarize, size, flip",
    [(1.0, True, 0.0, 40, True), (0.5, False, 0.5, 28, True), (0.5, True, 0.2, 28, False)],
)
def test_pixels_are_those_of_the_host(source, dtype, share, strength, blur, solarize, size, flip):
    """Within one of 256 levels, by the same draws, in the same order; float16 rounds a few per cent over."""
    settings = {"color_jitter_strength": strength, "blur": blur, "flip": flip, "crop_dtype": dtype}
    settings |= {"solarize": solarize}
    settings = {f"augment.{name}": value for name, value in settings.items()} | {"image_size": size}
    host = next(batches.train_batches(tiny_config("pretrain", **settings), source, None, 3))
    config = tiny_config("pretrain", **settings, **{"augment.on_device": True})
    crops = next(batches.train_batches(config, source, None, 3))
    expected = {name: (value.shape, value.dtype) for name, value in batches.batch_shapes(config, 64).items()}
    assert {name: (value.shape, value.dtype) for name, value in crops.items() if name != "index"} == expected
    for name in ("label", "index"):
        np.testing.assert_array_equal(crops[name], host[name])
    followed = recipe.make_recipe(config.augment)
    for view in "12":
        made = distort.distort(crops[f"view{view}"], crops[f"draws{view}"], followed)
        assert made.dtype == np.uint8
        apart = np.abs(np.asarray(made, int) - host[f"view{view}"])
        assert apart.max() <= 1 and (apart > 0).mean() < share
    assert (host["view1"] != host["view2"]).any()


@pytest.mark.journey
@pytest.mark.slow
def test_a_run_goes_on_either_way(tmp_path):
    """The same examples and losses from the third step on, whichever side distorts them."""
    settings = {"num_steps": 6, "log_every_steps": 1, "checkpoint_every_steps": 3, "augment.blur": True}
    run_task("pretrain", tmp_path, **settings)
    straight = {line["step"]: line["loss"] for line in log_of(tmp_path) if "loss" in line}
    log = tmp_path / "metrics.jsonl"
    for on_device in (True, False):
        shutil.rmtree(tmp_path / "checkpoints" / "6")
        # Steps that are in the log are not written again.
        log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines()[:4]))
        switched = {"augment.on_device": on_device, "augment.crop_dtype": "float32"}
        run_task("pretrain", tmp_path, **settings, **switched)
        losses = {line["step"]: line["loss"] for line in log_of(tmp_path) if "loss" in line}
        assert list(losses) == list(straight)
        np.testing.assert_allclose(list(losses.values()), list(straight.values()), rtol=1e-4)
