"""What the pretraining loss trains, and what it leaves alone."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import run_task

from configs import digits
from simclr_jax import losses
from simclr_jax.data import datasets
from simclr_jax.models import make_init, make_model
from simclr_jax.process.errors import UserError
from simclr_jax.tasks import pretrain

pytestmark = pytest.mark.slow


def config_of():
    config = digits.get_config()
    config.model.update(width=0.125, stem="auto")
    return config


def views_batch(rows=16):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (rows, 16, 16, 3), np.uint8) for name in ("view1", "view2")}
    return images | {"label": rng.integers(0, 10, rows).astype(np.int32)}


def assert_trees_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


def test_reported_loss_is_nt_xent_of_the_projections_of_both_views():
    config, batch = config_of(), views_batch()
    model = make_model(config.model, num_classes=10)
    variables = make_init(model, 16)(jax.random.key(0))
    _, (batch_stats, results) = jax.jit(pretrain.make_loss(model, config))(
        variables["params"], variables["batch_stats"], batch
    )
    both = np.concatenate([batch["view1"], batch["view2"]]).astype(np.float32) / 255
    outputs, updates = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, both)
    expected, _ = losses.nt_xent(*np.split(outputs["projection"], 2), temperature=config.temperature)
    assert results["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert_trees_close(batch_stats, updates["batch_stats"])


def test_probe_gradient_stays_out_of_the_encoder():
    config = config_of()
    with_labels = make_model(config.model, num_classes=10)
    without = make_model(config.model, num_classes=0)
    variables = make_init(with_labels, 16)(jax.random.key(0))
    batch = views_batch()

    def gradient(model, params):
        loss = pretrain.make_loss(model, config)
        return jax.jit(jax.grad(lambda p: loss(p, variables["batch_stats"], batch)[0]))(params)

    params = dict(variables["params"])
    ours = gradient(with_labels, params)
    head = ours.pop("supervised_head")
    params.pop("supervised_head")
    assert np.abs(head["kernel"]).max() > 0
    assert_trees_close(ours, gradient(without, params))


def test_lars_decays_the_supervised_head_in_the_loss():
    config, batch = config_of(), views_batch()
    model = make_model(config.model, num_classes=10)
    variables = make_init(model, 16)(jax.random.key(0))

    def head_gradient(weight_decay):
        config.optimizer.weight_decay = weight_decay
        loss = pretrain.make_loss(model, config)
        gradient = jax.jit(jax.grad(lambda p: loss(p, variables["batch_stats"], batch)[0]))
        return gradient(variables["params"])["supervised_head"]

    decayed, plain = head_gradient(0.5), head_gradient(0.0)
    kernel = variables["params"]["supervised_head"]["kernel"]
    np.testing.assert_allclose(decayed["kernel"] - plain["kernel"], 0.5 * kernel, atol=1e-6)
    np.testing.assert_allclose(decayed["bias"], plain["bias"], atol=1e-6)


def test_config_that_names_no_labels_trains_without_a_probe():
    config = config_of()
    model = make_model(config.model, num_classes=0)
    variables = make_init(model, 16)(jax.random.key(0))
    loss = pretrain.make_loss(model, config)
    value, (_, results) = loss(variables["params"], variables["batch_stats"], views_batch())
    assert results["loss"] == value and "probe_accuracy" not in results


@pytest.mark.journey
def test_untrained_is_the_untrained_network_whatever_the_run_starts_from(pretrained_run, tmp_path, capsys):
    """And the console says what is measured, and of what there is too little."""
    settings = {"num_steps": 1, "evaluate.compare": True, "evaluate.max_examples": 24, "seed": 3}
    summaries = [
        run_task("pretrain", tmp_path / "scratch", **settings),
        run_task("pretrain", tmp_path / "started", pretrained=str(pretrained_run), **settings),
    ]
    scratch, started = summaries
    for of in ("features", "projection"):
        assert started["health"][f"untrained_{of}"] == scratch["health"][f"untrained_{of}"]
        assert started["health"][of] != scratch["health"][of]
    assert started["untrained"] == scratch["untrained"] and started["raw_pixels"] == scratch["raw_pixels"]
    for summary in summaries:
        spread = summary["few_label_deviation"]
        assert spread.keys() == {"trained", "untrained", "raw_pixels"} and 0 < min(spread.values()) < 0.5
        assert spread["raw_pixels"] == scratch["few_label_deviation"]["raw_pixels"]
        assert "few_labels" not in summary["trained"] and 0 < summary["trained"]["few_label_accuracy"] < 1
    printed = capsys.readouterr().out
    assert printed.count("measuring: trained, untrained, raw pixels\n") == 2
    assert "note: health is that of 24 images, fewer than the features' 32 dimensions" in printed
    assert "classes have fewer training images than labels_per_class=5" in printed


def source_of(labels):
    labels = np.array(labels, np.int32)
    return datasets.Source("mine", len(labels), 2, None, np.arange(len(labels)), labels)


def test_only_images_with_labels_are_probed():
    found = pretrain._labelled(source_of([0, -1, 1, -1]))
    np.testing.assert_array_equal(found.records, [0, 2])
    np.testing.assert_array_equal(found.labels, [0, 1])
    whole = source_of([0, 1])
    assert pretrain._labelled(whole) is whole
    with pytest.raises(
        UserError, match="mine has classes, but none .*: set --config.dataset.probe_split and"
    ):
        pretrain._labelled(source_of([-1, -1]))


def test_what_is_no_better_than_without_training_is_noted():
    scores = {"knn_accuracy": 0.5, "linear_accuracy": 0.6}
    better = {"knn_accuracy": 0.4, "linear_accuracy": 0.6}
    assert pretrain.notes({"trained": scores, "untrained": better | {"linear_accuracy": 0.59}}) == []
    found = pretrain.notes({"trained": scores, "untrained": scores, "raw_pixels": better})
    assert [note.partition(":")[0].rpartition(" than ")[2] for note in found] == [
        "those of an untrained network",
        "raw pixels",
    ]
    assert "linear accuracy 0.600 against 0.600" in found[1] and "knn" not in found[1]
    assert pretrain.notes({"health": {}}) == [] and pretrain.notes({"trained": scores}) == []
