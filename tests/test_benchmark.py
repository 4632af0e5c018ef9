"""Benchmarks: that they measure what they say."""

import io
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

import simclr_jax
from simclr_jax import benchmark
from simclr_jax.benchmark import gpu_report, official_chain, other_views, torch_step
from simclr_jax.models import make_init, make_model
from simclr_jax.plan import cost
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_input_rate_is_that_of_the_pipeline():
    small = benchmark.input_rate(tiny_config("pretrain"), seconds=1.0)
    large = benchmark.input_rate(tiny_config("pretrain", image_size=224), seconds=1.0)
    assert small > 2 * large > 0


def test_input_is_measured_beside_others_in_turns(monkeypatch):
    open_batches, opened = benchmark._input_batches, []

    def record(config, records):
        for batch in open_batches(config, records):
            opened.append(batch["view1"].dtype)
            yield batch

    monkeypatch.setattr(benchmark, "_input_batches", record)
    rates = benchmark.input_rates(tiny_config("pretrain", image_size=64), rounds=2, seconds=0.3)
    assert {"ours", "ours, on_device", "official"} <= rates.keys()
    assert all(len(samples) == 2 and min(samples) > 0 for samples in rates.values())
    assert {np.dtype(kind) for kind in opened} == {np.dtype(np.uint8), np.dtype(np.float16)}


def test_files_are_as_large_as_those_of_imagenet():
    records = benchmark.jpeg_files(224)
    assert {Image.open(io.BytesIO(record)).size for record in records} == {(500, 375)}
    assert 80_000 < np.mean([len(record) for record in records]) < 130_000


def test_the_official_chain_gives_two_views():
    records = benchmark.jpeg_files(48)
    batch = next(official_chain.batches(records, image_size=32, strength=1.0, batch_size=8))
    assert batch.shape == (8, 32, 32, 6) and batch.dtype == np.float32
    assert batch.min() >= 0 and batch.max() <= 1 and np.abs(batch[..., :3] - batch[..., 3:]).mean() > 0.02


@pytest.mark.parametrize("name", ["albumentations", "lightly"])
def test_chains_of_others_make_views(name):
    if name not in other_views.installed():
        pytest.skip(f"{name} is not installed")
    records = benchmark.jpeg_files(48).tolist()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert other_views.rate(pool, 1, name, records, 0.3, image_size=32, strength=1.0) > 0


def test_step_rate_counts_two_views_an_image():
    report = benchmark.step_rate(tiny_config("pretrain"), steps=2)
    assert report["views"] == pytest.approx(2 * 64 / report["seconds"])


def test_tiles_save_memory():
    whole = benchmark.loss_cost(2048, tile=0, limit=0)
    tiles = benchmark.loss_cost(2048, tile=256, limit=0)
    assert whole["bytes"] > 4 * 4 * 2048**2 and "seconds" not in tiles
    assert whole["bytes"] > 5 * tiles["bytes"]
    assert benchmark.loss_cost(512, tile=0)["seconds"] > 0


def test_the_peer_takes_the_same_step():
    pytest.importorskip("torch")
    small = {"batch_size": 8, "image_size": 40, "model.depth": 18, "microbatches": 2}
    config = simclr_jax.get_config("imagenet", small)
    report = cost.run_in_process(torch_step.torch_step_rate, config, 10, 1)  # as PyTorch and TensorFlow clash
    assert report["views"] == pytest.approx(2 * 8 / report["seconds"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model.stem": "cifar", "model.width": 1},
        {"model.depth": 18, "model.project_first": False},
        {"model.depth": 50, "model.bottleneck_width": 2.0},
    ],
)
def test_the_peer_has_as_many_parameters(settings):
    pytest.importorskip("torch")
    config = simclr_jax.get_config("digits", settings)
    variables = jax.eval_shape(make_init(make_model(config.model, 10), 24), jax.random.key(0))
    network = torch_step.make_network(config, 10)
    sizes = [sorted(leaf.size for leaf in jax.tree.leaves(variables["params"]))]
    sizes += [sorted(leaf.numel() for leaf in network.parameters() if leaf.requires_grad)]
    assert sizes[0] == sizes[1]


