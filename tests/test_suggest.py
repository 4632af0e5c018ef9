"""Images to label first: typical ones of every cluster, in an order of which every beginning is good."""

import csv
import os

import numpy as np
import pyarrow
import pytest
from conftest import tiny_config
from etils import epath
from pyarrow import parquet

from simclr_jax import runs
from simclr_jax.evaluation import selection, stored, suggest
from simclr_jax.evaluation.features import unit_rows
from simclr_jax.process.errors import UserError
from simclr_jax.workdir import records


def labels_of(count, labelled=(), classes=None):
    """int [count], the class of each image of `labelled`, 0 where `classes` are None, and -1 for others."""
    labels = np.full(count, -1)
    labels[list(labelled)] = 0 if classes is None else classes
    return labels


def blobs(sizes, *, spread=0.05, width=8, seed=0):
    """Directions around as many axes, float32 [n, width], and whose each is."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.eye(width)[labels] + spread * rng.standard_normal((len(labels), width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def write_embedded(workdir, features, *, split="all", label=-1, names=None):
    """A workdir of embed with these features."""
    records.save_config(workdir, tiny_config("embed", pretrained="RUN").to_dict())
    count, width = features.shape
    names = names or [f"{row}.png" for row in range(count)]
    columns = {
        "split": pyarrow.array(np.broadcast_to(split, count).tolist()),
        "index": pyarrow.array(np.arange(count)),
        "name": pyarrow.array(names),
        "label": pyarrow.array(np.broadcast_to(label, count).astype(np.int32)),
        "features": pyarrow.FixedSizeListArray.from_arrays(features.ravel(), width),
    }
    parquet.write_table(pyarrow.table(columns), workdir / "embeddings.parquet")
    return workdir


def rows_in(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_every_cluster_gives_its_most_typical_image_the_largest_first():
    sizes = [40, 30, 60, 10, 20, 50, 15, 25, 35, 45]
    features, labels = blobs(sizes, width=10)
    middle = features[labels == 2].mean(axis=0)
    features[3] = middle / np.linalg.norm(middle)  # the middle of a cluster that it does not come from
    chosen = selection.typical(features, 10, labels_of(len(features)), 0)
    assert chosen[0] == 3
    np.testing.assert_array_equal(labels[chosen[1:]], np.argsort(sizes)[::-1][1:])


@pytest.mark.parametrize("method", selection.METHODS)
def test_more_images_begin_with_the_fewer(method):
    features, classes = blobs([50] * 6, spread=0.3)
    for labels in (labels_of(300), labels_of(300, [0, 1, 60, 120], classes[[0, 1, 60, 120]])):
        most = selection.METHODS[method](features, 200, labels, 1)
        assert len(set(most.tolist())) == 200 and (labels[most] < 0).all()
        for count in (1, 7, 10, 33, 170):
            np.testing.assert_array_equal(selection.METHODS[method](features, count, labels, 1), most[:count])


@pytest.mark.parametrize("method", ["typical", "coverage"])
def test_what_is_labelled_is_not_suggested_nor_its_cluster(method):
    features, labels = blobs([40] * 15, width=16)
    labelled = np.flatnonzero(labels < 5)[::40]
    known = labels_of(len(features), labelled)
    chosen = selection.METHODS[method](features, 10, known, 0)
    assert set(labels[chosen]) == set(range(5, 15))
    order = selection.METHODS[method](features, len(features) - len(labelled), known, 0)
    assert set(order) | set(labelled) == set(range(len(features)))


def test_every_choice_brings_the_most_images_near_to_a_label():
    features, _ = blobs([9, 8, 7], spread=0.5)
    labelled = np.array([2, 11])
    chosen = selection.typical(features, 6, labels_of(24, labelled), 0)
    points = selection._balance(features[np.r_[np.setdiff1d(np.arange(24), labelled), labelled]]).astype(
        float
    )
    similarity = np.exp((points @ points.T - 1) / selection._WIDTH)[
        :, :22
    ]  # to each of those without a label
    unknown, have = np.setdiff1d(np.arange(24), labelled), [22, 23]
    for row in chosen:
        covered = [similarity[[*have, place]].max(axis=0).sum() for place in range(22)]
        assert unknown[np.argmax(covered)] == row
        have.append(int(np.argmax(covered)))


def test_of_many_images_a_sample_is_looked_at_and_the_rest_drawn(monkeypatch):
    features, labels = blobs([60, 60, 60])
    monkeypatch.setattr(selection, "_SAMPLE", 30)
    known = labels_of(180, [5, 70])
    chosen = selection.typical(features, 178, known, 3)
    assert len(set(chosen.tolist())) == 178 and not {5, 70} & set(chosen.tolist())
    assert labels[chosen[0]] == 2
    np.testing.assert_array_equal(selection.typical(features, 100, known, 3), chosen[:100])
    assert list(selection.typical(features, 178, known, 4)) != list(chosen)


def between_two(count, seed=0):
    """Images on the way from one direction to another, [count, 2], and how far on it each is, 0 to 1."""
    share = np.random.default_rng(seed).permutation(np.linspace(0, 1, count))
    return unit_rows(np.stack([1 - share, share], axis=1).astype(np.float32)), share


def test_images_of_which_a_classifier_is_sure_are_suggested_last():
    features, share = between_two(201)
    labels = labels_of(201, [share.argmin(), share.argmax()], [3, 1])
    chosen = selection.doubtful(features, 199, labels, 0)
    doubt = np.abs(share - 0.5)
    assert doubt[chosen[:100]].max() < 0.27 and doubt[chosen[100:]].min() > 0.23
    assert sorted(chosen) == sorted(np.flatnonzero(labels < 0))
    # The nearness of all images counts, also of those of which it is sure.
    labelled = [share.argmin(), share.argmax()]
    points = selection._balance(features[np.r_[np.flatnonzero(labels < 0), labelled]]).astype(float)
    similarity = np.exp((points @ points.T - 1) / selection._WIDTH)[:, :199]
    covered = np.maximum(similarity, similarity[199:].max(axis=0)).sum(axis=1)[:199]
    covered[~np.isin(np.flatnonzero(labels < 0), chosen[:100])] = 0
    assert chosen[0] == np.flatnonzero(labels < 0)[covered.argmax()]


@pytest.mark.parametrize("classes", [[], [2], [2, 2, 2]])
def test_labels_of_fewer_than_two_classes_tell_no_doubts(classes):
    features, _ = between_two(60)
    labels = labels_of(60, range(len(classes)), classes)
    expected = selection.typical(features, 50, labels, 0)
    np.testing.assert_array_equal(selection.doubtful(features, 50, labels, 0), expected)
    assert selection.default(labels) == "typical"


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.filterwarnings("error")
def test_images_that_are_all_alike_are_suggested_too(count):
    features = np.ones((count, 4), np.float32) / 2
    assert set(selection.typical(features, count, labels_of(count), 0)) == set(range(count))


def test_the_file_has_names_in_order_and_goes_on_from_labels(tmp_path):
    features, _ = blobs([30] * 5)
    run = write_embedded(tmp_path / "run", features)
    output = tmp_path / "labels.csv"
    suggest.main([str(run), "--count=12", f"--output={output}"])
    rows = rows_in(output)
    assert list(rows[0]) == ["name", "label", "split", "index"] and len(rows) == 12
    expected = selection.typical(features, 12, labels_of(150), 0)
    assert [row["name"] for row in rows] == [f"{row}.png" for row in expected]
    assert {row["label"] for row in rows} == {""} and rows[0]["split"] == "all"
    with pytest.raises(
        UserError, match=r"exists already: .* --labelled=.*labels.csv goes on from its labels"
    ):
        suggest.main([str(run), f"--output={output}"])

    output.write_text("name,label\n7.png,a\n9.png,a\n3.png,\n")
    suggest.main([str(run), "--count=4", f"--labelled={output}", f"--output={tmp_path}/more.csv"])
    rows = rows_in(tmp_path / "more.csv")
    assert [(row["name"], row["label"]) for row in rows[:2]] == [("7.png", "a"), ("9.png", "a")]
    assert [row["label"] for row in rows[2:]] == [""] * 4


def test_labels_of_two_classes_bring_their_doubts_and_a_classifier_tells_of_its_labels(tmp_path, capsys):
    features, share = between_two(80)
    run, labels = write_embedded(tmp_path / "run", features), tmp_path / "labels.csv"
    labels.write_text(f"name,label\n{share.argmin()}.png,b\n{share.argmax()}.png,a\n7.png,a;b\n")
    classifier = {"dataset.labels": str(labels), "dataset.name": "folder"}
    records.save_config(run / "classifier", tiny_config("transfer", **classifier).to_dict())
    sure = tmp_path / "sure.csv"  # Nobody has given these.
    sure.write_text("name,label,probability,a,b,margin\n1.png,a,1,1,0,1\n2.png,b,1,0,1,1\n")
    (run / "else").mkdir()
    (run / "else" / "config.json").write_text("{}")  # It is of another program.
    student = classifier | {"dataset.labels": str(sure)}
    records.save_config(run / "student", tiny_config("transfer", **student).to_dict())
    os.utime(run / "classifier" / "config.json", (1, 1))
    with pytest.raises(UserError, match="sure.csv holds predictions: give a file of labels"):
        suggest.main([str(run), "--count=2", f"--labelled={sure}", f"--output={tmp_path}/sure2.csv"])
    suggest.main([str(run), "--count=2", f"--output={tmp_path}/without.csv"])
    out = capsys.readouterr().out
    assert "choosing 2 of 80 images: typical" in out
    assert f"note: there are labels: --labelled={labels} --output=more.csv chooses with them" in out

    suggest.main([str(run), "--count=9", f"--labelled={labels}", f"--output={tmp_path}/more.csv"])
    out = capsys.readouterr().out
    assert "choosing 9 of 77 images: doubtful" in out and "note: there are labels" not in out
    known = labels_of(80, [share.argmax(), 7, share.argmin()], [0, 1, 2])
    expected = [f"{row}.png" for row in selection.doubtful(features, 9, known, 0)]
    assert [row["name"] for row in rows_in(tmp_path / "more.csv")[3:]] == expected
    options = [f"--labelled={labels}", f"--output={tmp_path}/typical.csv", "--method=typical"]
    suggest.main([str(run), "--count=9", *options])
    expected = [f"{row}.png" for row in selection.typical(features, 9, known, 0)]
    assert [row["name"] for row in rows_in(tmp_path / "typical.csv")[3:]] == expected


def test_held_out_images_are_not_suggested_and_names_are_made_where_there_are_none(tmp_path):
    features, _ = blobs([20, 20])
    split = ["train"] * 30 + ["eval"] * 10
    run = write_embedded(tmp_path / "run", features, split=split, names=[""] * 40)
    suggest.main([str(run), "--count=30", f"--output={tmp_path}/labels.csv", "--method=random"])
    rows = rows_in(tmp_path / "labels.csv")
    assert {row["name"] for row in rows} == {f"train/{index}" for index in range(30)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method=best"], "--method=best is unknown: choose one of typical, doubtful, coverage, random"),
        (
            ["--method=doubtful", "--count=5"],
            "--method=doubtful: expected --labelled=FILE with labels of two",
        ),
        (["--count=0"], "--count=0: expected 1 to 40, the images without a label"),
        (["--count=41"], "--count=41: expected 1 to 40"),
        (["--seed=-1"], "--seed=-1: expected a whole number from 0"),
        (["--labelled=none.csv"], "none.csv cannot be read"),
        (["--path=moved"], "--path=moved: the run is on digits, no folder: leave it out"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, arguments, message):
    run = write_embedded(tmp_path / "run", blobs([20, 20])[0])
    with pytest.raises(UserError, match=message):
        suggest.main([str(run), f"--output={tmp_path}/labels.csv", *arguments])
    assert not (tmp_path / "labels.csv").exists()
    with pytest.raises(UserError, match=r"holds no config.json: give the workdir of a run"):
        suggest.main([str(tmp_path / "nothing")])


def test_features_beyond_the_memory_are_taken_to_fewer_dimensions(tmp_path, monkeypatch):
    features, labels = blobs([50] * 4, width=64)
    run = write_embedded(tmp_path / "run", 3 * features)
    whole = runs.load_features(run)
    np.testing.assert_allclose(whole.features, features, atol=1e-6)
    assert whole.basis is None and whole.run == epath.Path("RUN")
    monkeypatch.setattr(stored, "ELEMENTS", 1000)
    monkeypatch.setattr(stored, "DIMENSIONS", 6)
    few = runs.load_features(run)
    assert few.features.shape == (200, 6) and few.basis.shape == (64, 6)
    np.testing.assert_allclose(np.linalg.norm(few.features, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit_rows(5 * features, few.basis), few.features, atol=1e-5)
    similar = few.features @ few.features.T
    same = labels[:, None] == labels
    assert similar[same].min() > similar[~same].max()
