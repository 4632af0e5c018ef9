"""Several real processes, joined over loopback, against one."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from conftest import log_of, tiny_config, xla_flags
from flax.traverse_util import flatten_dict

from configs import digits
from simclr_jax import checkpoint, train
from simclr_jax.models import make_model
from simclr_jax.process import group, launchers
from simclr_jax.tasks import pretrain

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def environment(devices):
    return os.environ | {
        "XLA_FLAGS": xla_flags(devices),
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


def config_and_task(num_steps, **overrides):
    from simclr_jax.data import datasets

    settings = {"batch_size": 16, "num_steps": num_steps, "log_every_steps": 1}
    config = tiny_config("pretrain", **settings, **overrides)
    source = datasets.load(config.dataset, "train", seed=config.seed)
    return config, pretrain.make_task(config, make_model(config.model, source.num_classes), source)


def examine(folder):
    """Writes what this process sees: its rows, the raw gradients of step 2, and the state after five steps.

    A second run has a memory: its raw gradients in step 2, the queue and the average.

    Warmup starts at zero: the first step changes nothing, so the second one's gradients are those of the
    initial parameters.
    """
    config, task = config_and_task(num_steps=5)
    task = task._replace(optimizer=optax.chain(optax.trace(decay=0.0), task.optimizer))
    batch = next(task.batches(0))
    state = train.fit(task._replace(num_steps=2), config, folder)
    gradients = jax.device_get(state["opt_state"][0].trace)
    after = train.fit(task, config, folder)
    after = jax.device_get({"params": after["params"], "batch_stats": after["batch_stats"]})
    config, task = config_and_task(num_steps=2, **{"memory.size": 40})
    task = task._replace(optimizer=optax.chain(optax.trace(decay=0.0), task.optimizer))
    state = train.fit(task, config, folder.with_name(f"{folder.name}-memory"))
    remembered = jax.device_get({"gradients": state["opt_state"][0].trace, "memory": state["extra"]})
    name = f"{jax.process_count()}x{jax.local_device_count()}-{jax.process_index()}.npz"
    trees = {"gradients": gradients, "after": after, "remembered": remembered}
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(trees)}
    np.savez(folder.parent / name, **{f"batch/{key}": rows for key, rows in batch.items()}, **flat)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The arrays that `examine` wrote on 2 processes x 4 devices, 1 x 8 and 1 x 1; and their folder."""
    folder = tmp_path_factory.mktemp("shapes")
    script = "import sys, pathlib, test_processes; from simclr_jax.process import group\n"
    script += "given = [kind(flag.partition('=')[2]) for kind, flag in zip((str, int, int), sys.argv[2:])]\n"
    script += "group.join(*(given or [None] * 3), timeout=60)\n"
    script += "test_processes.examine(pathlib.Path(sys.argv[1])); group.announce_end()"
    for name, devices, joining in (("two", 4, join(2)), ("one", 1, [[]])):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(folder / name), *flags], env=environment(devices)
            )
            for flags in joining
        ]
        assert [process.wait(timeout=300) for process in started] == [0] * len(started)
    examine(folder / "eight")
    arrays = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    assert sorted(arrays) == ["1x1-0", "1x8-0", "2x4-0", "2x4-1"]
    return arrays, folder


def assert_close(actual, expected, prefix, tolerance):
    for key in expected:
        if key.startswith(prefix):
            scale = max(np.abs(expected[key]).max(), 1e-6)
            assert np.abs(actual[key] - expected[key]).max() <= tolerance * scale, key


@pytest.mark.journey
def test_processes_share_one_global_batch(shapes):
    arrays, _ = shapes
    for key in ("batch/view1", "batch/view2", "batch/label", "batch/index"):
        halves = np.concatenate([arrays["2x4-0"][key], arrays["2x4-1"][key]])
        np.testing.assert_array_equal(halves, arrays["1x8-0"][key])
        np.testing.assert_array_equal(halves, arrays["1x1-0"][key])
        assert len(arrays["2x4-0"][key]) == 8


@pytest.mark.journey
@pytest.mark.parametrize("shape", ["2x4-0", "2x4-1", "1x8-0"])
def test_raw_gradients_do_not_depend_on_processes_and_devices(shapes, shape):
    assert_close(shapes[0][shape], shapes[0]["1x1-0"], "['gradients']", 1e-4)


@pytest.mark.journey
@pytest.mark.parametrize("shape", ["2x4-0", "2x4-1", "1x8-0"])
def test_a_memory_and_its_gradients_do_not_either(shapes, shape):
    assert shapes[0]["1x1-0"]["['remembered']['memory']['rows']"] == 40
    assert_close(shapes[0][shape], shapes[0]["1x1-0"], "['remembered']", 1e-4)


