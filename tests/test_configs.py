"""Settings of the papers and of the official code, as the configs resolve them."""

import importlib
import sys
import types

import pytest

import simclr_jax
from configs import base
from simclr_jax import optim, train

IMAGENET, ONE_PERCENT, TEN_PERCENT = 1281167, 12811, 128116


def config_of(name, task):
    return importlib.import_module(f"configs.{name}").get_config(task)


# Config, task, training examples -> peak learning rate, optimiser, weight decay, steps.
SETTINGS = [
    ("imagenet", "pretrain", IMAGENET, 9.6, "lars", 1e-6, 15640),
    ("imagenet", "linear_eval", IMAGENET, 1.6, "sgd", 1e-6, 28151),
    ("imagenet", "finetune_1pct", ONE_PERCENT, 0.8, "sgd", 0, 188),
    ("imagenet", "finetune_10pct", TEN_PERCENT, 0.8, "sgd", 0, 939),
    ("imagenet_v2", "pretrain", IMAGENET, 6.4, "lars", 1e-4, 250228),
    ("imagenet_v2", "finetune_1pct", ONE_PERCENT, 0.064, "lars", 0, 751),
    ("imagenet_v2", "finetune_10pct", TEN_PERCENT, 0.064, "lars", 0, 3754),
    ("imagenet_v2", "finetune", IMAGENET, 0.064, "lars", 0, 37535),
    ("imagenet_v2", "distill", IMAGENET, 6.4, "lars", 1e-4, 125114),
    ("cifar10", "pretrain", 50000, 2.0, "lars", 1e-4, 97657),
    ("cifar10", "pretrain_200", 50000, 2.0, "lars", 1e-4, 19532),
    ("cifar10", "linear_eval", 50000, 0.2, "sgd", 0, 9766),
]


@pytest.mark.parametrize("name, task, examples, peak, optimizer, decay, steps", SETTINGS)
def test_settings_are_the_papers(name, task, examples, peak, optimizer, decay, steps):
    config = config_of(name, task)
    ours = config.optimizer
    actual = optim.scaled_learning_rate(
        ours.learning_rate, scaling=ours.scaling, batch_size=config.batch_size
    )
    assert (actual, ours.name, ours.weight_decay) == (pytest.approx(peak), optimizer, decay)
    assert train.make_schedule(config, examples)[1] == steps


def test_few_labels_of_imagenet_are_its_subsets_and_elsewhere_shares_of_each_class():
    for name in ("imagenet", "imagenet_v2"):
        for percent in ("1pct", "10pct"):
            config = config_of(name, f"finetune_{percent}")
            assert config.dataset.name == f"imagenet2012_subset/{percent}"
            assert config.labels_per_class is None and config.dataset.eval_split == "validation"
    per_class = {
        name: [config_of(name, f"finetune_{percent}").labels_per_class for percent in ("1pct", "10pct")]
        for name in ("cifar10", "cifar100", "stl10")
    }
    assert per_class == {"cifar10": [50, 500], "cifar100": [5, 50], "stl10": [5, 50]}


def test_v2_fine_tunes_from_the_first_projection_layer_and_from_the_features_on_all_labels():
    layers = {
        task: config_of("imagenet_v2", task).model.supervised_layer
        for task in ("linear_eval", "finetune", "finetune_1pct", "finetune_10pct")
    }
    assert layers == {"linear_eval": 0, "finetune": 0, "finetune_1pct": 1, "finetune_10pct": 1}
    student = config_of("imagenet_v2", "distill").model
    assert (student.depth, student.width, student.sk_ratio) == (50, 1, 0)


def test_stl10_learns_and_distills_without_labels_and_is_judged_with_them():
    splits = {
        task: config_of("stl10", task).dataset.train_split
        for task in ("pretrain", "distill", "embed", "linear_eval", "finetune", "knn", "transfer")
    }
    assert set(list(splits.values())[:3]) == {"unlabelled"} and set(list(splits.values())[3:]) == {"train"}
    assert config_of("stl10", "pretrain").dataset.probe_split == "train"


def pretrain():
    config = base.pretrain()
    config.batch_size = 6
    return config


def knn():
    config = base.knn(pretrain())
    config.k = 3
    return config


def knn_of_five():
    config = knn()
    config.k = 5
    return config


def test_base_fills_in_the_tasks_that_a_file_does_not_define():
    own = (pretrain, knn, knn_of_five)
    assert base.task_config(None, *own).task == "pretrain"
    assert (base.task_config("knn", *own).k, base.task_config("knn_of_five", *own).k) == (3, 5)
    filled_in = base.task_config("finetune", *own)
    assert (filled_in.task, filled_in.batch_size) == ("finetune", 6)
    names = "pretrain, knn, knn_of_five, linear_eval, finetune, distill, transfer, embed, predict"
    with pytest.raises(ValueError, match=f"task 'knm' is unknown: expected one of {names}$"):
        base.task_config("knm", *own)


def test_a_file_without_pretraining_has_its_own_tasks_alone():
    assert base.task_config(None, knn).k == 3
    with pytest.raises(ValueError, match="task 'embed' is unknown: expected one of knn$"):
        base.task_config("embed", knn)


def test_a_task_is_a_module_and_a_function_of_base(monkeypatch, tmp_path):
    exec(
        "def margin(config):\n    config = knn(config)\n    config.task = 'margin'\n    return config",
        vars(base),
    )
    module = types.ModuleType("simclr_jax.tasks.margin")
    module.run = lambda config, workdir: {"margin": config.k / 2}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        config = simclr_jax.get_config("folder:margin", {"dataset.path": str(tmp_path), "k": 9})
        assert simclr_jax.run(config, tmp_path / "run")["margin"] == 4.5
    finally:
        del base.margin
    with pytest.raises(simclr_jax.UserError, match="task 'margin' is unknown"):
        simclr_jax.get_config("folder:margin")
