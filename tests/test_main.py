"""The command line as a user meets it: real processes, from a fresh workdir to a restart."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import log_of, xla_flags
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = [
    "--config.model.width=0.125",
    "--config.batch_size=16",
    "--config.log_every_steps=5",
    "--config.evaluate.compare=False",
    "--config.evaluate.pictures=False",
    "--config.evaluate.max_examples=128",
]
# A memory of negatives fills in 2 of the steps, and the average changes in each.
TWENTY = [*TINY, "--config.num_steps=20", "--config.memory.size=64", "--config.memory.decay=0.9"]


def command(config, workdir, *arguments):
    return [
        sys.executable,
        "-m",
        "simclr_jax.main",
        f"--config=configs/{config}.py",
        f"--workdir={workdir}",
        *arguments,
    ]


def environment(devices=1):
    return os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "JAX_PLATFORMS": "cpu",
    }


def run(config, workdir, *arguments, devices=1, code=0):
    """Runs to the end; returns what it printed."""
    done = subprocess.run(
        command(config, workdir, *arguments),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(config, workdir, *arguments):
    """Starts a run on two devices; its output can be read while it runs."""
    return subprocess.Popen(
        command(config, workdir, *arguments), cwd=ROOT, env=environment(2), stdout=subprocess.PIPE, text=True
    )


def state_at(workdir, step):
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, left), right in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twenty steps of pretraining on digits with a memory, without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run("digits", workdir, *TWENTY, devices=2)


@pytest.mark.journey
def test_a_run_that_goes_on_or_begins_elsewhere_compiles_nothing(tmp_path, monkeypatch):
    """It finds its mapped programs in the user's cache, and none is added; without the key none is kept."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def programs():
        return {path.name for path in (tmp_path / "cache/simclr_jax/compiled").glob("*/jit__fun*-cache")}

    settings = [*TINY, "--config.num_steps=4", "--config.checkpoint_every_steps=2"]
    assert "first step" in run("digits", tmp_path / "run", *settings)
    compiled = programs()
    assert compiled
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    out = run("digits", tmp_path / "run", *settings)
    assert "resuming after step 2 of 4" in out
    run("digits", tmp_path / "other", *settings)
    assert programs() == compiled
    shutil.rmtree(tmp_path / "cache")
    run("digits", tmp_path / "third", *settings, "--config.keep_compiled=False")
    assert not programs()


def test_pretraining_tells_what_it_does_and_writes_everything(straight):
    workdir, out = straight
    for word in (
        "digits (train): 1,437 images",
        "10 classes",
        "ResNet-8",
        "16 images, 8 a device",
        "2 x cpu",
    ):
        assert word in out
    assert re.search(r"step 20/20 .*loss .*images/s  data wait", out)
    assert [line["step"] for line in log_of(workdir)] == [0, 5, 10, 15, 20]
    expected = {
        "loss",
        "contrastive_accuracy",
        "contrastive_entropy",
        "learning_rate",
        "images_per_second",
        "data_wait",
    }
    assert expected <= set(log_of(workdir)[1]) and not expected & set(log_of(workdir)[0])
    assert "knn_accuracy" in log_of(workdir)[0] and "knn_accuracy" in log_of(workdir)[-1]
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 16
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 20 and summary["seconds"] > 0
    assert 0 < summary["trained"]["knn_accuracy"] <= 1
    assert list(workdir.glob("events.out.tfevents*"))


@pytest.mark.journey
def test_sigterm_and_restart_equal_twenty_steps_straight_bit_for_bit(straight, tmp_path):
    arguments = [*TWENTY, "--config.log_every_steps=1"]
    with start("digits", tmp_path, *arguments) as process:
        for line in process.stdout:
            if re.match(r"step +2/", line):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    (stopped,) = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert 2 <= stopped < 20
    out = run("digits", tmp_path, *arguments, devices=2)
    assert f"resuming after step {stopped} of 20" in out
    assert_same_bits(state_at(tmp_path, 20), state_at(straight[0], 20))
    assert [line["step"] for line in log_of(tmp_path)] == list(range(21))


@pytest.mark.journey
def test_killed_run_goes_on_from_its_last_checkpoint(straight, tmp_path):
    arguments = [
        *TWENTY,
        "--config.checkpoint_every_steps=3",
        "--config.log_every_steps=1",
    ]
    with start("digits", tmp_path, *arguments) as process:
        for line in process.stdout:
            # The save of step 6 has begun, which waits for that of step 3 to be done.
            if re.match(r"step +8/", line):
                process.kill()
    out = run("digits", tmp_path, *arguments, devices=2)
    step = int(re.search(r"resuming after step (\d+)", out).group(1))
    assert step >= 3 and step % 3 == 0
    assert_same_bits(state_at(tmp_path, 20), state_at(straight[0], 20))
    assert [line["step"] for line in log_of(tmp_path)] == list(range(21))


