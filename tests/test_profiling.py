"""Traces of a run's steps: which steps they hold, and that they hold no run up."""

import gzip
import json
import signal

import jax
import pytest
from small_runs import config_of, task_of

from simclr_jax import train
from simclr_jax.workdir import records

pytestmark = pytest.mark.slow


def traced_steps(workdir):
    """The steps that the one trace of a run names, for Perfetto; TensorBoard's file has their program."""
    (binary,) = (workdir / "profile").rglob("*.xplane.pb")
    assert b"make_train_step.<locals>.step" in binary.read_bytes()
    (file,) = (workdir / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted({int(event["args"]["step_num"]) for event in events if event.get("name") == "train_step"})


def test_a_run_traces_the_steps_that_it_was_asked_for(tmp_path, capsys):
    train.fit(task_of(), config_of(profile_steps=(4, 6)), tmp_path)
    assert traced_steps(tmp_path) == [4, 5, 6]
    out = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path}/profile" in out and "perfetto" in out


def test_a_run_that_asks_for_none_traces_none(tmp_path):
    train.fit(task_of(num_steps=3), config_of(), tmp_path)
    assert not (tmp_path / "profile").exists()


def test_the_end_of_a_run_ends_its_trace(tmp_path):
    train.fit(task_of(num_steps=5), config_of(profile_steps=(4, 100)), tmp_path)
    assert traced_steps(tmp_path) == [4, 5]


def test_a_stop_ends_the_trace_and_a_restart_has_one_of_its_own(tmp_path):
    def stop(step):
        if step == 5 + 2:  # two batches are prefetched
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        train.fit(task_of(on_batch=stop), config_of(profile_steps=(4, 100)), tmp_path)
    assert traced_steps(tmp_path)[0] == 4 and len(traced_steps(tmp_path)) < 4
    records.check_config(tmp_path, config_of(profile_steps=(9, 10)).to_dict())
    (tmp_path / "profile").rename(tmp_path / "before")
    train.fit(task_of(), config_of(profile_steps=(9, 10)), tmp_path)
    assert traced_steps(tmp_path) == [9, 10]


def test_an_error_ends_the_trace(tmp_path):
    def fail(step):
        if step == 7:
            raise RuntimeError("no more images")

    with pytest.raises(RuntimeError, match="no more images"):
        train.fit(task_of(on_batch=fail), config_of(profile_steps=(2, 100)), tmp_path)
    assert traced_steps(tmp_path)[0] == 2


def test_a_trace_that_cannot_be_taken_or_written_stops_no_run(tmp_path, capsys):
    with jax.profiler.trace(tmp_path / "another"):
        train.fit(task_of(num_steps=3), config_of(profile_steps=(1, 2)), tmp_path / "run")
    assert "note: profile_steps: no trace was taken: Profile has already" in capsys.readouterr().out
    (tmp_path / "run" / "profile").write_text("in the way")
    train.fit(task_of(num_steps=6), config_of(profile_steps=(4, 5)), tmp_path / "run")
    assert "note: profile_steps: no trace was written: " in capsys.readouterr().out
