"""Nearest neighbours of frozen features, against scikit-learn."""

import numpy as np
import pytest
from conftest import run_task, tiny_config
from sklearn.neighbors import KNeighborsClassifier

from simclr_jax import pretrained, supervised
from simclr_jax.config import validation
from simclr_jax.evaluation import probes
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow


def test_agrees_with_scikit_learn_on_the_same_features(pretrained_run, tmp_path):
    settings = {"pretrained": str(pretrained_run), "k": 15, "temperature": 0.1}
    summary = run_task("knn", tmp_path, **settings)
    config = tiny_config("knn", **settings)
    train, held_out = map(pretrained.make_extract(config), supervised.load_labelled(config, tmp_path))
    model = KNeighborsClassifier(15, metric="cosine", weights=lambda distance: np.exp(-distance / 0.1))
    assert summary["top1"] == pytest.approx(model.fit(*train).score(*held_out), abs=0.005)
    assert summary["examples"] == 360 and summary["top1"] < summary["top5"] <= 1


@pytest.mark.parametrize("settings", [{"k": 0}, {"temperature": 0.0}])
def test_settings_without_votes_are_user_errors(settings):
    [(key, value)] = settings.items()
    with pytest.raises(UserError, match=rf"{key}={value}: set --config.{key} to a number above 0"):
        validation.check(tiny_config("knn", **settings), file="digits")


def test_more_neighbours_than_images_are_said_and_unlabelled_ones_left_out(tmp_path, monkeypatch, capsys):
    def pixels(source):
        labels = np.where(np.arange(source.num_examples) % 2, source.labels, -1).astype(np.int32)
        return probes.Features(
            source.records[..., 0].reshape(source.num_examples, -1).astype(np.float32), labels
        )

    monkeypatch.setattr(pretrained, "make_extract", lambda config: pixels)
    summary = run_task("knn", tmp_path, k=5000)
    assert "note: all 718 training images vote, fewer than k=5000" in capsys.readouterr().out
    assert summary["examples"] == 180 and summary["top1"] > 0.8
