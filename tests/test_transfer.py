"""Logistic regression on frozen features, with the L2 weight chosen on validation examples."""

import numpy as np
import pytest
from conftest import run_task, tiny_config
from sklearn.linear_model import LogisticRegression

from simclr_jax import supervised
from simclr_jax.data import datasets
from simclr_jax.evaluation import features
from simclr_jax.evaluation.features import Features
from simclr_jax.tasks import transfer

pytestmark = pytest.mark.slow


def test_agrees_with_scikit_learn_at_the_chosen_weight(tmp_path, monkeypatch):
    weights = np.logspace(-2, 3, 6)
    monkeypatch.setattr(transfer, "L2_WEIGHTS", weights)
    monkeypatch.setattr(transfer, "_save", lambda *_: None)  # there is no network
    monkeypatch.setattr(features, "make_pretrained_extract", lambda config, proportion: pixels)
    summary = run_task("transfer", tmp_path)
    config = tiny_config("transfer")
    train, held_out = map(pixels, supervised.load_labelled(config, tmp_path))
    fitted, validation = transfer.hold_out(train, seed=config.seed)
    scores = {
        l2: LogisticRegression(C=1 / l2, max_iter=5000).fit(*fitted).score(*validation) for l2 in weights
    }
    assert summary["validation"] == pytest.approx(max(scores.values()), abs=0.005)
    assert scores[summary["l2"]] == pytest.approx(max(scores.values()), abs=0.005)
    chosen = LogisticRegression(C=1 / summary["l2"], max_iter=5000).fit(*train)
    assert summary["top1"] == pytest.approx(chosen.score(*held_out), abs=0.005)
    predictions = chosen.predict(held_out.features)
    by_class = [(predictions[held_out.labels == label] == label).mean() for label in range(10)]
    assert summary["mean_per_class"] == pytest.approx(np.mean(by_class), abs=0.005)


def pixels(source):
    return Features(source.records[..., 0].reshape(source.num_examples, -1) / 255, source.labels)


def test_weights_are_the_papers():
    assert len(transfer.L2_WEIGHTS) == 45
    assert transfer.L2_WEIGHTS.min() == pytest.approx(1e-6) and transfer.L2_WEIGHTS.max() == pytest.approx(
        1e5
    )


def test_mean_per_class_weighs_classes_alike():
    always_first = Features(np.tile([1.0, 0.0], (4, 1)), np.array([0, 0, 0, 1]))
    scores = transfer.score(always_first)
    assert scores["top1"] == 0.75 and scores["mean_per_class"] == 0.5 and scores["top5"] == 1


def test_class_weights_raise_the_accuracy_of_small_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "L2_WEIGHTS", np.array([1e4]))
    monkeypatch.setattr(transfer, "_save", lambda *_: None)
    monkeypatch.setattr(features, "make_pretrained_extract", lambda config, proportion: pixels)
    load = supervised.load_labelled

    def load_uneven(*arguments):
        source, held_out = load(*arguments)
        few = np.concatenate([np.flatnonzero(source.labels == digit)[4:] for digit in range(5)])
        return datasets.subset(source, np.setdiff1d(np.arange(source.num_examples), few)), held_out

    monkeypatch.setattr(supervised, "load_labelled", load_uneven)
    plain = run_task("transfer", tmp_path)
    even = run_task("transfer", tmp_path, class_weights="balanced")
    assert even["balanced_accuracy"] > plain["balanced_accuracy"] + 0.1
    assert even["balanced_accuracy"] == pytest.approx(even["mean_per_class"])
    assert even["per_class"]["3"] > plain["per_class"]["3"]
    assert even["top1"] == pytest.approx(np.trace(even["confusion"]) / np.sum(even["confusion"]))


def test_a_fifth_of_every_class_validates():
    labels = np.repeat([0, 1, 2], [50, 10, 5])
    train, validation = transfer.hold_out(Features(np.arange(65.0)[:, None], labels), seed=0)
    np.testing.assert_array_equal(np.bincount(validation.labels), [10, 2, 1])
    rows = np.concatenate([train.features, validation.features]).ravel()
    np.testing.assert_array_equal(np.sort(rows), np.arange(65))


def test_images_without_labels_are_left_out(tmp_path, monkeypatch):
    def half(source):
        examples = pixels(source)
        return examples._replace(labels=np.where(np.arange(source.num_examples) % 2, examples.labels, -1))

    monkeypatch.setattr(transfer, "L2_WEIGHTS", np.array([1.0]))
    monkeypatch.setattr(transfer, "_save", lambda *_: None)
    monkeypatch.setattr(features, "make_pretrained_extract", lambda config, proportion: half)
    assert run_task("transfer", tmp_path)["top1"] > 0.9


def test_no_group_is_validated_with_and_learnt_from():
    labels, groups = np.repeat([0, 1], 50), np.arange(100) // 5
    examples = Features(np.arange(100.0)[:, None], labels)
    train, validation = transfer.hold_out(examples, groups, seed=0)
    sides = [set(groups[part.features.ravel().astype(int)]) for part in (train, validation)]
    assert not sides[0] & sides[1] and len(sides[1]) == 4 and set(validation.labels) == {0, 1}
    assert not len(transfer.hold_out(examples, np.zeros(100), seed=0)[1].labels)


def test_folds_and_their_weights_keep_groups_together(tmp_path, monkeypatch):
    """Images of a group are the same: weights would be weak if any were validated with and learnt from."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 6)
    labels = rng.integers(0, 2, 30)[groups]
    source = supervised.load_labelled(tiny_config("transfer"), tmp_path)[0]
    source = source._replace(num_examples=180, num_classes=2, class_names=("a", "b"), labels=labels)
    source = source._replace(groups=groups.astype(str))
    examples = Features(rng.normal(size=(30, 40)).astype(np.float32)[groups], labels)
    monkeypatch.setattr(supervised, "load_labelled", lambda *_: (source, None))
    monkeypatch.setattr(features, "make_pretrained_extract", lambda config, proportion: lambda _: examples)
    monkeypatch.setattr(transfer, "_save", lambda *_: None)
    summary = run_task("transfer", tmp_path)
    assert summary["folds"] == 5 and summary["top1"] < 0.8 and summary["validation"] < 0.9
