"""The examples of docs/extending.md: an encoder and a loss of one's own, through all that a run has."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import log_of
from test_api import TINY

import simclr_jax
from simclr_jax import losses, models, train
from simclr_jax.data import datasets
from simclr_jax.parallel import AXIS
from simclr_jax.tasks import pretrain
from simclr_jax.views import batches

pytestmark = pytest.mark.slow

DOCS = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
VIT = TINY | {
    "model.encoder": "vit",
    "model.depth": 2,
    "model.width": 0.5,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 0.001,
    "checkpoint_every_steps": 2,
}


def code_under(heading):
    """The first block of Python under a heading of the page."""
    return re.search(rf"^## {heading}\n.*?```python\n(.*?)```", DOCS, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture(scope="module", autouse=True)
def added():
    """The page's encoder and loss."""
    for heading in ("Your own encoder", "Your own loss", "A loss with state"):
        code = code_under(heading)
        assert code.count("\n") - code.count("\n\n") <= 25
        exec(code, {})
    yield
    del models.ENCODERS["vit"], losses.LOSSES["barlow_twins"], losses.LOSSES["queue"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vit") / "run"
    simclr_jax.run(simclr_jax.get_config("digits", VIT | {"num_steps": 6}), workdir)
    return workdir


@pytest.mark.journey
def test_an_encoder_of_ones_own_resumes_to_the_bit(pretrained, tmp_path):
    config = simclr_jax.get_config("digits", VIT | {"num_steps": 6})
    stops = iter([False] * 2 + [True])

    def stop(step, metrics):
        if next(stops, False):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        simclr_jax.run(config, tmp_path / "again", on_report=stop)
    simclr_jax.run(config, tmp_path / "again")
    whole, resumed = log_of(pretrained), log_of(tmp_path / "again")
    assert whole[-1]["loss"] == resumed[-1]["loss"]
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    features = [simclr_jax.load(path)(images) for path in (pretrained, tmp_path / "again")]
    assert features[0].shape == (3, 32)
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize("task", ["linear_eval", "finetune", "knn"])
def test_tasks_start_from_such_an_encoder(task, pretrained, tmp_path):
    small = {"batch_size": 16, "dataset.num_examples": 64, "pretrained": str(pretrained)}
    own = {"linear_eval": {"num_steps": 2}, "knn": {"k": 5}}
    own["finetune"] = {"num_steps": 2, "draws": 1, "labels_per_class": 2, "evaluate.compare": False}
    config = simclr_jax.get_config(f"digits:{task}", small | own[task])
    assert config.model.encoder == "vit"
    assert 0 <= simclr_jax.run(config, tmp_path / task)["top1"] <= 1


def test_it_is_exported_at_the_size_of_its_training(pretrained, tmp_path):
    from simclr_jax.export import __main__ as export

    for form in ("savedmodel", "onnx"):  # compared with JAX's outputs before they appear
        export.main([str(pretrained), f"--format={form}", f"--output={tmp_path / form}"])
        card = (tmp_path / form / "README.md").read_text()
        assert "vit, depth 2, width 0.5x, images of 16 pixels" in card and "of images of this size" in card
    with pytest.raises(simclr_jax.UserError, match="no ResNet"):
        export.main([str(pretrained), "--format=safetensors", f"--output={tmp_path / 'other'}"])


def test_what_nobody_added_is_told(pretrained, monkeypatch):
    with pytest.raises(simclr_jax.UserError, match="model.encoder='mixer': known here are 'resnet', 'vit'"):
        simclr_jax.get_config("digits", {"model.encoder": "mixer"})
    with pytest.raises(
        simclr_jax.UserError, match="loss='simsiam': known here are 'nt_xent', 'dcl', 'barlow_twins'"
    ):
        simclr_jax.get_config("digits", {"loss": "simsiam"})
    with pytest.raises(simclr_jax.UserError, match="fine_tune_after_block=1 is of ResNets"):
        overrides = {"pretrained": str(pretrained), "model.encoder": "vit", "fine_tune_after_block": 1}
        simclr_jax.get_config("digits:finetune", overrides)
    monkeypatch.delitem(models.ENCODERS, "vit")
    with pytest.raises(simclr_jax.UserError, match="model.encoder='vit': known here are 'resnet'"):
        simclr_jax.load(pretrained)


def test_a_loss_of_ones_own_trains(tmp_path):
    config = simclr_jax.get_config(
        "digits", TINY | {"loss": "barlow_twins", "num_steps": 4, "microbatches": 2}
    )
    simclr_jax.run(config, tmp_path / "run")
    log = log_of(tmp_path / "run")[1:]  # behind step 0, which has no loss
    assert all(np.isfinite(line["loss"]) and line["redundancy"] > 0 for line in log)
    assert not any("contrastive_accuracy" in line for line in log)


def test_its_gradient_is_that_of_the_global_batch():
    views = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)

    def gradient(devices):
        def of_device(scale, views):
            loss = losses.LOSSES["barlow_twins"]
            gradient_here = jax.grad(lambda s: loss(*(views * s), temperature=1.0, axis_name=AXIS)[0])(scale)
            return jax.lax.pmean(gradient_here, AXIS)

        mapped = jax.pmap(of_device, AXIS, in_axes=(None, 0), out_axes=None, devices=jax.devices()[:devices])
        parts = views.reshape(2, devices, -1, 8).swapaxes(0, 1)
        return np.asarray(mapped(np.linspace(0.5, 2, 8, dtype=np.float32) * np.ones((2, 1, 8)), parts))

    whole = gradient(1)
    for devices in (2, 4, 8):
        np.testing.assert_allclose(gradient(devices), whole, rtol=1e-3, atol=1e-5)