@pytest.mark.journey
@pytest.mark.parametrize("shape", ["2x4-0", "2x4-1", "1x8-0"])
def test_parameters_after_five_steps_do_not_either(shapes, shape):
    assert_close(shapes[0][shape], shapes[0]["1x1-0"], "['after']", 2e-3)


@pytest.mark.journey
def test_processes_agree_to_the_bit(shapes):
    zero, one = shapes[0]["2x4-0"], shapes[0]["2x4-1"]
    for key in zero:
        if not key.startswith("batch"):
            np.testing.assert_array_equal(zero[key], one[key])


@pytest.mark.journey
def test_checkpoint_of_two_processes_is_restored_by_one(shapes):
    arrays, folder = shapes
    variables, meta = checkpoint.load_params(folder / "two")
    restored = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree.leaves_with_path({"after": variables})}
    for key, leaf in restored.items():
        np.testing.assert_array_equal(leaf, arrays["2x4-0"][key])
    assert meta["num_classes"] == 10 and len(restored) > 10


STEPS = 20


def twenty_steps(folder, until):
    """Goes on with a run of twenty steps in this process, on eight devices; returns the train state."""
    config, task = config_and_task(STEPS)
    return train.fit(task._replace(num_steps=until), config, folder)


def main_of_two_processes(workdir):
    """The same run on two processes with two devices each; SIGTERM to the second one after three steps.

    The second one then takes longer to end than a process may be silent while a run lasts.
    """
    config, defaults = (
        flatten_dict(config.to_dict(), sep=".") for config in (config_and_task(STEPS)[0], digits.get_config())
    )
    flags = ["--config=configs/digits.py", f"--workdir={workdir}"]
    flags += [f"--config.{key}={value}" for key, value in config.items() if value != defaults[key]]
    errors = [workdir.parent / f"stderr{index}" for index in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "simclr_jax.main", *flags, *joining],
            cwd=ROOT,
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=error.open("w"),
            text=True,
        )
        for joining, error in zip(join(2), errors)
    ]
    lines = []
    with started[0].stdout, started[1].stdout:
        for line in started[0].stdout:
            lines.append(line)
            if sum(line.startswith("step") for line in lines) == 3:
                started[1].send_signal(signal.SIGTERM)
            if line.startswith("stopped by"):
                started[1].send_signal(signal.SIGSTOP)
                threading.Timer(group.SILENCE + 4, started[1].send_signal, [signal.SIGCONT]).start()
        silent = started[1].stdout.read()
    codes = [process.wait(timeout=60) for process in started]
    assert codes == [0, 0], [error.read_text()[-2000:] for error in errors] + lines[-3:]
    assert "step" not in silent
    return "".join(lines)


@pytest.mark.journey
def test_a_run_survives_a_stop_of_any_process_and_changes_of_their_number(tmp_path):
    straight = jax.device_get(twenty_steps(tmp_path / "straight", STEPS))
    twenty_steps(tmp_path / "moved", 4)
    output = main_of_two_processes(tmp_path / "moved")
    assert "4 x cpu, 2 process(es)" in output and "resuming after step 4 of 20" in output
    stopped = int(re.search(r"stopped by SIGTERM, saved after step (\d+)", output).group(1))
    assert 7 <= stopped < STEPS
    assert (tmp_path / "moved" / "checkpoints" / str(stopped) / "state").is_dir()
    moved = jax.device_get(twenty_steps(tmp_path / "moved", STEPS))
    assert [line["step"] for line in log_of(tmp_path / "moved")] == list(range(1, STEPS + 1))
    for one, other in zip(log_of(tmp_path / "straight")[1:], log_of(tmp_path / "moved")[1:]):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(straight["params"]), jax.tree.leaves(moved["params"])
    ):
        assert np.abs(one - other).max() <= 1e-2 * np.abs(one).max(), jax.tree_util.keystr(path)


def start_digits(workdir, changes, *, num_processes=2):
    """A process of a long run on digits for each of the changes, all joined."""
    flags = ["--config=configs/digits.py", f"--workdir={workdir}", "--config.model.width=0.125"]
    flags += ["--config.batch_size=16", "--config.log_every_steps=1", "--config.num_steps=3000"]
    flags += ["--config.image_size=16", "--config.model.stem=auto", "--config.evaluate.max_examples=64"]
    flags += ["--config.evaluate.compare=False", "--config.evaluate.pictures=False", "--join_timeout=60"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "simclr_jax.main", *flags, *joining, *change],
            cwd=ROOT,
            env=environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for joining, change in zip(join(num_processes), changes)
    ]


def ends_of(started, seconds):
    """Exit code and lines of stderr of each process."""
    outputs = []
    for process in started:
        _, err = process.communicate(timeout=seconds)
        outputs.append((process.returncode, err.strip().splitlines()))
    return outputs


