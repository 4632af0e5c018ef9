"""kill -9 at random moments, in the middle of saves too: nothing that was saved is lost."""

import multiprocessing
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import log_of, tiny_config

from simclr_jax import train

KILLS = 20
STEPS = 2000
SIZE = 2**20  # 4 MB of parameters, as much of momentum: a save takes a while


def config_of():
    config = tiny_config("pretrain", batch_size=8)
    config.update(log_every_steps=1, checkpoint_every_steps=3, keep_checkpoints=2)
    return config


def task_of(note):
    """Learns from numbers that tell their step; `note` is told where it starts."""

    def batches(start_step):
        note(start_step)
        while True:
            start_step += 1
            yield {"x": np.full(8, 1 + start_step % 7, np.float32)}

    def loss(params, batch_stats, batch):
        return (params["w"] * batch["x"].mean()).mean() ** 2, (batch_stats, {})

    return train.Task(
        init=lambda key: {"params": {"w": jnp.ones(SIZE)}, "batch_stats": {}},
        loss=loss,
        optimizer=optax.sgd(1.0, momentum=0.9),
        schedule=lambda step: 1.0,
        batches=batches,
        num_steps=STEPS,
        meta={},
    )


def victim(workdir, starts):
    """Trains until it is killed."""
    train.fit(task_of(starts.put), config_of(), workdir)


def finished_saves(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def test_killed_twenty_times_loses_no_finished_save(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_killed", "clu.metric_writers"])
    rng = random.Random(0)
    saved, in_the_middle = 0, 0
    for kill in range(KILLS):
        starts = context.SimpleQueue()
        process = context.Process(target=victim, args=(tmp_path, starts))
        process.start()
        assert starts.get() == saved, f"after kill {kill}"
        time.sleep(rng.uniform(0.0, 1.5))
        process.kill()
        process.join()
        saved = max([*finished_saves(tmp_path), saved])
        assert saved in [*finished_saves(tmp_path), 0]
        in_the_middle += any("tmp" in path.name for path in (tmp_path / "checkpoints").glob("*"))
    assert 0 < saved < STEPS - 100 and in_the_middle > 0

    seen = []
    task = task_of(seen.append)._replace(num_steps=saved + 10)
    state = train.fit(task, config_of(), tmp_path)
    assert seen == [saved]
    straight = train.fit(task, config_of(), tmp_path.parent / "straight")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, straight))
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, saved + 11))
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]