QUEUE = TINY | {"loss": "queue", "num_steps": 6, "checkpoint_every_steps": 2}


def test_a_loss_with_state_resumes_to_the_bit(tmp_path):
    config = simclr_jax.get_config("digits", QUEUE | {"microbatches": 2})

    def stop(step, metrics):
        if step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        simclr_jax.run(config, tmp_path / "resumed", stop)
    simclr_jax.run(config, tmp_path / "resumed")
    simclr_jax.run(config, tmp_path / "whole")
    whole, resumed = log_of(tmp_path / "whole"), log_of(tmp_path / "resumed")
    assert [line.get("loss") for line in whole] == [line.get("loss") for line in resumed]
    assert all("kept" not in line for line in whole)


def test_a_loss_with_state_has_the_same_state_and_gradient_on_any_devices():
    config = simclr_jax.get_config("digits", QUEUE | {"dataset.num_examples": 64})
    source = datasets.load(config.dataset, "train", seed=0)
    batch = next(batches.train_batches(config, source, None, 0))
    model = models.make_model(config.model, 10)
    task = pretrain.make_task(config, model, source)
    states = {}
    for devices in (1, 2, 4, 8):
        state = jax.device_get(train.init_state(task, 0))
        parts = {name: rows.reshape(devices, -1, *rows.shape[1:]) for name, rows in batch.items()}
        step = train.mapped_step(task, jax.devices()[:devices])
        for _ in range(2):
            state, _ = step(state, {name: parts[name] for name in ("view1", "view2", "label")})
        states[devices] = jax.device_get(state)
    queue = states[1]["extra"]
    assert queue.shape == (4096, 128) and np.abs(queue[:32]).sum(axis=1).min() > 0
    assert not queue[32:].any()
    for devices in (2, 4, 8):
        np.testing.assert_allclose(states[devices]["extra"], queue, atol=1e-4)
        momentum = [jax.tree.leaves(states[n]["opt_state"]) for n in (1, devices)]
        for one, other in zip(*momentum):
            np.testing.assert_allclose(one, other, atol=2e-4)