def test_a_signal_while_the_first_step_compiles_ends_it_in_order(tmp_path):
    afresh = environment() | {"JAX_COMPILATION_CACHE_DIR": ""}
    with subprocess.Popen(
        command("digits", tmp_path), cwd=ROOT, env=afresh, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "by chance" in line:
                time.sleep(3)
                process.send_signal(signal.SIGTERM)
                begun = time.monotonic()
    assert process.returncode == 0 and time.monotonic() - begun < 8


@pytest.mark.journey
def test_number_of_devices_does_not_change_the_result(straight, tmp_path):
    run("digits", tmp_path, *TWENTY, devices=8)
    for one, other in zip(log_of(straight[0])[1:3], log_of(tmp_path)[1:3]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.journey
def test_imagenet_starts_on_mock_data_by_overrides_alone(tmp_path):
    script = "import tensorflow_datasets as tfds; from simclr_jax import main\n"
    script += "with tfds.testing.mock_data(num_examples=16): main.run()"
    arguments = ["--config.batch_size=8", "--config.num_steps=2", "--config.image_size=33"]
    arguments += ["--config.dataset.num_examples=16", "--config.model.width=0.0625"]
    arguments += ["--config.model.depth=18"]
    done = subprocess.run(
        [sys.executable, "-c", script, "--config=configs/imagenet.py", f"--workdir={tmp_path}", *arguments],
        cwd=ROOT,
        env=environment(2),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "imagenet2012 (train): 16 images of 33 pixels, 1000 classes" in done.stdout
    assert (tmp_path / "checkpoints" / "2").is_dir()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for number in range(24):
        path = folder / f"roll{number % 2}" / "nested" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return folder


@pytest.mark.journey
def test_folder_without_labels_skips_corrupt_images(photos, tmp_path):
    good = (photos / "roll0" / "nested" / "0.jpg").read_bytes()
    for path in sorted(photos.rglob("*.jpg")):
        path.rename(photos / path.name)
    (photos / "broken.jpg").write_bytes(good[: len(good) // 2])
    (photos / "text.jpg").write_text("no image")
    arguments = [f"--config.dataset.path={photos}", "--config.image_size=32", "--config.model.width=0.125"]
    arguments += ["--config.model.depth=8", "--config.batch_size=8", "--config.num_steps=3"]
    out = run("folder", tmp_path / "run", *arguments)
    assert "broken.jpg" in out and "text.jpg" in out and "skipped 2 corrupt" in out
    assert "no labels" in out
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


MISTAKES = {
    "unknown key": (
        ["--config.batchsize=3"],
        "--config.batchsize is unknown: did you mean --config.batch_size?",
    ),
    "unknown nested key": (["--config.model.dept=3"], "did you mean --config.model.depth?"),
    "unknown flag": (["--workdri=x"], "did you mean --workdir?"),
    "wrong type": (["--config.batch_size=many"], "batch_size"),
    "negative": (
        ["--config.temperature=-1.0"],
        "temperature=-1.0: set --config.temperature to a number above 0",
    ),
    "task": (["--config.task=pretrian"], "task 'pretrian' is unknown: set --config.task to one of distill"),
    "no steps": (["--config.num_steps=-1"], "num_steps=-1: set --config.num_steps to a number above 0"),
    "range": (["--config.augment.color_jitter_strength=2.0"], "of at least 0 and at most 1.25"),
    "batch": (["--config.batch_size=129"], "batch_size=129 does not divide over 2 devices"),
    "depth": (["--config.model.depth=51"], "51"),
    "dataset": (["--config.dataset.name=cifar11"], "cifar11"),
    "unprepared": (
        ["--config.dataset.name=cifar10", "--config.dataset.data_dir=/nowhere"],
        "tfds.builder('cifar10', data_dir='/nowhere').download_and_prepare()",
    ),
    "optimizer": (["--config.optimizer.name=lamb"], "'lamb': set it to 'lars', 'sgd' or 'adam'"),
    "stray word": (["digits"], "'digits' is not a flag"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_with_2(mistake, tmp_path):
    arguments, message = MISTAKES[mistake]
    workdir = tmp_path / "run"
    done = subprocess.run(
        command("digits", workdir, *arguments), cwd=ROOT, env=environment(2), capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not workdir.exists()


def test_mistaken_configs_are_one_line(tmp_path):
    for config, message in [("nothing", "does not exist"), ("digits.py:linear_evil", "task 'linear_evil'")]:
        done = subprocess.run(
            [sys.executable, "-m", "simclr_jax.main", f"--config=configs/{config}"],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ") and message in line


def test_empty_and_missing_folders_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "missing"):
        out = run("folder", tmp_path / "run", f"--config.dataset.path={tmp_path / path}", code=2)
        assert out.startswith("error: ") and path in out and out.count("\n") == 1


def test_a_run_that_is_over_prints_its_summary_and_ends(straight):
    before = {path: path.stat().st_mtime_ns for path in straight[0].rglob("*")}
    begun = os.times()
    out = run("digits", straight[0], *TWENTY, devices=2)
    ended = os.times()
    assert "holds a run that is over" in out and "steps 20" in out and "measuring" not in out
    assert {path: path.stat().st_mtime_ns for path in straight[0].rglob("*")} == before
    spent = ended.children_user + ended.children_system - begun.children_user - begun.children_system
    assert spent < 15  # CPU seconds, most of them imports


@pytest.mark.journey
def test_a_run_that_is_over_but_damaged_goes_on(straight, tmp_path):
    workdir = shutil.copytree(straight[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "20" / "meta")
    out = run("digits", workdir, *TWENTY, devices=2, code=2)
    assert re.search(r"error: every checkpoint in .* is damaged: 20 \(No such file", out)


def test_workdir_of_another_config_is_refused(straight):
    before = (straight[0] / "metrics.jsonl").read_bytes()
    out = run("digits", straight[0], *TWENTY, "--config.temperature=0.2", devices=2, code=2)
    assert "temperature is 0.5 there and 0.2 here" in out and out.count("\n") == 1
    assert (straight[0] / "metrics.jsonl").read_bytes() == before
