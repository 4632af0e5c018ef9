"""Fine-tuning from any layer, on few labels, beside the same network from scratch."""

import json

import jax
import numpy as np
import pytest
from conftest import run_task

from simclr_jax import checkpoint
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow


def changed(before, after):
    return {
        "/".join(key.key for key in path)
        for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after))
        if (a != b).any()
    }


def finetune(pretrained_run, workdir, **settings):
    settings = {"num_steps": 2, "draws": 1, "evaluate.compare": False} | settings
    return run_task("finetune", workdir, pretrained=str(pretrained_run), **settings)


def test_everything_is_trained_the_kept_projection_layer_too(pretrained_run, tmp_path):
    finetune(pretrained_run, tmp_path, **{"model.supervised_layer": 1})
    before, _ = checkpoint.load_params(pretrained_run)
    after, _ = checkpoint.load_params(tmp_path)
    assert set(after["params"]["projection_head"]) == {"dense0", "bn0"}
    head = {name: before["params"]["projection_head"][name] for name in ("dense0", "bn0")}
    assert changed(head, after["params"]["projection_head"]) == {"dense0/kernel", "bn0/scale", "bn0/bias"}
    encoder = before["params"]["encoder"], after["params"]["encoder"]
    assert len(changed(*encoder)) == len(jax.tree.leaves(encoder[0]))


def test_stages_up_to_a_chosen_one_are_frozen_with_their_statistics(pretrained_run, tmp_path):
    finetune(pretrained_run, tmp_path, fine_tune_after_block=2, **{"optimizer.learning_rate": 5.0})
    before, _ = checkpoint.load_params(pretrained_run)
    after, _ = checkpoint.load_params(tmp_path)
    for collection in ("params", "batch_stats"):
        encoders = before[collection]["encoder"], after[collection]["encoder"]
        behind = {
            "/".join(key.key for key in path)
            for path, _ in jax.tree.leaves_with_path(encoders[0])
            if path[0].key.startswith("block_group3")
        }
        assert changed(*encoders) == behind


@pytest.mark.journey
def test_draws_have_labels_of_their_own_and_networks_from_scratch_the_same(pretrained_run, tmp_path):
    settings = {"labels_per_class": 2, "draws": 2, "evaluate.compare": True}
    summary = finetune(pretrained_run, tmp_path, **settings)
    labels = {
        place: json.loads((tmp_path / place / "labels.json").read_text())["rows"]
        for place in ("", "draw1", "scratch0", "scratch1")
    }
    assert labels[""] == labels["scratch0"] and labels["draw1"] == labels["scratch1"]
    assert labels[""] != labels["draw1"] and len(labels[""]) == 20
    assert summary["labels_per_class"] == 2 and len(summary["draws"]) == 2
    for name in ("top1", "top5", "from_scratch_top1"):
        assert summary[name] == pytest.approx(np.mean([draw[name] for draw in summary["draws"]]))
    # Every draw from scratch starts elsewhere, the pretrained ones do not.
    kernels = [
        checkpoint.load_params(tmp_path / place)[0]["params"]["encoder"]["conv1"]["kernel"]
        for place in labels
    ]
    assert np.abs(kernels[0] - kernels[1]).max() < 0.05 < np.abs(kernels[0] - kernels[2]).max()
    assert np.abs(kernels[2] - kernels[3]).max() > 0.05


def test_class_without_enough_labels_is_a_user_error(pretrained_run, tmp_path):
    with pytest.raises(UserError, match=r"class 8 has 139 examples, but labels_per_class=140; lower"):
        finetune(pretrained_run, tmp_path, labels_per_class=140)
    assert not (tmp_path / "checkpoints").exists()