def test_steps_are_taken_in_turns():
    pytest.importorskip("torch")
    config = simclr_jax.get_config("digits", {"batch_size": 8, "model.width": 0.25})
    times = benchmark.steps_in_turns(config, 10, rounds=3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"ours": 3, "PyTorch": 3}
    assert min(map(min, times.values())) > 0


def test_a_peer_without_such_a_network_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    torch_step.check_torch(simclr_jax.get_config("digits", {}))
    for settings in ({"model.sk_ratio": 0.0625}, {"remat": True}, {"model.projection_layers": 0}):
        with pytest.raises(UserError, match="without selective kernels"):
            torch_step.check_torch(simclr_jax.get_config("imagenet", settings))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch$"):
        torch_step.check_torch(simclr_jax.get_config("imagenet", {}))


def test_unknown_benchmarks_are_one_line():
    command = [sys.executable, "-m", "simclr_jax.benchmark", "outputs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: 'outputs' is unknown: give input, step, or loss alone\n"


def test_the_report_has_every_form_of_the_step_and_the_loss(monkeypatch):
    def no_torch(config):
        raise UserError("--peer=torch needs PyTorch: pip install torch")

    monkeypatch.setattr(torch_step, "check_torch", no_torch)
    monkeypatch.setattr(cost, "run_in_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmark, "input_rate", lambda config: 123.4)
    measured = []

    def step_rate(config, steps):
        if config.batch_size % 8:
            raise UserError(f"batch_size={config.batch_size} does not divide over 8 devices")
        measured.append(config.augment.on_device)
        return {"seconds": 0.5, "views": 4.0 * config.batch_size, "memory": 2**31, "expected": 0.25}

    monkeypatch.setattr(benchmark, "step_rate", step_rate)
    lines = list(
        gpu_report.lines(tiny_config("pretrain"), images=[16, 20], large=(32, 2), pairs=2048, steps=1)
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    steps = [row for row in rows if len(row) == len(gpu_report._HEAD)][2:]
    assert [row[:2] for row in steps] == [
        [images, form] for images in ("16", "20", "32 in 2") for form in ("PyTorch", "ours", "on_device")
    ]
    for row in steps:
        if row[1] == "PyTorch":
            assert "needs PyTorch" in row[2]
        elif row[0] == "20":
            assert "batch_size=20 does not divide" in row[2]
        else:
            count = int(row[0].split()[0])
            assert row[2:] == [str(4 * count), "", "2.0", "", "", str(8 * count)]
    assert measured == [False, True] * 2
    assert lines[0] == "# cpu\n" and "2,048" in rows[-1] and "123 images/s a core" in lines[-1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--images=256,many", "--images=256,many: 'many' is no whole number"),
        ("--large=8192", "--large=8192: expected images,microbatches"),
        ("--config=configs/digits.py:knn", "the report is of pretraining, not of knn"),
        ("--output=README.md", "--output=README.md exists already"),
    ],
)
def test_mistakes_of_the_report_are_one_line(flag, message):
    config = [] if flag.startswith("--config=") else ["--config=configs/digits.py"]
    command = [sys.executable, "-m", "simclr_jax.gpu_report", *config, flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.journey
def test_cifar10_fills_its_table_and_goes_on(tmp_path):
    """Runs on 40 images a few steps; the second time nothing runs again, and the table is the same."""
    rng = np.random.default_rng(0)
    for split, images in (("train", 16), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for number in range(images):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    small = {"dataset.name": "folder", "dataset.path": tmp_path / "photos", "batch_size": 16, "num_steps": 4}
    small |= {"model.depth": 8, "model.width": 0.125, "evaluate.pictures": False}
    flags = [f"--config.{key}={value}" for key, value in small.items()]
    flags += [f"--workdir={tmp_path / 'runs'}", f"--output={tmp_path / 'table.md'}", "--tasks=pretrain_200"]
    command = [sys.executable, "-m", "simclr_jax.benchmark.cifar10", "--config=configs/cifar10.py", *flags]

    def table():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return (tmp_path / "table.md").read_text(), done.stdout

    (first, _), (second, output) = table(), table()
    assert first == second and output.count("holds a run that is over") == 3
    cells = [cell.strip() for cell in first.splitlines()[-1].strip("|").split("|")]
    assert cells[0] == "200" and float(cells[2].replace(",", "")) > 0
    assert all(cell.endswith("%") for cell in cells[4:])
