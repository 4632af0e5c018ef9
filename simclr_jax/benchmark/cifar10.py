"""Pretrains on CIFAR-10, evaluates, and writes a table: `bash launch/cifar10.sh [PHOTOS]`

    python -m simclr_jax.benchmark.cifar10 --config=configs/cifar10.py [--tasks=pretrain_200,pretrain]

Every run has a folder below --workdir and a process of its own. After a stop the same command goes on.
"""

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath

from simclr_jax import benchmark
from simclr_jax.config import command_line
from simclr_jax.plan import cost
from simclr_jax.process import escape
from simclr_jax.workdir import report

_TASKS = flags.DEFINE_list("tasks", ["pretrain_200", "pretrain"], "Tasks of the config to pretrain by.")
_OUTPUT = flags.DEFINE_string("output", "docs/cifar10.md", "The file to write.")

_EVALUATIONS = ("knn", "linear_eval")
_HEAD = ("epochs", "minutes", "images/s", "peak FLOPs", "kNN", "linear", "5 labels a class")


def commands(file: str, task: str, workdir: epath.Path, given: dict[str, object]) -> Iterator[tuple]:
    """Yields workdir and command of pretraining, then of its evaluations in folders below.

    Args:
      file: the config file.
      task: its function for pretraining.
      workdir: folder of pretraining.
      given: keys and values for pretraining; those of the dataset hold for the evaluations, too.
    """
    settings = {key: f"--config.{key}={value}" for key, value in given.items()}
    # Pretraining alone has dataset.on_device.
    dataset = [flag for key, flag in settings.items() if re.match(r"dataset\.(?!on_device)", key)]
    main = [sys.executable, "-m", "simclr_jax.main"]
    yield workdir, [*main, f"--config={file}:{task}", f"--workdir={workdir}", *settings.values()]
    for name in _EVALUATIONS:
        flags = [f"--config={file}:{name}", f"--config.pretrained={workdir}", f"--workdir={workdir / name}"]
        yield workdir / name, [*main, *flags, *dataset]


def row(workdir: epath.Path) -> list[str]:
    """Returns the cells of a table for a finished pretraining and its evaluations.

    Minutes and images/s are those of training by its log: without evaluations, over all processes that took
    part.
    """
    config, summary, *evaluations = (
        json.loads((workdir / name).read_text())
        for name in ("config.json", "summary.json", *(f"{name}/summary.json" for name in _EVALUATIONS))
    )
    log = [line for line in report.read(workdir / "metrics.jsonl") if line["step"]]
    images = np.diff([line["step"] for line in log], prepend=0) * config["batch_size"]
    seconds = (images / [line["images_per_second"] for line in log]).sum()
    shares = [line["mfu"] for line in log if "mfu" in line]
    return [
        f"{config['num_epochs']:,.0f}",
        f"{seconds / 60:.1f}",
        f"{images.sum() / seconds:,.0f}",
        f"{np.median(shares):.1%}" if shares else "",
        *(f"{evaluation['top1']:.1%}" for evaluation in evaluations),
        f"{summary['trained']['few_label_accuracy']:.1%}",
    ]


def measure(_) -> None:
    """Runs what has not ended yet, and writes the table anew after each pretraining and its evaluations."""
    config, output, rows = command_line.read_config(), Path(_OUTPUT.value), []
    devices = cost.run_in_process(_devices)
    for task in _TASKS.value:
        workdir = command_line.workdir(config) / task
        for folder, command in commands(command_line.file(), task, workdir, command_line.given()):
            code = subprocess.run(command).returncode
            if code or not (folder / "summary.json").exists():  # a stop may exit with 0
                sys.exit(code)
        rows.append(row(workdir))
        text = [
            f"# CIFAR-10 on {devices}\n",
            f"{command_line.file()}, seed {config.seed}, {config.dataset.name}; jax {jax.__version__}, "
            f"{datetime.date.today()}.\n",
            *benchmark.table(_HEAD, rows),
        ]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n".join([*text, ""]), encoding="utf-8")
        print("\n".join(text), flush=True)
    print(f"written to {escape(output)}")


def _devices():
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


if __name__ == "__main__":
    command_line.run(measure)
