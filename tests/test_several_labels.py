"""Several labels an image: digits in the corners of a picture, each of which is a label."""

import csv

import numpy as np
import pytest
from conftest import run_task
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import simclr_jax
from simclr_jax import losses
from simclr_jax.config import settings
from simclr_jax.data import labels
from simclr_jax.evaluation import calibration, doubt
from simclr_jax.plots import page
from simclr_jax.process.errors import UserError

NAMES = ["1.png", "2.png", "3.png"]


def read(tmp_path, contents, **options):
    (tmp_path / "labels.csv").write_text(contents)
    return labels.read(str(tmp_path / "labels.csv"), NAMES, "PHOTOS", **options)


def test_cells_and_columns_tell_the_same(tmp_path):
    expected = {"1.png": "cat;dog", "2.png": ";", "3.png": "Cow"}
    cells = 'name;label\n1.png;"dog; cat;dog"\n2.png;";"\n3.png;Cow\n'
    assert read(tmp_path, cells, several=True) == expected
    columns = "dog,name,cat,Cow,\n1,1.png,1,0,\n0,2.png,,0\n,3.png,,1\n"
    assert read(tmp_path, columns, several=True) == expected
    assert read(tmp_path, columns.replace("0,2.png,,0", ",2.png,,"), several=True).keys() == {
        "1.png",
        "3.png",
    }
    with pytest.raises(UserError, match="row 2: dog is 'yes': expected 1 or 0 in the column of a class"):
        read(tmp_path, "name,dog\n1.png,yes\n2.png,1\n", several=True)
    one = read(tmp_path, "name,label\n1.png,cat;dog\n2.png,cat\n")
    assert one == {"1.png": "cat;dog", "2.png": "cat"}
    assert any("cat;dog are classes by themselves: --config.dataset" in line for line in labels.notes(one))
    assert labels.notes(one, several=True) == []


def test_loss_and_temperature_of_independent_classes():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4000, 3)).astype(np.float32)
    targets = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    assert calibration.temperature(3 * logits, targets) == pytest.approx(3, rel=0.1)
    odds = 1 / (1 + np.exp(-logits))
    expected = -np.log(np.where(targets, odds, 1 - odds)).sum(axis=1).mean()
    assert losses.binary_cross_entropy(logits, targets) == pytest.approx(expected, rel=1e-4)
    probabilities = np.array([[0.5, 1.0], [0.9, 0.2]])
    np.testing.assert_allclose(doubt.margins(probabilities, several=True), [0, 0.6])
    np.testing.assert_allclose(doubt.entropies(probabilities, several=True), [0.6931, 0.8255], atol=1e-4)


