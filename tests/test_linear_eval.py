"""Linear evaluation trains a classifier, and nothing else."""

import json

import jax
import numpy as np
import pytest
from conftest import run_task

from simclr_jax import checkpoint

pytestmark = pytest.mark.slow


def test_encoder_stays_as_it_was_to_the_bit(pretrained_run, tmp_path):
    rate = {"optimizer.learning_rate": 0.5, "log_every_steps": 1}
    summary = run_task("linear_eval", tmp_path, pretrained=str(pretrained_run), num_steps=30, **rate)
    before, _ = checkpoint.load_params(pretrained_run)
    after, meta = checkpoint.load_params(tmp_path)
    assert set(after["params"]) == {"encoder", "supervised_head"}
    for collection in ("params", "batch_stats"):
        encoders = after[collection]["encoder"], before[collection]["encoder"]
        jax.tree.map(np.testing.assert_array_equal, *encoders)
    assert after["params"]["supervised_head"]["kernel"].any()
    assert meta["num_classes"] == 10 and meta["config"]["task"] == "linear_eval"
    scores = {"top1", "top5", "balanced_accuracy", "per_class", "confusion", "calibration_temperature"}
    assert set(summary) == {*scores, "steps"} and (tmp_path / "confusion.png").exists()
    assert summary["steps"] == 30
    assert 0 < summary["top1"] < summary["top5"] <= 1
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["top1"] == summary["top1"] and log[-1]["step"] == 30


def test_optimizer_keeps_nothing_for_what_is_frozen(pretrained_run, tmp_path):
    run_task("linear_eval", tmp_path, pretrained=str(pretrained_run), num_steps=1)
    saved = {path.name for path in (tmp_path / "checkpoints" / "1" / "state").iterdir()}
    assert saved  # a checkpoint was written
    with checkpoint.ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "checkpoints" / "1" / "state")
    shapes = [leaf.shape for leaf in jax.tree.leaves(state["opt_state"]) if np.ndim(leaf)]
    assert sorted(shapes) == [(10,), (32, 10)]
