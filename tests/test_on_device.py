"""Views of images that lie on the devices: TensorFlow's boxes and pixels, and their distributions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from test_augment import (
    OPERATIONS,
    STATISTICS,
    assert_official_boxes,
    assert_quantiles,
    assert_share,
    keys,
    statistics_of,
)

from simclr_jax.views import on_device, recipe

ATOL = 1e-3  # of 255 levels
SQUARE_CROPS = [key for key in keys(OPERATIONS, r"tf2/crop_resize/.*_to_(\d+)x\1") if "float" not in key]


def two_views(images, example, epoch, **settings):
    """Two views of each of these examples, of 32 pixels by default."""
    settings = {"shape": images.shape[1:3], "seed": 0, "size": 32, "recipe": recipe.DEFAULT} | settings
    images = np.moveaxis(images, 3, 1).reshape(len(images), -1)
    example, epoch = np.broadcast_arrays(*(np.asarray(rows, np.int32) for rows in (example, epoch)))
    made = jax.jit(lambda *rows: on_device.two_views(*rows, **settings))(images, example, epoch)
    return np.asarray(made["view1"]), np.asarray(made["view2"])


@pytest.mark.parametrize("key", SQUARE_CROPS)
def test_resized_boxes_are_the_official_ones(key):
    image, box, size = re.fullmatch(r"tf2/crop_resize/(\w+)_box(\w+)_to_(\d+)x\d+", key).groups()
    image, box = OPERATIONS[f"in/{image}"], jnp.array([*map(int, box.split("_"))])
    crop = on_device.crop(jnp.moveaxis(image, 2, 0), box, int(size)) / (255 if image.dtype == np.uint8 else 1)
    np.testing.assert_allclose(crop, OPERATIONS[key], atol=ATOL / 255)


@pytest.mark.parametrize("height, width, size", [(32, 32, 24), (40, 29, 28), (8, 8, 24), (64, 64, 32)])
def test_equal_boxes_give_the_pixels_of_the_host(height, width, size):
    """Also where TensorFlow rounds the places between pixels, to 1,024th."""
    images = np.random.default_rng(0).integers(0, 256, (32, height, width, 3), np.uint8)
    draw_box = jax.vmap(lambda key: on_device.draw_box(key, height, width, 0.08))
    boxes = np.asarray(draw_box(jax.random.split(jax.random.key(1), 32)))
    crops = jax.jit(jax.vmap(lambda planes, box: on_device.crop(planes, box, size)))(
        np.moveaxis(images, 3, 1), boxes
    )
    for image, (y, x, h, w), crop in zip(images, boxes, crops):
        box = tf.cast(image[y : y + h, x : x + w], tf.float32)
        np.testing.assert_allclose(crop, tf.image.resize(box, (size, size), "bicubic"), atol=ATOL)


@pytest.mark.parametrize("case", ["64x64_out32x32", "375x500_out224x224"])
def test_boxes_have_the_official_distribution(case):
    height, width = map(int, case.partition("_")[0].split("x"))
    draw_box = jax.jit(jax.vmap(lambda key: on_device.draw_box(key, height, width, 0.08)))
    boxes = np.asarray(draw_box(jax.random.split(jax.random.key(0), 20_000)))
    assert_official_boxes(boxes, case, height, width)


@pytest.mark.parametrize("min_area, smallest", [(0.01, 0.1), (0.35, 0.35)])
def test_smallest_box(min_area, smallest):
    draw_box = jax.vmap(lambda key: on_device.draw_box(key, 64, 64, min_area))
    boxes = np.asarray(draw_box(jax.random.split(jax.random.key(0), 500)))
    assert smallest <= boxes[:, 2:].prod(axis=1).min() / 64**2 < smallest + 0.03


def test_views_have_the_official_distribution():
    """Of colours, too; bytes make floats near 0 and 1 equal, which the shares of them count."""
    images = STATISTICS["in/img64"][None]
    settings = recipe.DEFAULT._replace(blur=False)
    views = np.concatenate(two_views(images, np.zeros(2000), np.arange(2000), recipe=settings)) / 255
    quantiles = STATISTICS["tf2/v2_s1.0/quantiles"].T
    for name, ours, official in zip(STATISTICS["stat_names"], statistics_of(views).T, quantiles):
        if name not in ("min", "max", "frac_zero", "frac_one"):
            assert_quantiles(ours, official, int(STATISTICS["n_draws"]), name)


def test_views_are_mirrored_where_the_recipe_says_so():
    images = STATISTICS["in/img64"][None]
    made = {}
    for flip in (True, False):
        settings = recipe.DEFAULT._replace(flip=flip, color_jitter_strength=0.0)
        made[flip] = np.concatenate(two_views(images, np.zeros(150), np.arange(150), recipe=settings))
    is_same = (made[True] == made[False]).all((1, 2, 3))
    assert_share(~is_same, 0.5)
    np.testing.assert_allclose(made[True][~is_same].astype(int), made[False][~is_same, :, ::-1], atol=1)


def test_draws_depend_on_seed_epoch_example_and_view():
    """And on nothing else, such as the other rows."""
    images = np.repeat(STATISTICS["in/img64"][None], 3, axis=0)
    views = [
        *two_views(images, [0, 1], 0),
        *two_views(images, [0, 1], 1),
        *two_views(images, [0, 1], 0, seed=1),
    ]
    views = np.concatenate(views)
    assert len(np.unique(views, axis=0)) == len(views) == 12
    again = two_views(images, [2, 1, 0], [0, 0, 1])
    np.testing.assert_array_equal(again[0][1:], [views[1], views[4]])
    np.testing.assert_array_equal(again[1][1:], [views[3], views[6]])
