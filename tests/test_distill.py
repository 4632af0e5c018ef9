"""A student learns what a teacher predicts, from images without labels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_task, tiny_config

from simclr_jax import checkpoint, losses, parallel
from simclr_jax.models import make_init, make_model
from simclr_jax.process.errors import UserError
from simclr_jax.tasks import distill

pytestmark = pytest.mark.slow


def batch_of(rows=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (rows, 16, 16, 3), np.uint8),
        "label": np.where(np.arange(rows) % 4 == 0, rng.integers(0, 10, rows), -1).astype(np.int32),
        "teacher_logits": rng.standard_normal((rows, 10)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def student():
    model = make_model(tiny_config("distill").model, 10, whole_projection=False)
    return model, make_init(model, 16)(jax.random.key(0))


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_loss_is_distillation_with_a_share_of_the_known_labels(student, label_weight):
    model, variables = student
    config, batch = tiny_config("distill", temperature=0.5, label_weight=label_weight), batch_of()
    config.optimizer.weight_decay = 0.0
    value, (_, results) = jax.jit(distill.make_loss(model, config))(
        variables["params"], variables["batch_stats"], batch
    )
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    logits = apply(variables, batch["image"])[0]["logits"]
    known = batch["label"] >= 0
    expected = (1 - label_weight) * losses.distillation(logits, batch["teacher_logits"], temperature=0.5)
    expected += label_weight * losses.softmax_cross_entropy(logits[known], batch["label"][known])
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert results["agreement"] == (logits.argmax(axis=1) == batch["teacher_logits"].argmax(axis=1)).mean()


def test_known_labels_weigh_the_same_on_whatever_device_they_are():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((32, 10)).astype(np.float32)
    labels = np.where(np.arange(32) < 7, rng.integers(0, 10, 32), -1)  # devices 2 to 7 know none

    def mean(batch):
        return jax.lax.pmean(distill.masked_cross_entropy(batch["logits"], batch["label"]), parallel.AXIS)

    actual = parallel.pmap(lambda _, batch: mean(batch))(
        np.zeros(()), parallel.shard({"logits": logits, "label": labels})
    )
    assert actual == pytest.approx(float(losses.softmax_cross_entropy(logits[:7], labels[:7])), rel=1e-5)
    nobody = parallel.shard({"logits": logits, "label": np.full(32, -1)})
    assert parallel.pmap(lambda _, batch: mean(batch))(np.zeros(()), nobody) == 0
    assert distill.masked_cross_entropy(jnp.asarray(logits), labels) == pytest.approx(float(actual), rel=1e-5)


def test_teacher_answers_in_eval_mode_for_the_rows_it_is_asked(student):
    model, variables = student
    images = batch_of(16)["image"]
    teach = distill.make_teach(model, parallel.replicate(variables))
    taught = teach(parallel.shard({"image": images}))
    assert taught["teacher_logits"].shape == (8, 2, 10)
    expected = jax.jit(model.apply)(variables, images)["logits"]
    np.testing.assert_allclose(taught["teacher_logits"].reshape(16, 10), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.journey
def test_student_is_smaller_and_the_labels_are_the_teachers(finetuned_run, tmp_path):
    settings = {"model.width": 0.0625, "num_steps": 3}
    summary = run_task("distill", tmp_path, pretrained=str(finetuned_run), **settings)
    assert summary["parameters"] < summary["teacher_parameters"] / 2
    assert {"top1", "top5", "teacher_top1", "labels_only_top1", "steps"} < set(summary)
    assert (tmp_path / "labels.json").read_bytes() == (finetuned_run / "labels.json").read_bytes()
    saved, meta = checkpoint.load_params(tmp_path)
    assert saved["params"]["encoder"]["conv1"]["kernel"].shape[-1] == 4 and meta["num_classes"] == 10
    assert (tmp_path / "labels_only" / "checkpoints" / "3").is_dir()


@pytest.mark.journey
def test_self_distillation_is_a_student_like_its_teacher(finetuned_run, tmp_path):
    settings = {"model.width": 0.125, "num_steps": 1, "temperature": 0.1, "evaluate.compare": False}
    summary = run_task("distill", tmp_path, pretrained=str(finetuned_run), **settings)
    assert summary["parameters"] == summary["teacher_parameters"]
    assert "labels_only_top1" not in summary


def test_teacher_of_other_classes_is_a_user_error(finetuned_run, tmp_path, monkeypatch):
    saved, meta = checkpoint.load_params(finetuned_run)
    monkeypatch.setattr(checkpoint, "load_params", lambda path, average: (saved, meta | {"num_classes": 7}))
    message = r"tells 7 classes apart \(.*\), but digits \(train\) has 10 \(0, 1, 2 and 7 more\): choose"
    with pytest.raises(UserError, match=message):
        run_task("distill", tmp_path, pretrained=str(finetuned_run))
    others = [f"class {number}" for number in range(10)]
    monkeypatch.setattr(
        checkpoint, "load_params", lambda path, average: (saved, meta | {"class_names": others})
    )
    with pytest.raises(UserError, match=r"apart \(class 0, class 1, class 2 and 7 more\), but digits"):
        run_task("distill", tmp_path, pretrained=str(finetuned_run))


def test_teacher_without_a_classifier_is_a_user_error(finetuned_run, tmp_path, monkeypatch):
    saved, meta = checkpoint.load_params(finetuned_run)
    monkeypatch.setattr(checkpoint, "load_params", lambda path, average: (saved, meta | {"num_classes": 0}))
    with pytest.raises(UserError, match="holds no classifier: give the workdir of a finetune run"):
        run_task("distill", tmp_path, pretrained=str(finetuned_run))
