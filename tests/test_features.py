"""Features of a dataset: every example once, in order, on all devices."""

import jax
import numpy as np
import pytest
from conftest import tiny_config

from configs import digits
from simclr_jax.data import datasets
from simclr_jax.evaluation import features
from simclr_jax.models import make_init, make_model

pytestmark = pytest.mark.slow


def batches(images, labels, size):
    """Batches of `size` rows, the last one padded."""
    for start in range(0, len(images), size):
        rows = images[start : start + size]
        missing = size - len(rows)
        yield {
            "image": np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), np.uint8)]),
            "label": np.concatenate([labels[start : start + size], np.full(missing, -1)]),
            "mask": np.arange(size) < len(rows),
        }


def test_features_are_the_models_of_every_row_without_the_padding():
    config = digits.get_config()
    config.model.update(width=0.125, stem="auto")
    model = make_model(config.model, num_classes=3)
    variables = make_init(model, 16)(jax.random.key(0))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (27, 16, 16, 3), np.uint8), rng.integers(0, 3, 27)
    actual = features.make_extract(model)(variables, batches(images, labels, 16))
    expected = jax.jit(model.apply)(variables, images)["features"]
    np.testing.assert_allclose(actual.features, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actual.labels, labels)


def test_layer_of_the_projection_head_is_taken():
    config = digits.get_config()
    config.model.update(width=0.125, stem="auto")
    model = make_model(config.model, num_classes=0)
    variables = make_init(model, 16)(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    extract = features.make_extract(model, lambda outputs: outputs["projection_hiddens"][1])
    actual = extract(variables, batches(images, np.zeros(16, int), 16))
    expected = jax.jit(model.apply)(variables, images)["projection_hiddens"][1]
    np.testing.assert_allclose(actual.features, expected, rtol=1e-4, atol=1e-6)


def test_map_hands_over_every_image_and_returns_every_row_in_order():
    images = np.arange(19 * 12, dtype=np.uint8).reshape(19, 2, 2, 3)

    def sums(variables, batch):
        assert variables.keys() == {"params", "batch_stats"}
        return {"sum": batch["image"].astype(np.float32).sum(axis=(1, 2, 3)) * variables["params"]}

    state = {"params": 2.0, "batch_stats": 0.0, "opt_state": "is left out"}
    rows = features.make_map(sums)(state, batches(images, np.arange(19), 8))
    np.testing.assert_allclose(rows["sum"], 2.0 * images.sum(axis=(1, 2, 3)))
    np.testing.assert_array_equal(rows["label"], np.arange(19))
    assert set(rows) == {"sum", "label"}


def test_raw_pixels_are_the_images():
    images = np.arange(11 * 12, dtype=np.uint8).reshape(11, 2, 2, 3)
    pixels = features.raw_pixels(batches(images, np.arange(11), 8))
    np.testing.assert_allclose(pixels.features, images.reshape(11, 12) / 255, rtol=1e-6)
    np.testing.assert_array_equal(pixels.labels, np.arange(11))


@pytest.mark.parametrize("size", [33, 48, 96])
def test_large_raw_pixels_are_means_over_equal_areas(size):
    images = np.random.default_rng(size).integers(0, 256, (5, size, size, 3), np.uint8)
    pixels = features.raw_pixels(batches(images, np.arange(5), 8)).features.reshape(5, 32, 32, 3)
    fine = images.repeat(32, axis=1).repeat(32, axis=2)  # every area is a whole number of these
    expected = fine.reshape(5, 32, size, 32, size, 3).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


def test_raw_pixels_of_any_size_have_a_bounded_number():
    for size, side in ((8, 8), (32, 32), (300, 32)):
        images = np.full((8, size, size, 3), 51, np.uint8)
        pixels = features.raw_pixels(batches(images, np.arange(8), 8)).features
        assert pixels.shape == (8, 3 * side**2)
        np.testing.assert_allclose(pixels, 0.2, rtol=1e-5)


def test_what_trains_in_microbatches_is_evaluated_by_them():
    config = tiny_config("pretrain", batch_size=64, microbatches=4)
    source = datasets.load(config.dataset, "eval", seed=0, workdir=None)
    rows = [batch["label"][batch["mask"]] for batch in features.batches_of(config, source)]
    assert {len(part) for part in rows[:-1]} == {16}
    np.testing.assert_array_equal(np.concatenate(rows), source.labels)
