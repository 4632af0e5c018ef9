"""Images of five channels and 12 bits, from files to features, predictions, exports and the page."""

import numpy as np
import pytest
from conftest import run_task, tiny_config
from PIL import Image
from sklearn.datasets import load_digits
from test_readers import DEEP, tiff

import simclr_jax
from simclr_jax import pretrained
from simclr_jax.evaluation import stored
from simclr_jax.export import __main__ as export
from simclr_jax.plots import __main__ as plots
from simclr_jax.process import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        pixels = np.roll(DEEP[:20, :20], number, 0) // (1 + number % 2 * np.array([0, 0, 0, 0, 9], np.uint16))
        (root / "ab"[number % 2] / f"{number}.tif").write_bytes(tiff(pixels))
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    views = {"rotate": True, "vertical_flip": True, "drop_channel": 0.5, "noise": 0.1, "on_device": True}
    summary = run_task(
        "pretrain",
        workdir,
        **{"dataset.name": "folder", "dataset.path": str(folder), "batch_size": 16, "num_steps": 2},
        **{f"augment.{key}": value for key, value in views.items()},
    )
    assert summary["health"]["features"]["dimensions"] > 0
    return workdir


def settings(folder, run, task):
    config = tiny_config(
        task, **{"dataset.name": "folder", "dataset.path": str(folder), "pretrained": str(run)}
    )
    pretrained.inherit_settings(config, {"batch_size": 8})
    config.batch_size = 8
    return config


def test_features_of_files_are_those_of_load_and_of_arrays(folder, run):
    config = settings(folder, run, "embed")
    assert (config.dataset.channels, config.model.channels) == (5, 5)
    high = config.dataset.value_range[1]
    assert high == 4095
    simclr_jax.run(config, run / "embed")
    embedded = stored.read(run / "embed", config)
    encoder = simclr_jax.load(run)
    paths = [folder / name for name in embedded.names]
    features = encoder(paths)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, embedded.features, atol=2e-3)  # float16 behind the pipeline
    np.testing.assert_allclose(encoder([DEEP]), encoder([(DEEP / np.float32(high))]), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="where c is 5"):
        encoder(np.zeros((2, 16, 16, 3), np.uint8))


def test_a_classifier_predicts_and_other_channels_are_refused(folder, run, tmp_path):
    simclr_jax.run(settings(folder, run, "transfer"), tmp_path / "classifier")
    config = settings(folder, tmp_path / "classifier", "predict")
    assert simclr_jax.run(config, tmp_path / "predicted")["examples"] == 24
    config = tiny_config("knn", pretrained=str(run))
    pretrained.inherit_settings(config, {})
    with pytest.raises(UserError, match="digits .* has 3 channels, the network 5"):
        simclr_jax.run(config, tmp_path / "digits")


def test_exports_and_pictures(run):
    export.main([str(run), "--format=savedmodel"])
    card = (run / "export" / "savedmodel" / "README.md").read_text()
    assert "images have 5 channels" in card and "were 0 and 4095 in its files" in card and ", 5)" in card
    plots.main([str(run)])
    assert (run / "plots" / "index.html").exists() and (run / "plots" / "views.png").exists()


def test_scores_by_groups_tell_a_class_from_the_colour_of_its_groups(tmp_path):
    """Every patient has a background colour and one class, which the digits do not tell: chance is a half."""
    images, rng = load_digits().images[:600], np.random.default_rng(0)
    for patient in range(40):
        colour = rng.integers(0, 256, 3)
        path = tmp_path / "photos" / "ab"[patient % 2] / f"patient{patient}"
        path.mkdir(parents=True)
        for number, image in enumerate(images[patient::40] / 16):
            pixels = np.kron(colour + np.multiply.outer(image, 255 - 2 * colour), np.ones((2, 2, 1)))
            Image.fromarray(pixels.astype(np.uint8)).save(path / f"{number}.png")
    keys = {"dataset.name": "folder", "dataset.path": str(tmp_path / "photos")}
    views = {"augment.color_jitter_strength": 0.0, "augment.grayscale": 0.0}
    run_task("pretrain", tmp_path / "run", num_steps=80, **keys, **views)
    scores = {}
    for group in (None, "2"):
        config = tiny_config("knn", **keys, pretrained=str(tmp_path / "run"))
        pretrained.inherit_settings(config, {"dataset.group": group})
        config.dataset.group = group
        scores[group] = simclr_jax.run(config, tmp_path / f"knn{group}")["top1"]
    assert scores[None] > 0.9 and scores["2"] < 0.75, scores
