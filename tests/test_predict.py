"""Predictions for every image: rows in order, probabilities, and what labels tell of them."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from conftest import run_task, stop_at_part
from etils import epath
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits

import simclr_jax
from simclr_jax import pretrained
from simclr_jax.data.sources import digits as digits_source
from simclr_jax.evaluation import doubt
from simclr_jax.plots import page
from simclr_jax.process.errors import UserError
from simclr_jax.tasks import predict

pytestmark = pytest.mark.slow
COUNT = 90


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Digits as files without labels, some of them labelled by CSV: `<row>-<digit>.png`."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    (root / "photos").mkdir()
    lines = ["name,label"]
    for row, (image, digit) in enumerate(zip(digits.images[:COUNT], digits.target)):
        name = f"{row:03d}-{digit}.png"
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(root / "photos" / name)
        if row < 40 and digit < 3:
            lines.append(f"{name},{['null', 'label', 'label (class)'][digit]}")
    (root / "labels.csv").write_text("\n".join(lines))
    return root


def dataset_of(photos, **settings):
    return {"dataset.name": "folder", "dataset.path": str(photos / "photos"), **settings}


@pytest.fixture(scope="module")
def classifier(pretrained_run, photos, tmp_path_factory):
    """The workdir of a linear classifier on those labels, and its summary."""
    workdir = tmp_path_factory.mktemp("classifier") / "run"
    settings = dataset_of(photos, **{"dataset.labels": str(photos / "labels.csv"), "num_steps": 3})
    summary = run_task("linear_eval", workdir, pretrained=str(pretrained_run), **settings)
    return workdir, summary


@pytest.fixture(scope="module")
def predicted(classifier, photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("predicted")
    summary = run_task("predict", workdir, pretrained=str(classifier[0]), **dataset_of(photos))
    return workdir, summary


def rows_in(workdir):
    with open(workdir / "predictions.csv", newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_few_labels_are_cross_validated_and_all_learnt_from(classifier, photos):
    workdir, summary = classifier
    count = len((photos / "labels.csv").read_text().splitlines()) - 1
    assert summary["labels"] == count and summary["folds"] == 5 and 0 <= summary["top1"] <= 1
    assert summary["top1_spread"] >= 0 and summary["top5"] == 1.0
    assert sorted(path.name for path in workdir.glob("fold*")) == [f"fold{i}" for i in range(5)]
    assert pretrained.read(workdir)[1]["class_names"] == ["label", "label (class)", "null"]
    assert simclr_jax.load(workdir).class_names == ("label", "label (class)", "null")


def test_every_image_has_a_row_in_order(classifier, predicted, photos):
    workdir, summary = predicted
    rows = rows_in(workdir)
    assert summary["examples"] == COUNT and "top1" not in summary
    names = ["label (class)", "label (class) (class)", "null"]
    assert list(rows[0]) == ["name", "label", "probability", *names, "margin", "entropy", "unlike"]
    assert [row["name"] for row in rows] == sorted(path.name for path in (photos / "photos").iterdir())
    files = [photos / "photos" / row["name"] for row in rows]
    images = [np.asarray(Image.open(path))[..., None] for path in files]
    expected = simclr_jax.load(classifier[0]).predict(images)
    actual = np.array([[row[name] for name in names] for row in rows], float)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    top = np.sort(actual, axis=1)
    np.testing.assert_allclose([float(row["margin"]) for row in rows], top[:, 2] - top[:, 1], atol=2e-5)
    entropies = -(actual * np.log(actual)).sum(axis=1)
    np.testing.assert_allclose([float(row["entropy"]) for row in rows], entropies, atol=2e-5)
    classes = np.array(["label", "label (class)", "null"])
    assert [row["label"] for row in rows] == classes[actual.argmax(axis=1)].tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], actual.max(axis=1))
    table = parquet.read_table(workdir / "predictions.parquet")
    assert table.column_names == list(rows[0]) and table["name"].to_pylist() == [row["name"] for row in rows]
    np.testing.assert_allclose(table["null"].to_numpy(), actual[:, 2], atol=1e-6)
    np.testing.assert_allclose(page.read_predictions(workdir).probabilities, actual, atol=1e-6)
    assert not (workdir / "parts").exists()


def test_parts_and_stops_change_nothing(classifier, predicted, photos, tmp_path, monkeypatch):
    written = stop_at_part(monkeypatch, 3)
    settings = dataset_of(photos, examples_per_part=32)
    with pytest.raises(KeyboardInterrupt):
        run_task("predict", tmp_path, pretrained=str(classifier[0]), **settings)
    assert written == ["all-000000000.parquet", "all-000000032.parquet"]
    summary = run_task("predict", tmp_path, pretrained=str(classifier[0]), **settings)
    assert (tmp_path / "predictions.csv").read_text() == (predicted[0] / "predictions.csv").read_text()
    again = run_task("predict", tmp_path, pretrained=str(classifier[0]), **settings)
    assert again == summary


def test_two_workers_of_beam_write_the_same_rows(classifier, predicted, photos, tmp_path):
    pytest.importorskip("apache_beam")
    settings = dataset_of(photos, examples_per_part=32, beam="--runner=DirectRunner --direct_num_workers=2")
    summary = run_task("predict", tmp_path, pretrained=str(classifier[0]), **settings)
    assert summary == predicted[1]
    rows, expected = rows_in(tmp_path), rows_in(predicted[0])
    assert [(row["name"], row["label"]) for row in rows] == [(row["name"], row["label"]) for row in expected]
    numbers = [
        [[float(row["probability"]), float(row["unlike"])] for row in table] for table in (rows, expected)
    ]
    np.testing.assert_allclose(*numbers, atol=1e-5)


def test_labels_tell_accuracy_by_the_names_of_classes(classifier, photos, tmp_path):
    for digit, name in enumerate(["null", "label", "seven"]):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for path in (photos / "photos").glob(f"*-{digit}.png"):
            (tmp_path / "photos" / name / path.name).write_bytes(path.read_bytes())
    summary = run_task("predict", tmp_path / "run", pretrained=str(classifier[0]), **dataset_of(tmp_path))
    rows = rows_in(tmp_path / "run")
    labelled = [
        (row["name"].split("/")[0], row["label"]) for row in rows if not row["name"].startswith("seven")
    ]
    assert summary["labelled"] == len(labelled) < len(rows)
    assert all(row["truth"] == row["name"].split("/")[0] for row in rows)
    assert summary["top1"] == pytest.approx(np.mean([one == other for one, other in labelled]))
    classes = ["label", "label (class)", "null"]
    expected = [[labelled.count((true, said)) for said in classes] for true in classes]
    assert summary["confusion"] == expected and expected[1] == [0, 0, 0]
    shares = {name: row[i] / sum(row) for i, (name, row) in enumerate(zip(classes, expected)) if sum(row)}
    assert summary["per_class"] == pytest.approx(shares) and list(shares) == ["label", "null"]
    with Image.open(tmp_path / "run" / "confusion.png") as picture:
        assert picture.size[0] > 100


def test_examples_without_names_are_called_by_split_and_index(finetuned_run, tmp_path):
    summary = run_task("predict", tmp_path, pretrained=str(finetuned_run), splits="eval")
    rows = rows_in(tmp_path)
    assert [row["name"] for row in rows] == [f"eval/{index}" for index in range(360)]
    assert list(rows[0])[3:] == [*"0123456789", "margin", "entropy", "unlike", "truth"]
    assert [row["truth"] for row in rows[:3]] == [
        str(digit) for digit in digits_source.load("eval").labels[:3]
    ]
    assert summary["labelled"] == 360
    assert summary["top1"] == pytest.approx(np.trace(summary["confusion"]) / 360)


def with_temperature(classifier, run, temperature):
    """The same classifier in another workdir, whose summary has this temperature."""
    run.mkdir()
    for name in ("config.json", "checkpoints"):
        (run / name).symlink_to(classifier / name)
    (run / "summary.json").write_text(json.dumps({"calibration_temperature": temperature}))
    return run


def test_a_temperature_of_the_run_divides_the_logits(classifier, photos, predicted, tmp_path):
    run = with_temperature(classifier[0], tmp_path / "run", 0.25)
    summary = run_task("predict", tmp_path / "predicted", pretrained=str(run), **dataset_of(photos))
    assert summary["calibration_temperature"] == 0.25

    def probabilities(workdir):
        return np.array([[row[name] for name in list(row)[3:6]] for row in rows_in(workdir)], float)

    odds = probabilities(predicted[0]) ** 4
    expected = odds / odds.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities(tmp_path / "predicted"), expected, rtol=1e-3)
    images = [np.asarray(Image.open(path))[..., None] for path in sorted((photos / "photos").iterdir())[:5]]
    np.testing.assert_allclose(simclr_jax.load(run).predict(images), expected[:5], rtol=1e-3)


def test_labels_of_low_probability_stay_empty(classifier, photos, predicted, tmp_path, capsys):
    everything = rows_in(predicted[0])
    bound = float(np.median([float(row["probability"]) for row in everything]))
    settings = dataset_of(photos, at_least=bound)
    summary = run_task("predict", tmp_path, pretrained=str(classifier[0]), **settings)
    rows = rows_in(tmp_path)
    empty = [float(row["probability"]) < bound for row in everything]
    assert [row["label"] == "" for row in rows] == empty and 0 < sum(empty) < COUNT
    assert summary["without_label"] == sum(empty)
    assert f"{sum(empty)} of {COUNT} labels are empty: their probability" in capsys.readouterr().out
    assert [row | {"label": ""} for row in rows] == [row | {"label": ""} for row in everything]


def test_other_images_than_the_labelled_ones_are_unlike_them(classifier, predicted, photos, tmp_path):
    labelled = {line.split(",")[0] for line in (photos / "labels.csv").read_text().splitlines()[1:]}
    unlike = {row["name"]: float(row["unlike"]) for row in rows_in(predicted[0])}
    assert max(unlike[name] for name in labelled) == 0  # Each is its own nearest one.
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for row in range(20):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "photos" / f"{row}.png")
    # The classifier may have moved.
    moved = shutil.copytree(classifier[0], tmp_path / "moved")
    run_task("predict", tmp_path / "run", pretrained=str(moved), **dataset_of(tmp_path))
    noise = [float(row["unlike"]) for row in rows_in(tmp_path / "run")]
    others = [value for name, value in unlike.items() if name not in labelled]
    assert np.mean(noise) > np.mean(others) + 0.1
    (moved / "labelled.npz").unlink()
    run_task("predict", tmp_path / "without", pretrained=str(moved), **dataset_of(tmp_path))
    assert list(rows_in(tmp_path / "without")[0])[-2:] == ["margin", "entropy"]


def test_quantiles_of_distances_among_labelled_images(tmp_path):
    angles = np.array([0.0, 0.1, 0.3, 1.3])
    doubt.save(epath.Path(tmp_path), 5 * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    labelled = doubt.load(epath.Path(tmp_path))
    np.testing.assert_allclose(labelled.distances, 1 - np.cos([0.1, 0.1, 0.2, 1.0]), atol=1e-6)
    shares = doubt.unlike(labelled, np.cos([0, 0.05, 0.15, 0.5, 2]))
    np.testing.assert_array_equal(shares, [0, 0, 0.5, 0.75, 1])


def test_probabilities_that_are_all_alike_are_said(classifier, photos, tmp_path, capsys):
    run = with_temperature(classifier[0], tmp_path / "run", 20.0)
    run_task("predict", tmp_path / "predicted", pretrained=str(run), **dataset_of(photos))
    said = capsys.readouterr().out
    assert re.search("note: no probability is above 0.3[34], where chance is 0.33: the classifier has", said)
    assert "note: without the column unlike" in said


def test_a_network_without_a_classifier_is_refused(tmp_path, photos):
    run = tmp_path / "run"
    run_task("pretrain", run, num_steps=1, **dataset_of(photos, batch_size=64))
    with pytest.raises(UserError, match="holds no classifier: give the workdir of a linear_eval, finetune"):
        run_task("predict", tmp_path / "predicted", pretrained=str(run), **dataset_of(photos))
    assert not (tmp_path / "predicted" / "parts").exists()


def test_predictions_are_counted_and_a_class_of_nearly_all_is_said(tmp_path, capsys):
    path = tmp_path / "predictions.csv"
    predict._say_counts(path, ["cat"] * 16 + ["dog"] * 4)
    assert capsys.readouterr().out == f"{path}: cat 16, dog 4\n"
    predict._say_counts(path, ["cat"] * 17 + ["dog"] * 3)
    assert "note: 17 of 20 images are 'cat': unless they are indeed, label more" in capsys.readouterr().out
    predict._say_counts(path, ["cat"] * 19)
    assert "note" not in capsys.readouterr().out
