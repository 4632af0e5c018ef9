"""Verbs of the command `simclr-jax`: the flags that they stand for, and the road in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import xla_flags
from PIL import Image
from sklearn.datasets import load_digits

from simclr_jax.config import settings, shipped, verbs
from simclr_jax.process import UserError
from simclr_jax.workdir import records

ROOT = Path(__file__).parent.parent


def save(workdir, file, **dataset):
    config = settings.defaults(f"configs/{file}.py")
    config.dataset.update(dataset)
    records.save_config(workdir, config.to_dict())
    return str(workdir)


def test_a_run_knows_its_images_config_and_folder(tmp_path):
    photos = str(tmp_path / "photos")
    run = save(tmp_path / "run", "folder", path=photos, max_pixels=1000, on_device=True)
    flags = verbs.flags_of("finetune", [run, "--labels=l.csv", "--config.num_steps=3"])
    assert set(flags) == {
        "--config=configs/folder.py:finetune",
        f"--config.pretrained={run}",
        f"--workdir={run}/classifier",
        f"--config.dataset.path={photos}",
        "--config.dataset.max_pixels=1000",
        "--config.dataset.labels=l.csv",
        "--config.num_steps=3",
    }
    flags = verbs.flags_of("predict", [run + "/", "new", "--workdir=w"])
    assert flags == [
        "--config=configs/folder.py:predict",
        f"--config.pretrained={run}/",
        "--config.dataset.path=new",
        "--workdir=w",
    ]


def test_predictions_are_no_truth_to_measure_others_by(tmp_path):
    labels = tmp_path / "sure.csv"
    run = save(tmp_path / "run", "folder", path=str(tmp_path), labels=str(labels))
    given = f"--config.dataset.labels={labels}"
    labels.write_text("name,label\n1.png,a\n")
    assert given in verbs.flags_of("predict", [run])
    labels.write_text("name;label;probability;a;margin;truth\n1.png;a;1;1;1;\n")
    assert given not in verbs.flags_of("predict", [run]) and given in verbs.flags_of("finetune", [run])


def test_a_folder_is_predicted_by_a_run_on_another_dataset(tmp_path):
    run = save(tmp_path / "run", "digits")
    assert verbs.flags_of("knn", [run])[0] == "--config=configs/digits.py:knn"
    flags = verbs.flags_of("predict", [run, "new"])
    assert flags[0] == "--config=configs/folder.py:predict" and flags[-1] == "--config.dataset.path=new"
    run = save(tmp_path / "other", "imagenet", name="eurosat")
    flags = verbs.flags_of("linear_eval", [run])
    assert (
        flags[0] == "--config=configs/imagenet.py:linear_eval"
        and flags[-1] == "--config.dataset.name=eurosat"
    )


@pytest.mark.parametrize(
    "task", ["linear_eval", "finetune", "knn", "transfer", "embed", "predict", "distill"]
)
@pytest.mark.parametrize("name", ["digits", "folder", "cifar10", "imagenet"])
def test_flags_make_a_config_of_the_runs_data(task, name, tmp_path):
    run = save(tmp_path, name, **({"path": str(tmp_path)} if name == "folder" else {}))
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in verbs.flags_of(task, [run]))
    keys = [(key.removeprefix("config."), text) for key, text in flags.items() if key.startswith("config.")]
    config, _, notes = settings.make(flags["config"], keys, as_text=True)
    assert config.task == task and config.dataset.name == records.read_config(run)["dataset"]["name"]
    assert not [note for note in notes if "no effect" in note]


def test_help_needs_no_run():
    assert verbs.flags_of("knn", ["--help"]) == ["--config=configs/folder.py:knn", "--help"]


def test_pretraining_takes_a_folder_or_a_config(tmp_path):
    assert verbs.flags_of("pretrain", ["digits", "--workdir=x"]) == [
        "--config=configs/digits.py",
        "--workdir=x",
    ]
    assert verbs.flags_of("pretrain", ["mine.py:pretrain_v2"]) == ["--config=mine.py:pretrain_v2"]
    flags = verbs.flags_of("pretrain", [f"{tmp_path}/photos/"])
    assert flags[1:] == [f"--config.dataset.path={tmp_path}/photos/", "--workdir=runs/photos"]


MISTAKES = {
    "no run": (["finetune"], "give the workdir of a run"),
    "two runs": (["knn", "a", "b"], "'b' is one word too many"),
    "another folder": (["knn", "nowhere"], "nowhere holds no config.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_remedy(mistake):
    words, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        verbs.flags_of(words[0], words[1:])


def test_every_verb_is_in_the_help_which_fits_a_screen():
    assert all(f" {verb}" in verbs.HELP for verb in [*shipped.tasks(), *verbs.MODULES, "round"])
    assert verbs.HELP.count("\n") < 30 and max(map(len, verbs.HELP.splitlines())) <= 110


def simclr(*words, folder):
    """Runs a verb from a folder; returns its exit code and what it printed."""
    environment = os.environ | {"XLA_FLAGS": xla_flags(2), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "simclr_jax", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_unknown_verbs_are_one_line(tmp_path):
    code, out = simclr("fine_tune", "RUN", folder=tmp_path)
    assert code == 2 and out.count("\n") == 1 and "'fine_tune' is no verb: choose one of distill" in out
    code, out = simclr("round", "RUN", folder=tmp_path)
    assert code == 2 and out.count("\n") == 1 and "--labels=labels.csv" in out
    assert simclr(folder=tmp_path) == (0, verbs.HELP + "\n")


@pytest.mark.slow
@pytest.mark.journey
def test_the_road_and_two_rounds_in_five_commands(tmp_path):
    """Every command but the first names the run alone, from a folder that is not the run's."""
    photos, elsewhere, run = tmp_path / "photos", tmp_path / "elsewhere", str(tmp_path / "run")
    photos.mkdir()
    elsewhere.mkdir()
    digits = load_digits()
    for row, image in enumerate(digits.images[:200]):
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(photos / f"{row}.png")
    small = {"image_size": 16, "batch_size": 32, "model.depth": 8, "model.width": 0.25, "num_steps": 4}
    flags = [f"--config.{key}={value}" for key, value in small.items()]
    code, out = simclr(
        "pretrain", "photos", f"--workdir={run}", "--config.pretrained=None", *flags, folder=tmp_path
    )
    assert code == 0 and f"next:  python -m simclr_jax look {run}" in out
    assert out.endswith(f"python -m simclr_jax finetune {run} --labels=labels.csv\n")
    for number, count in enumerate((20, 40), 1):
        rows = [f"{row}.png,{digits.target[row]}" for row in range(count)]
        (elsewhere / "labels.csv").write_text("\n".join(["name,label", *rows]))
        words = ["round", run, "--labels=labels.csv", "--config.num_steps=2", "--config.batch_size=16"]
        code, out = simclr(*words, folder=elsewhere)
        assert code == 0, out
        assert json.loads((tmp_path / f"run/round-{number}/summary.json").read_text())["labels"] == count
        assert (tmp_path / f"run/round-{number}/predicted/predictions.csv").exists()
    page = (tmp_path / "run/plots/index.html").read_text()
    assert "Accuracy of classifiers by their labels" in page and "round-2/predicted tells them apart" in page
    assert '"given": {"0.png": "0"' in page and '"correctable": true' in page
    code, out = simclr("predict", f"{run}/round-2", str(photos), folder=elsewhere)
    assert code != 0 and "--workdir" in out  # its folder holds the predictions of RUN's own images
