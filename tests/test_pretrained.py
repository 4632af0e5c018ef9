"""Starting from a checkpoint: what a task takes from it, and how it refuses one that does not fit."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import tiny_config

from simclr_jax import checkpoint, pretrained
from simclr_jax.models import make_model
from simclr_jax.plan import cost
from simclr_jax.process.errors import UserError
from simclr_jax.tasks import pretrain

pytestmark = pytest.mark.slow


def model_of(config, classes=10):
    return make_model(config.model, classes, whole_projection=False)


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_encoder_is_loaded_and_the_classifier_starts_afresh(pretrained_run):
    config = tiny_config("finetune", pretrained=str(pretrained_run))
    saved, _ = checkpoint.load_params(pretrained_run)
    state = pretrained.make_init(config, model_of(config))(jax.random.key(0))
    assert set(state["params"]) == {"encoder", "supervised_head"}
    assert_same_bits(state["params"]["encoder"], saved["params"]["encoder"])
    assert_same_bits(state["batch_stats"]["encoder"], saved["batch_stats"]["encoder"])
    assert not state["params"]["supervised_head"]["kernel"].any()
    assert saved["params"]["supervised_head"]["kernel"].any()


def test_projection_head_is_kept_up_to_the_layer_that_is_read(pretrained_run):
    settings = {"model.supervised_layer": 2}
    config = tiny_config("finetune", pretrained=str(pretrained_run), **settings)
    saved, _ = checkpoint.load_params(pretrained_run)
    loaded = pretrained.load(config, model_of(config))
    assert set(loaded["params"]["projection_head"]) == {"dense0", "bn0", "dense1", "bn1"}
    for name, layer in loaded["params"]["projection_head"].items():
        assert_same_bits(layer, saved["params"]["projection_head"][name])


def test_pretraining_starts_from_a_checkpoint_too_or_from_nothing(pretrained_run):
    config = tiny_config("pretrain")
    model = make_model(config.model, 10)
    source = cost.Examples.from_config(config.dataset)
    afresh = pretrain.make_task(config, model, source).init(jax.random.key(0))
    config.pretrained = str(pretrained_run)
    started = pretrain.make_task(config, model, source).init(jax.random.key(0))
    saved, _ = checkpoint.load_params(pretrained_run)
    assert_same_bits(started["params"]["projection_head"], saved["params"]["projection_head"])
    kernels = [tree["params"]["encoder"]["conv1"]["kernel"] for tree in (afresh, started)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"model.width": 0.25},
            r"shape \(8,\) there, and of shape \(16,\) here; set --config.model.width=0.125",
        ),
        ({"model.depth": 10}, r"missing there.*--config.model.depth=8"),
        ({"model.stem": "imagenet"}, r"--config.model.stem=auto"),
        ({"image_size": 40}, r"\(3, 3, 3, 8\) there.*\(7, 7, 3, 8\) here.*--config.image_size=16"),
        (
            {"model.supervised_layer": 1, "model.projection_layers": 1},
            r"projection_head/.*--config.model.projection_layers=3",
        ),
    ],
)
def test_checkpoint_of_another_model_names_both_shapes_and_the_option(pretrained_run, settings, message):
    config = tiny_config("finetune", pretrained=str(pretrained_run), **settings)
    with pytest.raises(UserError, match=message):
        pretrained.load(config, model_of(config))


def test_checkpoint_of_a_deeper_model_is_not_cut_short(pretrained_run, monkeypatch):
    saved, meta = checkpoint.load_params(pretrained_run)
    saved["params"]["encoder"]["block_group3_1"] = saved["params"]["encoder"]["block_group3_0"]
    monkeypatch.setattr(checkpoint, "load_params", lambda path, average: (saved, meta))
    config = tiny_config("finetune", pretrained=str(pretrained_run))
    with pytest.raises(UserError, match=r"block_group3_1/.* there, and missing here"):
        pretrained.load(config, model_of(config))


def test_no_checkpoint_is_a_user_error(tmp_path):
    config = tiny_config("finetune")
    with pytest.raises(UserError, match="pretrained is not set: give --config.pretrained=RUN"):
        pretrained.make_init(config, model_of(config))
    config.pretrained = str(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        pretrained.make_init(config, model_of(config))


def adopted(run, task="knn", given=(), **overrides):
    config = tiny_config(task, pretrained=str(run), **overrides)
    pretrained.inherit_settings(config, dict.fromkeys(given))
    return config


def test_model_and_image_size_come_from_the_checkpoint(pretrained_run, capsys):
    changed = {"image_size": 96, "model.width": 1.0, "model.depth": 18, "model.projection_layers": 2}
    config = adopted(pretrained_run, **changed)
    assert (config.image_size, config.model.width, config.model.depth) == (16, 0.125, 8)
    assert config.model.projection_layers == 3
    assert "image_size=16" in capsys.readouterr().out
    assert adopted(pretrained_run).to_dict() == tiny_config("knn", pretrained=str(pretrained_run)).to_dict()
    assert capsys.readouterr().out == ""


def test_what_the_user_set_stays_and_is_told_of(pretrained_run, capsys):
    config = adopted(pretrained_run, given=["image_size"], image_size=24)
    assert config.image_size == 24 and "trained at 16" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"model.depth=18 does not fit .*--config.model.depth=8"):
        adopted(pretrained_run, given=["model.depth"], **{"model.depth": 18})


def test_the_model_of_distillation_is_its_own(pretrained_run):
    config = adopted(pretrained_run, "distill", **{"model.width": 0.25, "image_size": 24})
    assert config.model.width == 0.25 and config.image_size == 16


def test_folders_keep_the_split_of_their_run(pretrained_run, tmp_path):
    run = shutil.copytree(pretrained_run, tmp_path / "run")
    (meta,) = run.glob("checkpoints/*/meta/metadata")
    saved = json.loads(meta.read_text())
    saved["config"]["dataset"]["name"], saved["value_range"] = "folder", [0, 4095]
    meta.write_text(json.dumps(saved))
    config = adopted(run, **{"dataset.name": "folder"})
    assert config.dataset.split_seed == 7 and config.dataset.value_range == (0, 4095)
    config = adopted(run, given=["dataset.split_seed"], **{"dataset.name": "folder", "dataset.split_seed": 3})
    assert config.dataset.split_seed == 3


def test_a_checkpoint_whose_config_lacks_keys_is_read(pretrained_run, tmp_path):
    run = shutil.copytree(pretrained_run, tmp_path / "run")
    (meta,) = run.glob("checkpoints/*/meta/metadata")
    saved = json.loads(meta.read_text())
    del saved["schema_version"], saved["config"]["model"]["se_ratio"], saved["config"]["dataset"]["classes"]
    meta.write_text(json.dumps(saved))
    assert pretrained.load_model(run)[2]["config"]["model"]["se_ratio"] == 0.0
    assert adopted(run).model.depth == 8
