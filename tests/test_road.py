"""From a folder of photos to answers, as docs/labels.md has it: suggest, label, classify, predict, look."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def digit_in(name):
    return name.removesuffix(".png")[-1]


def rows_in(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


@pytest.mark.journey
@pytest.mark.timeout(1200)
def test_thirty_suggested_labels_classify_unseen_images_better_than_thirty_random_ones(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    del environment["XLA_FLAGS"]  # it learns something: the compiler may take its time

    def run(module, *arguments):
        command = [sys.executable, "-m", f"simclr_jax.{module}", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def main(task, photos, *arguments):
        config = [f"--config=configs/digits.py:{task}", "--config.dataset.name=folder"]
        return run("main", *config, f"--config.dataset.path={photos}", *arguments)

    run("data.sources.digits", "digits")
    quick = ["--config.num_epochs=30", "--config.evaluate.compare=False", "--config.evaluate.pictures=False"]
    main("pretrain", "digits/photos", *quick, "--workdir=run")
    run("evaluation.suggest", "run", "--count=30")
    rows = rows_in(tmp_path / "labels.csv")
    assert len(rows) == 30
    lines = [f"{row['name']};digit {digit_in(row['name'])}" for row in rows]
    (tmp_path / "labels.csv").write_text("\n".join(["\ufeffname;label", *lines]))  # as a spreadsheet saves it
    given = ["--config.dataset.labels=labels.csv", "--config.pretrained=run", "--workdir=run/classifier"]
    assert "30 labels" in main("transfer", "digits/photos", *given)
    main("predict", "digits/new", "--config.pretrained=run/classifier", "--workdir=run/predicted")
    predicted = rows_in(tmp_path / "run" / "predicted" / "predictions.csv")
    right = np.mean([row["label"] == f"digit {digit_in(row['name'])}" for row in predicted])
    assert len(predicted) == 360 and right >= 0.85

    main("embed", "digits/new", "--config.pretrained=run", "--workdir=new")
    photos, new = (np.load(tmp_path / place / "embeddings.npz") for place in ("run/embed", "new"))
    scaler = StandardScaler().fit(photos["features"])
    x, unseen = (scaler.transform(table["features"]) for table in (photos, new))
    y, truth = (np.array([digit_in(name) for name in table["name"]]) for table in (photos, new))

    def accuracy(chosen):
        return LogisticRegression(max_iter=300).fit(x[chosen], y[chosen]).score(unseen, truth)

    random = [accuracy(np.random.default_rng(seed).permutation(len(y))[:30]) for seed in range(10)]
    suggested = [photos["name"].tolist().index(row["name"]) for row in rows]
    assert accuracy(suggested) > np.mean(random) + 0.03 and right > np.mean(random) + 0.03

    run("plots", "run")
    assert "digit 7" in (tmp_path / "run" / "plots" / "index.html").read_text()
