"""Nearest neighbours of frozen features, against scikit-learn."""

import numpy as np
import pytest
from conftest import run_task, tiny_config
from sklearn.neighbors import KNeighborsClassifier

from simclr_jax import pretrained, supervised


def test_agrees_with_scikit_learn_on_the_same_features(pretrained_run, tmp_path):
    settings = {"pretrained": str(pretrained_run), "k": 15, "temperature": 0.1}
    summary = run_task("knn", tmp_path, **settings)
    config = tiny_config("knn", **settings)
    train, held_out = map(pretrained.make_extract(config), supervised.load_labelled(config, tmp_path))
    model = KNeighborsClassifier(15, metric="cosine", weights=lambda distance: np.exp(-distance / 0.1))
    assert summary["top1"] == pytest.approx(model.fit(*train).score(*held_out), abs=0.005)
    assert summary["examples"] == 360 and summary["top1"] < summary["top5"] <= 1
