"""Runs of a task of one array, in processes of their own that start within a second: for faults and kills."""

import multiprocessing
import os
import signal
import time

import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from conftest import tiny_config

from simclr_jax import train
from simclr_jax.process import errors, group, stopping
from simclr_jax.workdir import lock, records

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["small_runs", "tensorflow"])


def config_of(**changes):
    config = tiny_config("pretrain", batch_size=8)
    config.update(log_every_steps=1, checkpoint_every_steps=3, keep_checkpoints=2)
    config.update(changes)
    return config


def task_of(note=lambda step: None, *, num_steps=12, size=8, on_batch=lambda step: None):
    """Learns from numbers that tell their step; `note` is told where it starts."""

    def batches(start_step):
        note(start_step)
        while True:
            start_step += 1
            on_batch(start_step)
            yield {"x": np.full(8, 1 + start_step % 7, np.float32)}

    def loss(params, batch_stats, batch):
        return (params["w"] * batch["x"].mean()).mean() ** 2, (batch_stats, {})

    return train.Task(
        init=lambda key: {"params": {"w": jnp.ones(size)}, "batch_stats": {}},
        loss=loss,
        optimizer=optax.sgd(0.001, momentum=0.9),
        schedule=lambda step: 1.0,
        batches=batches,
        num_steps=num_steps,
        meta={"config": config_of().to_dict(), "num_classes": 0},
    )


def run(path, **options):
    """Trains in a workdir as `main` does, under its handlers."""
    pause = options.pop("pause", 0.0)
    config = config_of(**options.pop("config", {}))
    logging.set_verbosity(logging.FATAL)
    task = task_of(on_batch=lambda step: time.sleep(pause if step > 3 else 0), **options)
    with errors.one_line_errors(group.leave), stopping.handled():
        records.check_config(path, config.to_dict())
        lock.prepare(path)
        with lock.locked(path):
            train.fit(task, config, path)


def _child(path, log, user, options):
    """Runs with its output in a file, as another user where one is named."""
    if user is not None:
        os.setgid(user)
        os.setuid(user)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(path, **options)


class Small:
    """A run in a process of its own."""

    def __init__(self, path, log, user=None, **options):
        self.log = log
        self.process = _context.Process(target=_child, args=(path, log, user, options), daemon=True)
        self.process.start()

    def output(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text, seconds=60):
        """Waits until it has printed something."""
        until = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < until and self.process.is_alive(), f"no '{text}' in:\n{self.output()}"
            time.sleep(0.05)

    def end(self, seconds=60):
        """Waits for its end; returns exit code and output."""
        self.process.join(seconds)
        alive = self.process.is_alive()
        if alive:
            self.process.kill()
            self.process.join()
        assert not alive, f"did not end in {seconds} s:\n{self.output()}"
        return self.process.exitcode, self.output()
