"""How runs are, told from their workdirs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_config
from etils.epath import backend, gpath

from simclr_jax import runs, train
from simclr_jax.process import UserError
from simclr_jax.workdir import lock, records, status

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_a_run_that_is_over_tells_its_scores(finetuned_run):
    row = status.status(finetuned_run)
    assert (row["task"], row["step"]) == ("finetune", "5 of 5") and row["loss"] and row["images/s"]
    assert "top1 0." in row["scores"] and "state" in row


def begun(workdir, **values):
    records.save_config(workdir, tiny_config("pretrain").to_dict())
    records.note(workdir, steps=1234, ended=None)
    lines = [{"step": 50, "loss": 4.5, "images_per_second": 90.0}, {"step": 0, "knn_accuracy": 0.25}]
    lines.append({"step": 100, "loss": 4.25, "images_per_second": 100.0} | values)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def test_newest_values_and_when_they_were_written(tmp_path):
    begun(tmp_path)
    os.utime(tmp_path / "metrics.jsonl", (time.time() - 3725,) * 2)
    row = status.status(tmp_path)
    assert (row["step"], row["loss"], row["images/s"]) == ("100 of 1,234", "4.25", "100")
    assert row["scores"] == "knn_accuracy 0.250" and row["wrote"].startswith("1:02:0")


def test_states(tmp_path):
    begun(tmp_path)
    assert status.status(tmp_path)["state"].startswith("ended: for an unknown reason")
    with lock.locked(tmp_path):
        assert status.status(tmp_path)["state"].startswith(f"runs as process {os.getpid()} on ")
    claim = lock._this_process() | {"started": "0", "since": "then"}
    (tmp_path / "lock.json").write_text(json.dumps(claim))
    assert "was killed" in status.status(tmp_path)["state"]
    (tmp_path / "lock.json").write_text(json.dumps(claim | {"host": "another"}))
    assert status.status(tmp_path)["state"].startswith("runs as process")
    os.utime(tmp_path / "lock.json", (time.time() - 60,) * 2)
    assert "was killed" in status.status(tmp_path)["state"]
    (tmp_path / "lock.json").unlink()
    (tmp_path / "summary.json").write_text('{"top1": 0.5}')
    assert status.status(tmp_path)["state"] == "over"


@pytest.mark.parametrize(
    ("error", "reason"), [(UserError("loss is nan"), "loss is nan"), (SystemExit(0), "stopped by a signal")]
)
def test_what_ended_a_run_is_kept(tmp_path, monkeypatch, error, reason):
    def fit(task, config, workdir):
        records.note(workdir, steps=task.num_steps, ended=None)
        raise error

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(type(error)):
        runs.run(tiny_config("pretrain"), tmp_path / "RUN")
    assert json.loads((tmp_path / "RUN" / "run.json").read_text())["ended"] == reason


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run: give the workdir of one"):
        status.status(tmp_path)


def test_a_run_in_a_bucket(tmp_path, monkeypatch):
    begun(tmp_path)

    class Bucket:
        """Stands for gs:// with a folder of this machine."""

        def __getattr__(self, name):
            method = getattr(backend.os_backend, name)
            return lambda path, *args: method(
                os.fspath(path).replace("gs://bucket/RUN", str(tmp_path)), *args
            )

    monkeypatch.setattr(gpath._GPath, "_backend", property(lambda path: Bucket()))
    row = status.status("gs://bucket/RUN")
    assert row["step"] == "100 of 1,234" and row["wrote"].startswith("0:00:0")
    assert row["state"].startswith("ended: for an unknown reason")
    with pytest.raises(UserError, match="gs://bucket/other holds no run"):
        status.status("gs://bucket/other")


def test_several_runs_make_a_table(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        begun(tmp_path / name)
    status.main([str(tmp_path / "a"), str(tmp_path / "b")])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["workdir", "task", "step", "images/s"] and len(rows) == 2
    assert all(row.index("pretrain") == head.index("task") for row in rows)


@pytest.mark.parametrize("verb", ["check", "status"])
def test_verbs_of_the_command(verb):
    command = [sys.executable, "-m", "simclr_jax", verb, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"check": "--elsewhere", "status": "several make a table"}[verb] in done.stdout
