"""Several real processes, joined over loopback, against one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from conftest import tiny_config

from simclr_jax import checkpoint, train
from simclr_jax.models import make_model
from simclr_jax.tasks import pretrain

ROOT = Path(__file__).parent.parent
SETTINGS = {"batch_size": 16, "num_steps": 5, "log_every_steps": 1}


def environment(devices):
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "TEST_DEVICES": str(devices),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }


def join(count):
    """The flags by which each of so many processes joins a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}"]
        for index in range(count)
    ]


def examine(folder):
    """Writes what this process sees: its rows, the raw gradients of step 2, and the state after five steps.

    Warmup starts at zero: the first step changes nothing, so the second one's gradients are those of the
    initial parameters.
    """
    config = tiny_config("pretrain", **SETTINGS)
    from simclr_jax.data import datasets

    source = datasets.load(config.dataset, "train", seed=config.seed)
    model = make_model(config.model, source.num_classes)
    task = pretrain.make_task(config, model, source)
    task = task._replace(optimizer=optax.chain(optax.trace(decay=0.0), task.optimizer))
    batch = next(task.batches(0))
    state = train.fit(task._replace(num_steps=2), config, folder)
    gradients = jax.device_get(state["opt_state"][0].trace)
    after = train.fit(task, config, folder)
    after = jax.device_get({"params": after["params"], "batch_stats": after["batch_stats"]})
    name = f"{jax.process_count()}x{jax.local_device_count()}-{jax.process_index()}.npz"
    trees = {"gradients": gradients, "after": after}
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(trees)}
    np.savez(folder.parent / name, **{f"batch/{key}": rows for key, rows in batch.items()}, **flat)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """What `examine` wrote on 2 processes x 4 devices, 1 x 8 and 1 x 1; and where."""
    folder = tmp_path_factory.mktemp("shapes")
    script = "import sys, pathlib, test_processes; from simclr_jax import parallel\n"
    script += "parallel.initialize(*(kind(flag.partition('=')[2])"
    script += " for kind, flag in zip((str, int, int), sys.argv[2:])))\n"
    script += "test_processes.examine(pathlib.Path(sys.argv[1]))"
    for name, devices, processes in (("two", 4, join(2)), ("one", 1, [[]])):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(folder / name), *flags], env=environment(devices)
            )
            for flags in processes
        ]
        assert [process.wait(timeout=300) for process in started] == [0] * len(started)
    examine(folder / "eight")
    found = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    assert sorted(found) == ["1x1-0", "1x8-0", "2x4-0", "2x4-1"]
    return found, folder


def assert_close(actual, expected, prefix, tolerance):
    for key in expected:
        if key.startswith(prefix):
            scale = max(np.abs(expected[key]).max(), 1e-6)
            assert np.abs(actual[key] - expected[key]).max() <= tolerance * scale, key


def test_processes_share_one_global_batch(shapes):
    found, _ = shapes
    for key in ("batch/view1", "batch/view2", "batch/label", "batch/index"):
        halves = np.concatenate([found["2x4-0"][key], found["2x4-1"][key]])
        np.testing.assert_array_equal(halves, found["1x8-0"][key])
        np.testing.assert_array_equal(halves, found["1x1-0"][key])
        assert len(found["2x4-0"][key]) == 8


@pytest.mark.parametrize("shape", ["2x4-0", "2x4-1", "1x8-0"])
def test_raw_gradients_do_not_depend_on_processes_and_devices(shapes, shape):
    assert_close(shapes[0][shape], shapes[0]["1x1-0"], "['gradients']", 1e-4)


@pytest.mark.parametrize("shape", ["2x4-0", "2x4-1", "1x8-0"])
def test_parameters_after_five_steps_do_not_either(shapes, shape):
    assert_close(shapes[0][shape], shapes[0]["1x1-0"], "['after']", 2e-3)


def test_processes_agree_to_the_bit(shapes):
    zero, one = shapes[0]["2x4-0"], shapes[0]["2x4-1"]
    for key in zero:
        if not key.startswith("batch"):
            np.testing.assert_array_equal(zero[key], one[key])


def test_checkpoint_of_two_processes_is_restored_by_one(shapes):
    found, folder = shapes
    variables, meta = checkpoint.load_params(folder / "two")
    restored = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree.leaves_with_path({"after": variables})}
    for key, leaf in restored.items():
        np.testing.assert_array_equal(leaf, found["2x4-0"][key])
    assert meta["num_classes"] == 10 and len(restored) > 10


MAIN = [
    "--config=configs/digits.py",
    "--config.model.width=0.125",
    "--config.batch_size=16",
    "--config.num_steps=20",
    "--config.log_every_steps=1",
    "--config.evaluate.compare=False",
    "--config.evaluate.max_examples=128",
]


def run_main(workdir, *, processes, devices, stop=None):
    """Runs main on all processes; SIGTERM to process `stop` once step 3 of this start is told of."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "simclr_jax.main", f"--workdir={workdir}", *MAIN, *flags],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for flags in (join(processes) if processes > 1 else [[]])
    ]
    told, lines = 0, []
    for line in started[0].stdout:
        lines.append(line)
        told += line.startswith("step")
        if told == 3 and stop is not None:
            started[stop].send_signal(signal.SIGTERM)
            stop = None
    outputs = ["".join(lines), *(process.communicate(timeout=300)[0] for process in started[1:])]
    assert [process.wait(timeout=60) for process in started] == [0] * processes, outputs
    return outputs


def log_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_survives_stops_of_any_process_and_changes_of_their_number(tmp_path):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run_main(straight, processes=1, devices=1)
    stopped = []
    for processes, devices, stop in ((2, 2, 1), (1, 8, 0), (2, 1, 0)):
        outputs = run_main(moved, processes=processes, devices=devices, stop=stop)
        assert f"{processes * devices} x cpu, {processes} process(es)" in outputs[0]
        assert all("step" not in output for output in outputs[1:])
        if stopped:
            assert f"resuming after step {stopped[-1]} of 20" in outputs[0]
        stopped.append(int(re.search(r"stopped by SIGTERM, saved after step (\d+)", outputs[0]).group(1)))
        assert (moved / "checkpoints" / str(stopped[-1]) / "state").is_dir()
    run_main(moved, processes=1, devices=1)
    assert 3 <= stopped[0] < stopped[1] < stopped[2] < 20
    assert [line["step"] for line in log_of(moved)] == list(range(1, 21))
    for one, other in zip(log_of(straight)[:10], log_of(moved)):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
