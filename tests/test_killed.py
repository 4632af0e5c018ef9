"""kill -9 at random moments, in the middle of saves too, and damage besides: nothing saved is lost."""

import random
import re
import shutil
import time

import jax
import pytest
from conftest import log_of
from small_runs import Small, config_of, task_of

from simclr_jax import checkpoint, train

pytestmark = pytest.mark.slow

KILLS = 25
SIZE = 2**20  # 4 MB of parameters, as much of momentum: a save takes a while


def damage(saved, rng):
    """Damages a checkpoint in one of the ways in which copies and disks do."""
    data = max((saved / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    kind = rng.choice(["cut", "no metadata", "empty", "no meta"])
    if kind == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif kind == "no metadata":
        (saved / "state" / "_METADATA").unlink()
    else:
        shutil.rmtree(saved if kind == "empty" else saved / "meta")
        if kind == "empty":
            saved.mkdir()


@pytest.mark.journey
def test_killed_and_damaged_runs_equal_a_straight_one(tmp_path):
    run, rng = tmp_path / "run", random.Random(0)
    saved, in_the_middle, damaged = 0, 0, set()
    for kill in range(KILLS):
        log = tmp_path / f"log{kill}"
        small = Small(run, log, num_steps=9999, size=SIZE)
        small.wait_for("/9999  loss")
        first = re.search(r"^step +(\d+)/", small.output(), re.MULTILINE)
        assert int(first.group(1)) == saved + 1, f"after kill {kill}: {small.output()}"
        time.sleep(rng.uniform(0.0, 1.5))
        small.process.kill()
        small.process.join()
        steps = checkpoint.steps_in(run)
        saved = max([*steps, saved])
        assert saved in [*steps, 0]
        in_the_middle += any("tmp" in path.name for path in (run / "checkpoints").glob("*"))
        if kill % 3 == 2 and len(steps) > 1:
            damage(run / "checkpoints" / str(saved), rng)
            damaged.add(str(saved))
            saved = steps[-2]
    assert saved > 0 and in_the_middle > 0 and len(damaged) >= KILLS // 3 - 2

    seen = []
    task = task_of(seen.append, num_steps=saved + 10, size=SIZE)
    state = train.fit(task, config_of(), run)
    assert seen == [saved]
    straight = train.fit(task, config_of(), tmp_path / "straight")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, straight))
    assert {line["step"] for line in log_of(run)} >= set(range(1, saved + 11))
    assert not [path for path in (run / "checkpoints").iterdir() if "tmp" in path.name]
    aside = {path.name for path in (run / "damaged").iterdir()}
    assert damaged <= aside  # beside them, old ones whose removal a kill cut short
