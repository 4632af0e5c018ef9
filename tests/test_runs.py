"""A run of any task: what it adds to the summary, and what it gives to the task."""

import json
import sys
from types import SimpleNamespace

from conftest import tiny_config
from etils import epath

from simclr_jax import runs


def test_the_summary_gets_the_seconds_last_and_the_task_an_epath(tmp_path, monkeypatch):
    workdirs = []

    def run(config, workdir):
        workdirs.append(workdir)
        return {"top1": 0.5}

    monkeypatch.setitem(sys.modules, "simclr_jax.tasks.own", SimpleNamespace(run=run))
    config = tiny_config("knn")
    config.task = "own"
    summary = runs.run(config, str(tmp_path))
    assert list(summary) == ["top1", "seconds"] and 0 <= summary["seconds"] < 60
    assert isinstance(workdirs[0], epath.Path) and workdirs == [tmp_path]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert runs.run(config, tmp_path) == summary and len(workdirs) == 1
