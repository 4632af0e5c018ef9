"""Mirroring, colour and blur on the devices: the official operations, the host's pixels, and the same run."""

import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import log_of, run_task, tiny_config

from simclr_jax.data import augment, datasets
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


ALL = {
    "vertical_flip": True,
    "rotate": True,
    "brightness": 0.5,
    "contrast": 0.3,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale": 0.5,
    "drop_channel": 0.5,
    "solarize": 0.2,
}


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_any_channels_are_distorted_as_on_the_host(channels, dtype):
    rng = np.random.default_rng(0)
    followed = recipe.DEFAULT._replace(dtype=dtype, **ALL)
    for seed in range(6):
        image = rng.integers(0, 256, (20, 24, channels), np.uint8)
        image = image if dtype == "uint8" else image / np.float32(255)
        made = augment.two_views(
            image, [seed, 1], 16, followed, dtype="uint8" if dtype == "uint8" else "float32"
        )
        pairs = augment.two_crops(image, [seed, 1], 16, followed, dtype="float32")
        for view, (crop, draws) in zip(made, pairs):
            assert draws.shape == (recipe.Recipe.num_draws(channels),)
            there = distort.distort(jnp.asarray(crop)[None], jnp.asarray(draws)[None], followed)
            assert there.dtype == dtype and there.shape == (1, 16, 16, channels)
            apart = np.abs(np.asarray(there[0], np.float32) - np.asarray(view, np.float32))
            assert np.quantile(apart, 0.99) <= (1 if dtype == "uint8" else 1e-3)


def test_channels_get_their_own_colour_and_one_of_them_may_be_dropped():
    crops, still = (
        jnp.full((400, 4, 4, 4), 100.0),
        {"color_jitter_strength": 0.0, "blur": False, "flip": False},
    )
    draws = jax.random.uniform(jax.random.key(0), (400, recipe.Recipe.num_draws(4)))
    views = distort.distort(
        crops, draws, recipe.DEFAULT._replace(**still | {"brightness": 0.5, "jitter_probability": 1})
    )
    values = np.asarray(views[:, 0, 0], float)
    assert (
        np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.2
        and 49 <= values.min() < 60 < 140 < values.max() <= 150
    )
    dropped = np.asarray(
        distort.distort(crops, draws, recipe.DEFAULT._replace(drop_channel=0.4, **still)) == 0
    )
    assert (dropped.all((1, 2)).sum(1) <= 1).all() and 0.3 < dropped.all((1, 2)).any(1).mean() < 0.5
    assert (dropped[:, 0, 0].mean(0) > 0.05).all()


@pytest.mark.parametrize("where", ["host", "device"])
def test_noise_is_a_sensors(where):
    """Its variance rises with the value, from a tenth of that of white."""
    followed = recipe.Recipe(noise=0.1, blur=False, jitter_probability=0.0, grayscale=0.0, dtype="float16")
    draws = np.full((1, recipe.Recipe.num_draws(2)), 0.999, np.float32)
    for value in (0.4, 0.8):
        crops = jnp.full((1, 96, 96, 2), value * 255)
        if where == "device":
            view = distort.distort(crops, jnp.asarray(draws), followed)[0]
        else:
            view = augment._distort(np.asarray(crops[0]) / 255, 1.0, draws[0], followed, "float32")
        assert np.mean(view) == pytest.approx(value, abs=0.01)
        assert np.std(view) == pytest.approx(0.0999 * np.sqrt(0.9 * value + 0.1), rel=0.05)


@pytest.mark.parametrize("turns", range(4))
def test_quarter_turns_are_exact(turns):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.float32)
    draw = np.float32((turns + 0.5) / 4)
    planes = augment._rotate(np.moveaxis(image, -1, 0), draw)
    np.testing.assert_array_equal(np.moveaxis(planes, 0, -1), np.rot90(image, turns))
    still = recipe.Recipe(rotate=True, blur=False, flip_probability=0, jitter_probability=0, grayscale=0)
    turned = distort.distort(image[None], jnp.full((1, len(recipe.DRAWS)), draw), still)
    np.testing.assert_array_equal(turned[0], np.rot90(image, turns))
