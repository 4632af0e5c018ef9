"""A student learns what a teacher predicts, from images without labels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from conftest import run_task, tiny_config
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits

import simclr_jax
from simclr_jax import checkpoint, losses, parallel, train
from simclr_jax.evaluation.features import Features
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


@pytest.fixture(scope="module")
def digits_with_vectors(tmp_path_factory):
    """A folder of digits, and the overrides of a student that learns vectors of them: their pixels."""
    root = tmp_path_factory.mktemp("vectors")
    images = np.round(load_digits().images[:300] * 255 / 16).astype(np.uint8)
    (root / "photos").mkdir()
    names = [f"{row:03d}.png" for row in range(len(images))]
    for name, image in zip(names, images):
        Image.fromarray(image).save(root / "photos" / name)
    np.savez(root / "vectors.npz", name=names, features=images.reshape(-1, 64))
    overrides = {"dataset.name": "folder", "dataset.path": str(root / "photos"), "num_steps": 60}
    return root, overrides | {"augment.flip": False, "augment.min_area": 0.9, "evaluate.every_epochs": 100.0}


def test_a_student_learns_vectors_that_any_network_gave_the_images(digits_with_vectors, tmp_path):
    root, overrides = digits_with_vectors
    overrides |= {"embeddings": str(root / "vectors.npz"), "model.width": 0.5}
    summary = run_task("distill", tmp_path / "run", **overrides)
    assert summary["similarity"] > 0.4 and summary["steps"] == 60  # about 0 without training
    encoder = simclr_jax.load(tmp_path / "run")
    images = np.stack([np.asarray(Image.open(root / "photos" / f"{row:03d}.png")) for row in range(20)])
    features = encoder(np.repeat(images[..., None], 3, -1))
    assert features.shape == (
        20,
        encoder.model.apply(encoder.variables, images[:1, ..., None].repeat(3, -1))["features"].shape[1],
    )
    with pytest.raises(UserError, match="holds no classifier|no classifier"):
        encoder.predict(features)


@pytest.mark.parametrize("kind", ["parquet", "other names", "some", "no vectors", "no file", "two teachers"])
def test_files_of_vectors(digits_with_vectors, tmp_path, capsys, monkeypatch, kind):
    root, overrides = digits_with_vectors
    monkeypatch.setattr(train, "fit", lambda task, *_: next(task.batches(0)))
    monkeypatch.setattr(
        distill, "make_extract", lambda *_: lambda batch, _: Features(batch["vector"], batch["label"])
    )
    columns = dict(np.load(root / "vectors.npz"))
    path = tmp_path / "vectors.parquet"
    if kind == "other names":
        columns["name"] = np.char.add("a/", columns["name"])
    if kind == "some":
        columns = {name: rows[:200] for name, rows in columns.items()}
    table = {"name": columns["name"].tolist(), "embedding": list(columns["features"])}
    if kind == "no vectors":
        table = {"name": table["name"], "size": [64] * 300}
    if kind != "no file":
        parquet.write_table(pyarrow.table(table), path)
    overrides = overrides | {"embeddings": str(path), "pretrained": "RUN" if kind == "two teachers" else None}
    expected = {
        "other names": "has a/000.png and others, and none is an image of",
        "no vectors": "has name, size: expected the columns name and features",
        "no file": "cannot be read",
        "two teachers": "embeddings and pretrained are both set",
    }
    if kind in expected:
        with pytest.raises(UserError, match=expected[kind]):
            run_task("distill", tmp_path / "run", **overrides)
        return
    summary = run_task("distill", tmp_path / "run", **overrides)
    assert summary["similarity"] == pytest.approx(1, abs=1e-5)  # each image has its own vector
    assert ("images have no vector" in capsys.readouterr().out) == (kind == "some")
