"""The whole chain as a user types it: each task from the checkpoint of the one before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import xla_flags
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = ["--config.model.width=0.125", "--config.batch_size=64"]
UNCOMPARED = ["--config.evaluate.compare=False", "--config.evaluate.pictures=False"]
UNCOMPARED += ["--config.evaluate.max_examples=256"]
TRAINED = [*TINY, "--config.num_steps=6", "--config.log_every_steps=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def environment():
    return os.environ | {"XLA_FLAGS": xla_flags(2)}


@pytest.fixture(scope="module")
def run(place, environment):
    """Runs one task in a process of its own; returns its summary."""

    def run(task, *arguments, start=None, code=0):
        command = [sys.executable, "-m", "simclr_jax.main", f"--config=configs/digits.py:{task}"]
        command += [f"--workdir={place / task}", *arguments]
        command += [f"--config.pretrained={place / start}"] if start else []
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        if code:
            return done.stderr
        assert not done.stderr.strip(), done.stderr
        assert f"written to {place / task}/summary.json" in done.stdout
        return json.loads((place / task / "summary.json").read_text())

    return run


@pytest.mark.journey
def test_chain(run, place, environment):
    summary = run("pretrain", *TRAINED, *UNCOMPARED)
    assert set(summary["health"]) == {"features", "projection"}
    log = [json.loads(line) for line in (place / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    health = {"alignment", "uniformity", "effective_rank", "collapsed"}
    assert {f"{space}_{name}" for space in ("features", "projection") for name in health} <= set(log[-1])
    assert log[-1]["features_effective_rank"] == pytest.approx(
        summary["health"]["features"]["effective_rank"]
    )

    summary = run("linear_eval", *TRAINED, start="pretrain")
    assert 0 < summary["top1"] <= summary["top5"] <= 1

    summary = run("finetune", *TRAINED, "--config.draws=2", start="pretrain")
    assert len(summary["draws"]) == 2 and {"top1", "from_scratch_top1"} < set(summary)
    assert len(json.loads((place / "finetune" / "labels.json").read_text())["rows"]) == 50

    summary = run("distill", *TRAINED, "--config.model.width=0.0625", start="finetune")
    assert {"top1", "teacher_top1", "labels_only_top1"} < set(summary)
    assert summary["parameters"] < summary["teacher_parameters"] / 2

    summary = run("knn", *TINY, start="pretrain")
    assert summary["examples"] == 360 and 0 < summary["top1"] <= 1

    summary = run("transfer", *TINY, start="pretrain")
    assert 0 < summary["mean_per_class"] <= 1 and summary["l2"] > 0

    summary = run("embed", *TINY, start="pretrain")
    assert summary == json.loads((place / "embed" / "summary.json").read_text())
    assert np.load(place / "embed" / "embeddings.npz")["features"].shape == (1797, 32)

    for task in ("pretrain", "finetune"):
        done = subprocess.run(
            [sys.executable, "-m", "simclr_jax.plots", str(place / task)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    written = {path.stem for path in (place / "pretrain" / "plots").iterdir()}
    assert written == {"curves", "views", "health", "neighbours", "map", "index"}
    written = {path.stem for path in (place / "finetune" / "plots").iterdir()}
    assert written == {"curves", "neighbours", "map", "index"}  # one number of labels, no curve of them
    for path in place.glob("*/plots/*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path


@pytest.mark.journey
def test_mistakes_are_one_line(run, place):
    (place / "nothing").mkdir()
    mistakes = [
        ("linear_eval", [], None, "pretrained is not set: give --config.pretrained=RUN"),
        ("linear_eval", [], "nothing", "holds no checkpoint"),
        ("knn", ["--config.k=0"], "pretrain", "k=0: set --config.k to a number above 0"),
        ("linear_eval", ["--config.model.width=0.5"], "pretrain", "model.width=0.5 does not fit"),
        ("finetune", [*TINY, "--config.labels_per_class=150"], "pretrain", "but labels_per_class=150"),
        ("transfer", [*TINY, "--config.metric=top2"], "pretrain", "metric='top2': set it to 'top1' or"),
    ]
    for task, arguments, start, message in mistakes:
        workdir = f"--workdir={place / 'mistake'}"
        error = run(task, *arguments, workdir, start=start, code=2)
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
        assert not (place / "mistake" / "summary.json").exists()
