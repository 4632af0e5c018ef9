"""The nearest images of new ones, and near-duplicates."""

import csv

import numpy as np
import pytest
from conftest import run_task
from PIL import Image
from sklearn.datasets import load_digits
from test_suggest import blobs, write_embedded

from simclr_jax import runs
from simclr_jax.evaluation import neighbours, similarity
from simclr_jax.evaluation.features import unit_rows
from simclr_jax.process.errors import UserError


def test_nearest_are_those_of_the_highest_cosine(tmp_path):
    features, _ = blobs([30] * 4, spread=0.2)
    stored = runs.load_features(write_embedded(tmp_path / "run", features))
    queries = 7 * features[[3, 90]] + 0.01
    rows, similar = similarity.nearest(stored.features, 5, unit_rows(queries))
    cosine = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(float) @ features.T
    np.testing.assert_array_equal(rows, np.argsort(-cosine, axis=1)[:, :5])
    np.testing.assert_allclose(similar, np.sort(cosine, axis=1)[:, ::-1][:, :5], atol=1e-6)


@pytest.mark.parametrize("block", [2**26, 100])
def test_duplicates_are_found_in_groups(block, monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK", block)
    features, _ = blobs([40] * 3, spread=0.3)
    rng = np.random.default_rng(1)
    features[50] = features[2]
    for row in (70, 71):
        features[row] = features[20] + 0.002 * rng.standard_normal(8)
        features[row] /= np.linalg.norm(features[row])
    groups, best, threshold = similarity.duplicates(features, 0.3)
    assert groups[2] == groups[50] == 0 and groups[20] == groups[70] == groups[71] == 1
    assert (groups >= 0).sum() == 5 and 0.9 < threshold < 1
    similar = features @ features.T - 2 * np.eye(len(features))
    np.testing.assert_allclose(best, similar.max(axis=1), atol=1e-6)


def test_copies_across_the_sides_are_counted():
    features = unit_rows(np.random.default_rng(0).normal(size=(120, 16)).astype(np.float32))
    assert similarity.copies(features[:100], features[100:]) == (0, 20)
    nearly = unit_rows(features[:5] + 0.01 * features[5:10])
    assert similarity.copies(features[:100], np.concatenate([features[100:], nearly])) == (5, 25)


def test_pairs_inside_of_one_group_take_no_memory(monkeypatch):
    pairs = []
    merge = similarity._merge

    def count(groups, images, others):
        pairs.append(len(images))
        return merge(groups, images, others)

    monkeypatch.setattr(similarity, "_BLOCK", 2**14)
    monkeypatch.setattr(similarity, "_merge", count)
    groups, _, _ = similarity.duplicates(np.tile(np.float32([0.6, 0.8]), (1000, 1)), 0.3)
    assert (groups == 0).all() and sum(pairs) <= 2**14


def test_without_duplicates_there_are_none(tmp_path, capsys):
    run = write_embedded(tmp_path / "run", blobs([40] * 3, spread=0.3)[0])
    output = tmp_path / "duplicates.csv"
    neighbours.main([str(run), "--duplicates", f"--output={output}", "--share=0.01"])
    assert output.read_text("utf-8-sig") == "group,name,similarity\n"
    assert "0 of 120 images in 0 groups" in capsys.readouterr().out


def test_the_file_lists_every_group(tmp_path):
    features, _ = blobs([40] * 3, spread=0.3)
    features[50] = features[2]
    output = tmp_path / "duplicates.csv"
    neighbours.main([str(write_embedded(tmp_path / "run", features)), "--duplicates", f"--output={output}"])
    with open(output, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.DictReader(file) if float(row["similarity"]) > 0.99999]
    assert [(row["group"], row["name"]) for row in rows] == [("1", "2.png"), ("1", "50.png")]
    with pytest.raises(UserError, match="exists already"):
        neighbours.main([str(tmp_path / "run"), "--duplicates", f"--output={output}"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected image files, or --duplicates"),
        (["x.png", "--duplicates"], "expected image files, or --duplicates"),
        (["none.png"], "none.png is no file"),
        (["--duplicates", "--share=0"], "--share=0.0: expected"),
        (["none.png", "--count=0"], "--count=0"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        neighbours.main([str(tmp_path), *arguments])


def test_new_images_of_16_bits_are_seen_as_those_of_the_folder(pretrained_run, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for row, digit in enumerate(load_digits().images[:12]):  # 12 bits in 16
        Image.fromarray((digit * 255).astype(np.uint16)).save(tmp_path / "photos" / f"{row}.png")
    settings = {"dataset.name": "folder", "dataset.path": str(tmp_path / "photos")}
    run_task("embed", tmp_path / "run", pretrained=str(pretrained_run), **settings)
    capsys.readouterr()
    neighbours.main([str(tmp_path / "run"), str(tmp_path / "photos" / "7.png"), "--count=1"])
    assert "1.000  7.png" in capsys.readouterr().out
