"""Predictions for every image: rows in order, probabilities, and what labels tell of them."""

import csv
import json

import numpy as np
import pytest
from conftest import run_task, stop_at_part
from etils import epath
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits

import simclr_jax
from simclr_jax import pretrained
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
    assert list(rows[0]) == ["name", "label", "probability", "label (class)", "label (class) (class)", "null"]
    assert [row["name"] for row in rows] == sorted(path.name for path in (photos / "photos").iterdir())
    files = [photos / "photos" / row["name"] for row in rows]
    images = [np.asarray(Image.open(path))[..., None] for path in files]
    expected = simclr_jax.load(classifier[0]).predict(images)
    actual = np.array([[row[name] for name in list(row)[3:]] for row in rows], float)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    classes = np.array(["label", "label (class)", "null"])
    assert [row["label"] for row in rows] == classes[actual.argmax(axis=1)].tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], actual.max(axis=1))
    table = parquet.read_table(workdir / "predictions.parquet")
    assert table.column_names == list(rows[0]) and table["name"].to_pylist() == [row["name"] for row in rows]
    np.testing.assert_allclose(table["null"].to_numpy(), actual[:, 2], atol=1e-6)
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
    assert list(rows[0])[3:] == list("0123456789")
    assert summary["labelled"] == 360
    assert summary["top1"] == pytest.approx(np.trace(summary["confusion"]) / 360)


def test_a_temperature_of_the_run_divides_the_logits(classifier, photos, predicted, tmp_path):
    run = epath.Path(tmp_path / "run")
    run.mkdir()
    for name in ("config.json", "checkpoints"):
        (tmp_path / "run" / name).symlink_to(classifier[0] / name)
    (run / "summary.json").write_text(json.dumps({"calibration_temperature": 0.25}))
    summary = run_task("predict", tmp_path / "predicted", pretrained=str(run), **dataset_of(photos))
    assert summary["calibration_temperature"] == 0.25

    def probabilities(workdir):
        return np.array([[row[name] for name in list(row)[3:]] for row in rows_in(workdir)], float)

    odds = probabilities(predicted[0]) ** 4
    expected = odds / odds.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities(tmp_path / "predicted"), expected, rtol=1e-3)
    images = [np.asarray(Image.open(path))[..., None] for path in sorted((photos / "photos").iterdir())[:5]]
    np.testing.assert_allclose(simclr_jax.load(run).predict(images), expected[:5], rtol=1e-3)


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
