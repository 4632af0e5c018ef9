"""The recipe of views and the batches of pretraining, also with a program's own view."""

import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import log_of
from test_api import TINY

import simclr_jax
from configs import base
from simclr_jax.views import recipe

pytestmark = pytest.mark.slow


def brighten(image, seed):
    """A view that is a resized image times a random factor."""
    image = tf.image.resize(tf.cast(image, tf.float32) / 255, (16, 16))
    return image * tf.random.stateless_uniform([], seed, 0.5, 1.0)


def too_large(image, seed):
    return tf.image.resize(tf.cast(image, tf.float32) / 255, (20, 20))


def test_the_recipe_is_that_of_the_config():
    config = base.pretrain()
    assert recipe.make_recipe(config.augment) == recipe.DEFAULT
    config.augment.update(min_area=0.3, flip=False, color_jitter_strength=0.5, blur=False)
    made = recipe.make_recipe(config.augment)
    assert made == recipe.DEFAULT._replace(min_area=0.3, flip=False, color_jitter_strength=0.5, blur=False)
    supervised = base.linear_eval(base.pretrain())
    assert recipe.make_recipe(supervised.augment).min_area == 0.08


def test_a_view_of_ones_own_trains_and_is_named_in_the_summary(tmp_path):
    config = simclr_jax.get_config("digits", TINY | {"num_steps": 4, "checkpoint_every_steps": 2})
    seen = []

    def spy(image, seed):
        seen.append(image.shape)
        return brighten(image, seed)

    summary = simclr_jax.run(config, tmp_path / "run", view=spy)
    assert seen and summary["view"].endswith("spy")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["view"] == summary["view"]
    losses = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
    simclr_jax.run(config, tmp_path / "recipe")
    assert losses != [line["loss"] for line in log_of(tmp_path / "recipe") if "loss" in line]
    assert "view" not in json.loads((tmp_path / "recipe" / "summary.json").read_text())


def test_a_run_goes_on_with_the_same_view_only(tmp_path):
    config = simclr_jax.get_config("digits", TINY | {"num_steps": 4, "checkpoint_every_steps": 2})

    def stop(step, metrics):
        if step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        simclr_jax.run(config, tmp_path / "run", stop, view=brighten)
    with pytest.raises(simclr_jax.UserError, match="holds a run with view=brighten, but here it is None"):
        simclr_jax.run(config, tmp_path / "run")
    assert simclr_jax.run(config, tmp_path / "run", view=brighten)["steps"] == 4
    simclr_jax.run(config, tmp_path / "whole", view=brighten)
    whole, resumed = log_of(tmp_path / "whole"), log_of(tmp_path / "run")
    assert whole[-1]["loss"] == resumed[-1]["loss"]


@pytest.mark.parametrize(
    "task, keys, view, expected",
    [
        ("digits", {"augment.on_device": True}, brighten, "augment.on_device=True"),
        ("digits:knn", {"pretrained": "run"}, brighten, "a view for the task knn"),
        ("digits", {}, "brighten", "view='brighten': expected a function"),
        (
            "digits",
            {},
            too_large,
            r"view\(\) returns float32 of shape \(20, 20, 3\): expected uint8, or float32",
        ),
    ],
)
def test_views_that_cannot_be_are_one_line(task, keys, view, expected, tmp_path):
    keys = keys | (TINY | {"num_steps": 2} if task == "digits" else {})
    with pytest.raises(simclr_jax.UserError, match=expected) as raised:
        config = simclr_jax.get_config(task, {k: v for k, v in keys.items() if k != "pretrained"})
        simclr_jax.run(config, tmp_path / "run", view=view)
    assert "\n" not in str(raised.value)


def test_a_view_may_decide_by_the_values_of_an_image():
    """AutoGraph converts conditions in Python, also where a function of its own holds them."""
    from simclr_jax.data import datasets
    from simclr_jax.views import batches

    threshold = 80

    def brightness(image):
        if tf.reduce_mean(tf.cast(image, tf.float32)) > threshold:
            return 1.0
        return 0.0

    config = simclr_jax.get_config("digits", TINY)
    source = datasets.load(config.dataset, "train", seed=0)

    def view(image, seed):
        return tf.fill([16, 16, 3], brightness(image))

    batch = next(batches.train_batches(config, source, view, 0))
    bright = source.records[batch["index"]].mean((1, 2, 3)) > threshold
    assert 0 < bright.sum() < len(bright)
    np.testing.assert_array_equal(batch["view1"].min((1, 2, 3)), 255 * bright)


def test_views_of_bytes_are_handed_over_as_they_are(tmp_path):
    from simclr_jax.data import datasets
    from simclr_jax.views import batches

    config = simclr_jax.get_config("digits", TINY)
    source = datasets.load(config.dataset, "train", seed=0)

    def plain(image, seed):
        return tf.image.resize_with_crop_or_pad(image, 16, 16)

    batch = next(batches.train_batches(config, source, plain, 0))
    assert batch["view1"].dtype == np.uint8
    np.testing.assert_array_equal(batch["view1"], batch["view2"])
    np.testing.assert_array_equal(batch["view1"][:, 4:12, 4:12], source.records[batch["index"]])
