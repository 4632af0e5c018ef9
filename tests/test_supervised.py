"""The shared parts of training with labels: loss, what it leaves alone, labels and evaluation."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from conftest import run_task, tiny_config

from simclr_jax import checkpoint, losses, parallel, supervised, train
from simclr_jax.data import datasets, pipeline
from simclr_jax.evaluation.features import Features
from simclr_jax.evaluation.held_out import labelled_by_csv
from simclr_jax.models import make_init, make_model
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return make_model(tiny_config("finetune").model, 10, whole_projection=False)


@pytest.fixture(scope="module")
def variables(model):
    variables = make_init(model, 16)(jax.random.key(0))
    kernel = 0.1 * jax.random.normal(
        jax.random.key(1), variables["params"]["supervised_head"]["kernel"].shape
    )
    variables["params"]["supervised_head"]["kernel"] = kernel
    return variables


def batch_of(rows=32):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (rows, 16, 16, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, 10, rows).astype(np.int32)}


def test_loss_is_the_cross_entropy_in_training_mode_or_in_eval_mode(model, variables):
    batch = batch_of()
    for after_block in (-1, None):
        loss = supervised.make_loss(model, tiny_config("finetune"), after_block=after_block)
        value, (batch_stats, results) = jax.jit(loss)(variables["params"], variables["batch_stats"], batch)
        apply = jax.jit(partial(model.apply, train=after_block == -1, mutable=["batch_stats"]))
        outputs = apply(variables, batch["image"])[0]
        assert value == pytest.approx(float(losses.softmax_cross_entropy(outputs["logits"], batch["label"])))
        assert results["accuracy"] == (outputs["logits"].argmax(axis=1) == batch["label"]).mean()
        same = jax.tree.map(lambda a, b: bool((a == b).all()), batch_stats, variables["batch_stats"])
        assert jax.tree.all(same) == (after_block is None)


def test_lars_decays_the_classifier_in_the_loss(model, variables):
    config = tiny_config("finetune")
    kernel = variables["params"]["supervised_head"]["kernel"]
    for name, weight_decay, expected in [("lars", 0.1, 0.05 * (kernel**2).sum()), ("sgd", 0.1, 0)]:
        config.optimizer.name, config.optimizer.weight_decay = name, weight_decay
        assert supervised.head_decay(config.optimizer, variables["params"]) == pytest.approx(float(expected))


def test_parameters_behind_a_block():
    paths = [
        "encoder/conv1/kernel",
        "encoder/block_group1_0/conv1/kernel",
        "encoder/block_group3_2/bn1/scale",
    ]
    paths += ["projection_head/dense0/kernel", "supervised_head/kernel"]
    trained = {
        after_block: [supervised.is_after_block(path, after_block=after_block) for path in paths]
        for after_block in (-1, 0, 1, 3)
    }
    assert trained == {
        -1: [True] * 5,
        0: [False, True, True, True, True],
        1: [False, False, True, True, True],
        3: [False, False, False, True, True],
    }
    assert [supervised.is_head(path) for path in paths] == [False] * 4 + [True]


@pytest.mark.parametrize("batch_size", [64, 8, 512])
def test_evaluation_counts_every_example_once(model, variables, batch_size):
    source = datasets.load(tiny_config("finetune").dataset, "eval", seed=0)
    source = datasets.span(source, 0, 83)  # fills neither batches nor devices
    (batch,) = pipeline.eval_batches(source, image_size=16, batch_size=83)
    ranked = np.argsort(-jax.jit(model.apply)(variables, batch["image"])["logits"], axis=1)
    ranks = np.arange(83) % 7  # the label is what the model ranks first, ..., seventh
    source = source._replace(labels=ranked[np.arange(83), ranks].astype(np.int32))
    config = tiny_config("finetune", batch_size=batch_size)
    accuracies = supervised.make_evaluate(config, model, source)(parallel.replicate(variables))
    assert accuracies == {"top1": (ranks < 1).sum() / 83, "top5": (ranks < 5).sum() / 83}


def test_labels_that_may_be_used_are_drawn_and_written_down(tmp_path):
    source = datasets.load(tiny_config("finetune").dataset, "train", seed=0)
    source = source._replace(names=np.array([f"{row}.png" for row in range(source.num_examples)]))
    subset, rows = supervised.draw_labels(source, labels_per_class=3, seed=1, workdir=tmp_path / "run")
    written = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert written["split"] == "digits (train)" and written["rows"] == rows.tolist()
    assert written["names"] == [f"{row}.png" for row in rows]
    np.testing.assert_array_equal(written["labels"], source.labels[rows])
    np.testing.assert_array_equal(np.bincount(subset.labels), [3] * 10)
    np.testing.assert_array_equal(subset.records, source.records[rows])
    whole, rows = supervised.draw_labels(source, labels_per_class=None, seed=1, workdir=tmp_path / "all")
    assert whole is source and len(rows) == 1437 and not (tmp_path / "all").exists()


def test_balanced_draws_bring_every_class_equally_often_and_resume_to_the_bit():
    config = tiny_config("linear_eval", batch_size=16, balanced_draws=True)
    source = few_digits([40, 8, 3] + [0] * 7)
    batches = supervised.batches(config, source, 0)
    drawn = [next(batches) for _ in range(15)]  # two epochs of 3 x 40
    np.testing.assert_array_equal(np.bincount(np.concatenate([b["label"] for b in drawn])), [80, 80, 80])
    rows = datasets.balanced(source, seed=config.seed).records
    copies = np.unique(rows.reshape(len(rows), -1), axis=0, return_counts=True)[1]
    assert len(copies) == 51 and set(copies) == {1, 5, 13, 14}
    again = next(supervised.batches(config, source, 9))
    for name, value in again.items():
        np.testing.assert_array_equal(value, drawn[9][name])
    assert not np.array_equal(drawn[0]["image"], drawn[9]["image"])


def test_class_weights_have_mean_1_over_the_images_and_multiply_their_cross_entropy(tmp_path):
    source = few_digits([6, 3, 1] + [0] * 7)._replace(num_classes=3, class_names=("a", "b", "c"))
    config = tiny_config("linear_eval")
    assert supervised.class_weights(config, source) is None
    config.class_weights = "balanced"
    weights = supervised.class_weights(config, source)
    np.testing.assert_allclose(weights * [6, 3, 1], 10 / 3, rtol=1e-6)
    config.class_weights = str(tmp_path / "weights.csv")
    (tmp_path / "weights.csv").write_text("class;weight\nc;4\na;1\nb;0,5\n")
    weights = supervised.class_weights(config, source)
    np.testing.assert_allclose(weights, np.array([1, 0.5, 4]) / 1.15, rtol=1e-6)
    logits = np.random.default_rng(0).standard_normal((10, 3), np.float32)
    each = [losses.softmax_cross_entropy(logits[i : i + 1], source.labels[i : i + 1]) for i in range(10)]
    value = losses.softmax_cross_entropy(logits, source.labels, weights)
    assert value == pytest.approx(float(np.mean(weights[source.labels] * np.array(each))), rel=1e-5)
    with pytest.raises(
        UserError, match=r"class_weights=balanced needs all labels at the start; set --config"
    ):
        supervised.class_weights(tiny_config("finetune", class_weights="balanced"), source._replace(read=len))


@pytest.mark.parametrize("settings", [{"class_weights": "balanced"}, {"balanced_draws": True}])
def test_small_classes_count_alike(settings, pretrained_run, tmp_path, monkeypatch, capsys):
    parts = {"train": few_digits([120, 120, 8, 8]), "eval": few_digits([30] * 4, "eval")}
    monkeypatch.setattr(datasets, "load", lambda config, split, **_: parts[split])
    options = {"pretrained": str(pretrained_run), "num_steps": 60, "draws": 1, "evaluate.compare": False}
    options |= {"labels_per_class": None}
    plain = run_task("finetune", tmp_path / "plain", **options)
    assert "note: 120 images are 0, 8 are 2: --config.class_weights=balanced" in capsys.readouterr().out
    even = run_task("finetune", tmp_path / "even", **options, **settings)
    assert "note: 120" not in capsys.readouterr().out
    print(plain, even)
    assert even["balanced_accuracy"] > plain["balanced_accuracy"] + 0.1


def test_confusion_is_drawn_and_summarised_by_class(tmp_path, capsys):
    source = few_digits([1] * 3)._replace(class_names=("a", "b", "c"))
    logits = Features(np.eye(3)[[0] * 10 + [0, 1, 1, 2]], np.array([0] * 10 + [1, 1, 1, -1]))
    scores = supervised.scores_of_classes(logits, source, tmp_path)
    assert scores["per_class"] == {"a": 1.0, "b": pytest.approx(2 / 3)}
    assert scores["balanced_accuracy"] == pytest.approx(5 / 6)
    assert scores["confusion"] == [[10, 0, 0], [1, 2, 0], [0, 0, 0]] and (tmp_path / "confusion.png").exists()
    assert "note: the accuracy of a class" not in capsys.readouterr().out
    supervised.class_scores(np.array([[9, 1], [8, 2]]), ("a", "b"), tmp_path)
    assert (
        "note: the accuracy of a class, 0.55 on average, is about that of chance, 0.50"
        in capsys.readouterr().out
    )
    many = supervised.class_scores(np.eye(supervised.MAX_CONFUSION + 1, dtype=int), (), tmp_path)
    assert "confusion" not in many and many["per_class"]["100"] == 1


def test_dataset_without_labels_is_a_user_error(tmp_path, monkeypatch):
    source = datasets.load(tiny_config("linear_eval").dataset, "eval", seed=0)._replace(num_classes=0)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: source)
    with pytest.raises(UserError, match=r"digits \(eval\) has no labels, which linear_eval needs"):
        supervised.load_labelled(tiny_config("linear_eval"), tmp_path)


def test_few_labels_are_not_held_out_and_the_note_tells_how_many_folds(capsys):
    source = datasets.load(tiny_config("linear_eval").dataset, "train", seed=0)
    rows = np.concatenate([np.flatnonzero(source.labels == digit)[:3] for digit in range(10)])
    few = datasets.subset(source, rows)
    labelled, held_out = labelled_by_csv(lambda split: few)
    assert held_out is None and len(labelled.labels) == 30
    assert "30 labels, 3 of the smallest class" in (said := capsys.readouterr().out) and "(3 folds)" in said
    assert labelled_by_csv(lambda split: source)[1] is not None


@pytest.mark.parametrize(
    "per_class, expected", [([1] * 10, "cannot be measured"), ([1] * 9 + [4], "without")]
)
def test_classes_of_one_label_are_not_measured(per_class, expected, capsys):
    few = few_digits(per_class)
    labelled, held_out = labelled_by_csv(lambda split: few)
    assert held_out is None and len(labelled.labels) == sum(per_class)
    assert expected in capsys.readouterr().out


def test_classes_that_are_held_out_alone_are_said(tmp_path, monkeypatch, capsys):
    parts = {"train": few_digits([1] * 8 + [0, 0]), "eval": few_digits([0] * 7 + [1] * 3)}
    monkeypatch.setattr(datasets, "load", lambda _, split, **__: parts[split])
    supervised.load_labelled(tiny_config("knn"), tmp_path)
    assert "2 of 3 held-out images are of classes without training images" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["knn", "transfer", "linear_eval", "finetune"])
def test_one_label_of_each_class_trains_a_classifier_without_an_accuracy(
    task, pretrained_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(supervised, "load_labelled", lambda *_: (few_digits([1] * 10), None))
    steps = {"num_steps": 1} if task in ("linear_eval", "finetune") else {}
    summary = run_task(task, tmp_path, pretrained=str(pretrained_run), **steps)
    assert not {"top1", "from_scratch_top1", "folds"} & set(summary)
    if task == "knn":
        assert summary == {"examples": 10}
        return
    assert summary["labels"] == 10
    _, meta = checkpoint.load_params(tmp_path)
    assert meta["num_classes"] == 10
    if task == "finetune":
        assert "note: all 10 labels are learnt from, not labels_per_class=5" in capsys.readouterr().out


def few_digits(per_class, split="train"):
    """The first digits of each class, so many."""
    source = datasets.load(tiny_config("linear_eval").dataset, split, seed=0)
    rows = [np.flatnonzero(source.labels == digit)[:count] for digit, count in enumerate(per_class)]
    return datasets.subset(source, np.concatenate(rows))


def test_folds_are_judged_on_what_they_have_not_learnt(monkeypatch, tmp_path):
    config = tiny_config("linear_eval")
    source = datasets.subset(datasets.load(config.dataset, "train", seed=0), np.arange(43))
    source = source._replace(names=np.arange(43).astype(str))
    places = []

    def fit(task, config, place):
        places.append(place.name)
        return task.batches.args[1]

    def make_logits(config, model, tested):
        def logits(learnt):
            assert not set(tested.names) & set(learnt.names)
            assert set(tested.names) | set(learnt.names) == set(source.names)
            right = np.eye(10)[tested.labels] * (tested.labels != 3)[:, None]
            return Features(right + np.eye(10)[0] / 2, tested.labels)

        return logits

    monkeypatch.setattr(supervised.train, "fit", fit)
    monkeypatch.setattr(supervised, "make_logits", make_logits)
    task = train.Task(None, None, None, None, None, 1, {})
    summary = supervised.cross_validate(task, config, None, source, tmp_path)
    assert places == [f"fold{number}" for number in range(5)]
    tested = source.labels[np.bincount(source.labels)[source.labels] > 1]
    assert summary["top1"] == pytest.approx(np.mean(tested != 3))
    assert summary["labels"] == 43 and summary["folds"] == 5 and summary["top1_spread"] >= 0
    assert summary["calibration_temperature"] > 0
