"""Every test sees eight CPU devices, as a small pod would, and compiles nothing that another has compiled."""

import importlib
import importlib.metadata
import json
import os
import tempfile

from etils import epath

DEVICES = os.environ.setdefault("TEST_DEVICES", "8")  # other processes of tests may have fewer
# Most of what tests wait for is compilation, which takes a fifth of the time without optimisation.
UNOPTIMISED = "" if os.environ.get("TEST_OPTIMISED") else "--xla_backend_optimization_level=0"
if UNOPTIMISED and importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones abort at it
    UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices):
    """`XLA_FLAGS` of a process of tests that sees so many devices."""
    return f"--xla_force_host_platform_device_count={devices} {UNOPTIMISED}"


os.environ["XLA_FLAGS"] = xla_flags(DEVICES)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers, and the processes that tests start, share one
    _compiled = tempfile.TemporaryDirectory(prefix="compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import signal

import pytest

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the processes of tests would not heed it


@pytest.fixture(scope="session")
def pretrained_run(tmp_path_factory):
    """The workdir of five steps of pretraining on digits, with a three-layer projection head."""
    workdir = tmp_path_factory.mktemp("pretrained")
    run_task("pretrain", workdir, num_steps=5, seed=7)
    return workdir


@pytest.fixture(scope="session")
def finetuned_run(pretrained_run, tmp_path_factory):
    """The workdir of that encoder fine-tuned on 5 labels a class."""
    workdir = tmp_path_factory.mktemp("finetuned")
    settings = {"labels_per_class": 5, "draws": 1, "evaluate.compare": False}
    run_task("finetune", workdir, pretrained=str(pretrained_run), num_steps=5, **settings)
    return workdir


def stop_at_part(monkeypatch, number):
    """Interrupts the writing of this part of embed or predict, once; returns the names of what is written."""
    from simclr_jax.evaluation import parts

    write, written, stopped = parts._write, [], []

    def write_or_stop(path, *rest):
        if len(written) == number - 1 and not stopped:
            stopped.append(path)
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(parts, "_write", write_or_stop)
    return written


def log_of(workdir):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tiny_config(task, **overrides):
    """The config of a task on digits, for a network of a few thousand parameters; 'a.b' names nested keys."""
    config = importlib.import_module("configs.digits").get_config(task)
    config.update_from_flattened_dict(
        {
            "batch_size": 64,
            "image_size": 16,
            "model.stem": "auto",
            "model.width": 0.125,
            "model.projection_layers": 3,
        }
    )
    if task == "pretrain":
        config.evaluate.update(compare=False, pictures=False, max_examples=256)
    config.update_from_flattened_dict(overrides)
    return config


def run_task(task, workdir, **overrides):
    """Runs a task on digits in this process; returns its summary."""
    module = importlib.import_module(f"simclr_jax.tasks.{task}")
    return module.run(tiny_config(task, **overrides), epath.Path(workdir))
