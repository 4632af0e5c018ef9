"""The pretraining loss: what it trains, and what it leaves alone."""

import threading
import time
from functools import partial

import jax
import numpy as np
import pytest
from conftest import run_task

from configs import digits
from simclr_jax import losses, train
from simclr_jax.evaluation.judge import Judge
from simclr_jax.models import make_init, make_model
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


def test_step_of_a_new_run_is_traced_once_in_a_thread(tmp_path, monkeypatch):
    """Were the shapes or dtypes of the thread's state or batch other ones, its program would be no use."""
    make_loss, log, mapped_step = pretrain.make_loss, Judge.log, train.mapped_step
    traced, evaluated = [], threading.Event()

    def count(*arguments):
        loss = make_loss(*arguments)
        return lambda *values: traced.append(threading.current_thread()) or loss(*values)

    class LateStep:
        def __init__(self, task):
            self.step = mapped_step(task)

        def __call__(self, *arguments):
            return self.step(*arguments)

        def lower(self, *shapes):
            evaluated.wait()
            time.sleep(3)  # Were nobody to wait for the thread, the first step would be under way.
            return self.step.lower(*shapes)

    monkeypatch.setattr(pretrain, "make_loss", count)
    monkeypatch.setattr(Judge, "log", lambda *arguments: (log(*arguments), evaluated.set())[0])
    monkeypatch.setattr(train, "mapped_step", LateStep)
    for options in ({}, {"memory.size": 64, "augment.on_device": True}):
        traced.clear(), evaluated.clear()
        run_task("pretrain", tmp_path / str(options), num_steps=1, **options)
        assert len(traced) == 1 and traced[0] is not threading.main_thread()
    traced.clear()
    run_task("pretrain", tmp_path / "on_device", num_steps=1, **{"dataset.on_device": True})
    assert traced == [threading.main_thread()]