def test_tasks_of_one_label_an_image_refuse_several():
    given = {"dataset.path": "PHOTOS", "dataset.several_labels": True, "pretrained": "RUN"}
    assert settings.make("configs/folder.py:finetune", given.items(), as_text=False)
    for task in ("pretrain", "transfer", "knn", "distill"):
        with pytest.raises(UserError, match=f"several_labels=True: {task} learns one label an image; leave"):
            settings.make(f"configs/folder.py:{task}", given.items(), as_text=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of 16 x 16 pixels with a 0, a 1, both or neither, labels of most of them, and all labels."""
    root, digits, rng = tmp_path_factory.mktemp("several"), load_digits(), np.random.default_rng(0)
    (root / "photos").mkdir()
    lines = []
    for row in range(440):
        picture = np.zeros((16, 16), np.uint8)
        present = [digit for digit in (0, 1) if row >> digit & 1]
        for digit in present:
            image = digits.images[rng.choice(np.flatnonzero(digits.target == digit))]
            picture[4:12, 8 * digit : 8 * digit + 8] = np.round(image * 255 / 16)
        Image.fromarray(picture).save(root / "photos" / f"{row:03d}.png")
        lines.append(f"{row:03d}.png,{';'.join(['zero', 'one'][digit] for digit in present) or ';'}")
    (root / "labels.csv").write_text("\n".join(["name,label", *lines[:400]]))
    (root / "all.csv").write_text("\n".join(["name,label", *lines]))
    return root


def dataset_of(photos, file, **options):
    dataset = {"name": "folder", "path": str(photos / "photos"), "labels": str(photos / file)}
    dataset |= {"several_labels": True}
    return {f"dataset.{key}": value for key, value in dataset.items()} | options


@pytest.mark.slow
@pytest.mark.parametrize("task", ["finetune", "linear_eval"])
def test_a_sigmoid_head_learns_them(task, photos, pretrained_run, tmp_path):
    options = {"num_steps": 60, "augment.flip": False, "augment.min_area": 0.8}
    if task == "finetune":
        options |= {"labels_per_class": None, "evaluate.compare": False, "draws": 1}
    settings = dataset_of(photos, "labels.csv", pretrained=str(pretrained_run), **options)
    summary = run_task(task, tmp_path / "run", **settings)
    assert not {"top1", "confusion"} & summary.keys() and summary["calibration_temperature"] > 0
    assert summary["average_precision"] == pytest.approx(np.mean([*summary["per_class"].values()]), abs=0.01)
    assert list(summary["per_class"]) == ["one", "zero"]
    # Half of the pictures have each label, which is the average precision of chance.
    assert summary["average_precision"] > (0.95 if task == "finetune" else 0.6)
    predicted = run_task(
        "predict", tmp_path / "out", pretrained=str(tmp_path / "run"), **dataset_of(photos, "all.csv")
    )
    with open(tmp_path / "out" / "predictions.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    probabilities = np.array([[row["one"], row["zero"]] for row in rows], float)
    names = np.array(["one", "zero"])
    assert [row["label"] for row in rows] == [";".join(names[row > 0.5]) or ";" for row in probabilities]
    sure = np.maximum(probabilities, 1 - probabilities).min(axis=1)
    np.testing.assert_allclose([float(row["probability"]) for row in rows], sure, atol=1e-4)
    assert rows[3]["truth"] == "one;zero" and rows[4]["truth"] == ";" and predicted["labelled"] == 440
    if task == "finetune":
        assert (
            np.mean([row["label"] == row["truth"] for row in rows]) > 0.65
        )  # a softmax has one label at most: 0.48
    assert page.read_predictions(tmp_path / "out").labels == [row["label"] for row in rows]
    truth = np.array([[name in row["truth"].split(";") for name in names] for row in rows])
    scores = [average_precision_score(truth[:, i], probabilities[:, i]) for i in range(2)]
    assert predicted["average_precision"] == pytest.approx(np.mean(scores), abs=1e-3)
    images = [np.asarray(Image.open(photos / "photos" / row["name"])) for row in rows[:8]]
    expected = simclr_jax.load(tmp_path / "run").predict(np.stack(images)[..., None])
    np.testing.assert_allclose(probabilities[:8], expected, atol=1e-4)


@pytest.mark.slow
def test_few_of_them_are_cross_validated(photos, pretrained_run, tmp_path):
    (tmp_path / "few.csv").write_text("\n".join((photos / "labels.csv").read_text().splitlines()[:25]))
    dataset = dataset_of(photos, "labels.csv") | {"dataset.labels": str(tmp_path / "few.csv")}
    summary = run_task(
        "linear_eval", tmp_path / "run", pretrained=str(pretrained_run), num_steps=2, **dataset
    )
    assert summary["folds"] == 5 and summary["labels"] == 24 and summary["average_precision_spread"] >= 0
    options = {"pretrained": str(pretrained_run), **dataset, "num_steps": 2}
    with pytest.raises(UserError, match="class_weights=balanced is not made for several labels an image"):
        run_task("linear_eval", tmp_path / "weighed", class_weights="balanced", **options)