@pytest.mark.journey
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_in_one_line(victim, tmp_path):
    started = start_digits(tmp_path / "run", [[], []])
    for line in started[0].stdout:
        if line.startswith("step    3/"):
            break
    started[victim].kill()
    begun = time.monotonic()
    code, (line,) = ends_of(started, 60)[1 - victim]
    assert time.monotonic() - begun < 30
    assert code == 1 and re.match(rf"error: process {victim} .* is gone", line)


DIFFERENCES = {
    "seed": ([[], ["--config.seed=3"]], "process 1 has another config (seed is 3 there and 0 on process 0)"),
    "workdir": ([[], ["--workdir=elsewhere"]], "workdir is 'elsewhere' there"),
    "processes": (
        [[], ["--num_processes=3"]],
        "another command (--num_processes is 3 there and 2 on process 0)",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_processes_that_are_not_one_run_are_refused(difference, tmp_path):
    changes, message = DIFFERENCES[difference]
    for code, (line,) in ends_of(start_digits(tmp_path / "run", changes), 90):
        assert code == 2 and message in line
    assert not (tmp_path / "run").exists()


ALONE = {
    "no process 0": (["--process_id=1"], "no process 0 at localhost:"),
    "no process 1": (["--process_id=0"], "2 processes were to join at localhost:"),
}


@pytest.mark.parametrize("which", ALONE)
def test_processes_that_do_not_come_are_one_line(which, tmp_path):
    changes, message = ALONE[which]
    (started,) = start_digits(tmp_path / "run", [[*changes, "--join_timeout=3"]])
    ((code, (line,)),) = ends_of([started], 60)
    assert code == 2 and message in line and "3 s (--join_timeout" in line


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
BY_SRUN = SLURM | {"SLURM_STEP_NUM_TASKS": "2"}
IN_A_SHELL = SLURM | {"SLURM_STEP_NUM_TASKS": "1"}


def mpi(port):
    return MPI | {"OMPI_MCA_orte_hnp_uri": f"1531576320.0;tcp://127.0.0.1,10.0.0.1:{port}"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (BY_SRUN, ("SLURM_NTASKS=2", "srun", True)),
        (IN_A_SHELL, ("SLURM_NTASKS=2", "srun", False)),
        (SLURM, ("SLURM_NTASKS=2", "srun", False)),
        (mpi(1), ("OMPI_COMM_WORLD_SIZE=2", "mpirun", False)),
        (KUBERNETES, ("KUBERNETES_SERVICE_HOST=10.0.0.1", "an Indexed Job", False)),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "0"}, ("JOB_COMPLETION_INDEX=0", "an Indexed Job", True)),
        (KUBERNETES | {"TPU_WORKER_HOSTNAMES": "a,b"}, None),
    ],
)
def test_a_launcher_is_known_by_its_variables(environment, expected, monkeypatch):
    for name in (*SLURM, *mpi(1), *KUBERNETES, "SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launcher = launchers.find()
    if expected is None:
        assert launcher is None
    else:
        variable, start, started = expected
        assert variable in launcher[0] and launcher[0].endswith(f"start all of them by {start}")
        assert "--num_processes=1" in launcher[0] and launcher[1] is started


def test_an_mpirun_that_listens_has_started_the_process(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for name, value in mpi(listener.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        assert launchers.find()[1]


JOIN = "import sys; from simclr_jax.process import errors, group\n"
JOIN += "with errors.one_line_errors(): group.join(None, *eval(sys.argv[1]), timeout=int(sys.argv[2]))\n"
JOIN += "print('alone', group.alone()); group.announce_end()"


def start_joining(variables, *arguments):
    command = [sys.executable, "-c", JOIN, *arguments]
    environment_of_all = environment(1) | variables
    return subprocess.Popen(
        command, env=environment_of_all, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_command_in_the_shell_of_an_allocation_learns_both_ways_out():
    process = start_joining(IN_A_SHELL | {"SLURM_PROCID": "0"}, "None, None", "7")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1
    for line in (out, err):
        assert "SLURM_NTASKS=2, SLURM_PROCID=0" in line and "--num_processes=1" in line and "srun" in line
    assert out.startswith("waiting for 1 other processes at localhost:")
    process = start_joining(IN_A_SHELL | {"SLURM_PROCID": "0"}, "1, None", "7")
    assert process.communicate(timeout=60)[0] == "alone True\n" and process.returncode == 0


def test_processes_that_srun_starts_join():
    started = [start_joining(BY_SRUN | {"SLURM_PROCID": str(index)}, "None, None", "60") for index in (0, 1)]
    assert [process.communicate(timeout=90)[0].splitlines()[-1] for process in started] == ["alone False"] * 2
