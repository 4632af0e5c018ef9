"""The features of pretraining beside those of an untrained network and raw pixels."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import run_task, tiny_config

from simclr_jax import parallel
from simclr_jax.data import datasets, pipeline
from simclr_jax.evaluation import judge
from simclr_jax.evaluation.features import Features
from simclr_jax.models import make_init, make_model
from simclr_jax.process.errors import UserError
from simclr_jax.views import batches

pytestmark = pytest.mark.slow


@pytest.mark.journey
def test_untrained_is_the_untrained_network_whatever_the_run_starts_from(pretrained_run, tmp_path, capsys):
    """And the console says what is measured, and of what there is too little."""
    settings = {"num_steps": 1, "evaluate.compare": True, "evaluate.max_examples": 24, "seed": 3}
    summaries = [
        run_task("pretrain", tmp_path / "scratch", **settings),
        run_task("pretrain", tmp_path / "started", pretrained=str(pretrained_run), **settings),
    ]
    scratch, started = summaries
    for space in ("features", "projection"):
        assert started["health"][f"untrained_{space}"] == scratch["health"][f"untrained_{space}"]
        assert started["health"][space] != scratch["health"][space]
    assert started["untrained"] == scratch["untrained"] and started["raw_pixels"] == scratch["raw_pixels"]
    for summary in summaries:
        spread = summary["few_label_deviation"]
        assert spread.keys() == {"trained", "untrained", "raw_pixels"} and 0 < min(spread.values()) < 0.5
        assert spread["raw_pixels"] == scratch["few_label_deviation"]["raw_pixels"]
        assert "few_labels" not in summary["trained"] and 0 < summary["trained"]["few_label_accuracy"] < 1
    printed = capsys.readouterr().out
    assert printed.count("measuring: trained, untrained, raw pixels\n") == 2
    assert "loss 9.688, contrastive accuracy 0.016" in printed  # by chance: 2 log(127) and 1 of 64
    assert "note: health is that of 24 images, fewer than the features' 32 dimensions" in printed
    assert "classes have fewer training images than labels_per_class=5" in printed


def test_few_images_are_led_to_published_weights(pretrained_run, tmp_path, capsys):
    few = {"dataset.num_examples": 120, "num_steps": 1}
    run_task("pretrain", tmp_path / "scratch", **few)
    assert "note: 120 training images are few to learn from: published weights" in capsys.readouterr().out
    run_task("pretrain", tmp_path / "started", pretrained=str(pretrained_run), **few)
    assert "few to learn from" not in capsys.readouterr().out


def source_of(labels):
    labels = np.array(labels, np.int32)
    return datasets.Source("mine", len(labels), 2, None, np.arange(len(labels)), labels)


def test_only_images_with_labels_are_probed():
    labelled = judge._labelled_only(source_of([0, -1, 1, -1]))
    np.testing.assert_array_equal(labelled.records, [0, 2])
    np.testing.assert_array_equal(labelled.labels, [0, 1])
    whole = source_of([0, 1])
    assert judge._labelled_only(whole) is whole
    with pytest.raises(
        UserError, match="mine has classes, but none .*: set --config.dataset.probe_split and"
    ):
        judge._labelled_only(source_of([-1, -1]))


def test_near_duplicates_across_the_sides_are_noted(capsys):
    rows = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    train, held_out = (Features(part, np.zeros(len(part), int)) for part in (rows[:40], rows[40:]))
    judge._note_copies(train, held_out)
    assert not capsys.readouterr().out
    judge._note_copies(train, Features(np.concatenate([3 * rows[:2], rows[40:]]), np.zeros(22, int)))
    assert "note: 2 of 22 held-out images are near-duplicates of training images" in capsys.readouterr().out


def test_what_is_no_better_than_without_training_is_noted():
    scores = {"knn_accuracy": 0.5, "linear_accuracy": 0.6}
    better = {"knn_accuracy": 0.4, "linear_accuracy": 0.6}
    assert judge.notes({"trained": scores, "untrained": better | {"linear_accuracy": 0.59}}) == []
    notes = judge.notes({"trained": scores, "untrained": scores, "raw_pixels": better})
    assert [note.partition(":")[0].rpartition(" than ")[2] for note in notes] == [
        "those of an untrained network",
        "raw pixels",
    ]
    assert "linear accuracy 0.600 against 0.600" in notes[1] and "knn" not in notes[1]
    assert judge.notes({"health": {}}) == [] and judge.notes({"trained": scores}) == []


@pytest.mark.parametrize("room, kept", [(0, 0), (40_000, 1), (10**6, 3)])
def test_evaluations_read_each_image_once_where_the_devices_keep_them(room, kept, monkeypatch):
    """24 images of 16 pixels are 18 KB, their views 37 KB; three kinds of batches are there."""
    config = tiny_config("pretrain", **{"evaluate.max_examples": 24})
    load = partial(datasets.load, config.dataset, seed=0)
    source, model = load("train"), make_model(config.model, 0)
    scores = judge.Judge(config, model, source, load, partial(batches.views, config, None))
    scores.device_bytes = room
    reads, eval_batches = [], pipeline.eval_batches

    def count(*args, **options):
        reads.append(args)
        return eval_batches(*args, **options)

    monkeypatch.setattr(pipeline, "eval_batches", count)
    variables = parallel.replicate(make_init(model, config.image_size)(jax.random.key(0)))
    assert scores.log(variables) == scores.log(variables)
    assert len(reads) == 6 - kept
