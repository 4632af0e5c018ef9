"""Faults of storage, checkpoints, names, signals and neighbours: a line says why, and nothing saved is lost.

Faults of folders and pictures are in test_faults_folder.py, those of configs in test_faults_config.py.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import log_of
from small_runs import Small, config_of, task_of

from simclr_jax import checkpoint, train
from simclr_jax.config.saved import complete
from simclr_jax.process import console, errors, files, stopping
from simclr_jax.process.console import escape
from simclr_jax.process.errors import RunError, UserError
from simclr_jax.workdir import lock, records, report

pytestmark = pytest.mark.slow

# ----------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of twelve steps, with checkpoints 9 and 12, and what they led to."""
    path = tmp_path_factory.mktemp("whole")
    return path, train.fit(task_of(num_steps=12), config_of(), path)


def cut(folder, share):
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, int(path.stat().st_size * share))


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


DAMAGES = {
    "empty": lambda saved: (shutil.rmtree(saved), saved.mkdir()),
    "a file": replace_by_file,
    "no state": lambda saved: shutil.rmtree(saved / "state"),
    "state is a file": lambda saved: replace_by_file(saved / "state"),
    "state is empty": lambda saved: (shutil.rmtree(saved / "state"), (saved / "state").mkdir()),
    "no metadata of the state": lambda saved: (saved / "state" / "_METADATA").unlink(),
    "metadata cut short": lambda saved: os.truncate(saved / "state" / "_METADATA", 20),
    "metadata of zeros": lambda saved: (saved / "state" / "_METADATA").write_bytes(bytes(100)),
    "data cut to half": lambda saved: cut(saved / "state" / "d", 0.5),
    "data empty": lambda saved: cut(saved / "state" / "d", 0),
    "no data": lambda saved: shutil.rmtree(saved / "state" / "d"),
    "no manifest": lambda saved: (saved / "state" / "manifest.ocdbt").unlink(),
    "manifest cut": lambda saved: cut(saved / "state", 0.7),
    "no meta": lambda saved: shutil.rmtree(saved / "meta"),
    "meta is no JSON": lambda saved: (saved / "meta" / "metadata").write_text("{"),
    "meta is a list": lambda saved: (saved / "meta" / "metadata").write_text("[]"),
    "meta is no text": lambda saved: (saved / "meta" / "metadata").write_bytes(b"\xff\xfe\0"),
    "metrics are no JSON": lambda saved: (
        (saved / "metrics").mkdir(),
        (saved / "metrics" / "metrics").write_text("nan?"),
    ),
    "metrics are missing": lambda saved: (saved / "metrics").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on(damage, whole, tmp_path, capsys):
    run = shutil.copytree(whole[0], tmp_path / "run")
    DAMAGES[damage](run / "checkpoints" / "12")
    starts = []
    state = train.fit(task_of(starts.append, num_steps=12), config_of(), run)
    assert starts == [9]
    out = capsys.readouterr().out
    assert out.count("checkpoint 12 is damaged (") == 1 and f"moved to {run}/damaged/12" in out
    assert "going on from step 9: the steps to 12 are repeated" in out
    assert (run / "damaged" / "12").exists()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, whole[1]))
    assert [line["step"] for line in log_of(run)] == list(range(1, 13))


@pytest.mark.parametrize("damage", ["empty", "data cut to half", "meta is no JSON"])
def test_nothing_moves_where_all_checkpoints_are_damaged(damage, whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    for step in ("9", "12"):
        DAMAGES[damage](run / "checkpoints" / step)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged: 9 \(.*12 \(.*another --workdir"):
        train.fit(task_of(num_steps=12), config_of(), run)
    assert not (run / "damaged").exists() and {"9", "12"} <= set(os.listdir(run / "checkpoints"))


def test_a_later_version_is_refused(whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    path = run / "checkpoints" / "12" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    for read in (checkpoint.load_params, checkpoint.load_meta):
        with pytest.raises(UserError, match="schema version 99, and this program knows up to 1: update it"):
            read(run)
    with pytest.raises(UserError, match="schema version 99"):
        train.fit(task_of(num_steps=12), config_of(), run)
    records.save_config(run, {"schema_version": 99})
    with pytest.raises(UserError, match="schema version 99"):
        records.check_config(run, {})


def test_newest_is_whole_tells_a_whole_run_from_a_damaged_one(whole, tmp_path):
    assert checkpoint.newest_is_whole(whole[0]) and checkpoint.newest_is_whole(tmp_path / "none")
    run = shutil.copytree(whole[0], tmp_path / "run")
    cut(run / "checkpoints" / "12" / "state" / "d", 0.5)
    assert not checkpoint.newest_is_whole(run)


# ----------------------------------------------------------------- small files of a run

CONTENTS = {"empty": b"", "cut": b'{"ste', "no text": b"\xff\xfe\xfa", "zeros": bytes(30), "a list": b"[1]"}


@pytest.mark.parametrize("content", CONTENTS)
def test_damaged_config_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_bytes(CONTENTS[content])
    with pytest.raises(UserError, match=r"config.json is damaged \(.+\): .*move config.json away"):
        records.check_config(tmp_path, {"seed": 0})


@pytest.mark.parametrize("content", [*CONTENTS, "a folder"])
def test_damaged_summary_is_no_end_of_a_run(content, tmp_path, capsys):
    path = tmp_path / "summary.json"
    path.mkdir() if content == "a folder" else path.write_bytes(CONTENTS[content])
    assert records.read_summary(tmp_path) is None
    assert "summary.json is damaged" in capsys.readouterr().out
    assert (tmp_path / "summary.json.damaged").exists() and not path.exists()
    files.write_json(path, {"steps": 3})
    assert records.read_summary(tmp_path) == {"steps": 3}


LINES = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
LOGS = {
    "whole": (LINES, 2, False),
    "empty": (b"", -1, False),
    "last line cut": (LINES + b'{"step": 3, "lo', 2, False),
    "last line without its end": (LINES[:-1], 2, False),
    "a line in the middle": (b'{"step": 1}\n{"st\n{"step": 2}\n', 2, True),
    "zeros that a crash left": (bytes(40), -1, False),
    "zeros behind": (LINES + bytes(40) + b"\n", 2, True),
    "no text": (b"\xff\xfe\n" + LINES, 2, True),
    "wrong types": (LINES + b'[3]\n{"step": "4"}\nnull\n', 2, True),
}


@pytest.mark.parametrize("log", LOGS)
def test_readable_lines_of_a_damaged_log_stay(log, tmp_path, capsys):
    content, last, damaged = LOGS[log]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert report._last_step(path) == last
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, last + 1))
    assert ("is damaged" in capsys.readouterr().out) == damaged
    aside = tmp_path / "metrics.jsonl.damaged"
    assert aside.exists() == damaged and (not damaged or aside.read_bytes() == content)


def test_a_folder_in_the_place_of_the_log_is_set_aside(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    assert report._last_step(tmp_path / "metrics.jsonl") == -1
    assert (tmp_path / "metrics.jsonl.damaged").is_dir()


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    files.write_text(tmp_path / "a.json", "old")
    with pytest.raises(RuntimeError), files.writing(tmp_path / "a.json") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_what_was_set_aside_before_stays(tmp_path):
    for text in "ab":
        (tmp_path / "x").write_text(text)
        files.set_aside(tmp_path / "x")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "x.damaged": "a",
        "x.damaged2": "b",
    }


# ----------------------------------------------------------------- configs of other versions


def test_a_key_that_a_run_lacks_has_its_default(tmp_path):
    config = config_of().to_dict()
    old = {key: value for key, value in config.items() if key not in ("remat", "temperature")}
    files.write_json(tmp_path / "config.json", old)  # as earlier versions wrote it: no schema either
    records.check_config(tmp_path, config, defaults=config)
    with pytest.raises(UserError, match=r"temperature is 0.5 there and 0.3 here"):
        records.check_config(tmp_path, config | {"temperature": 0.3}, defaults=config)
    remembering = config | {"memory": {"size": 65536}}
    with pytest.raises(UserError, match="memory.size is 0 there and 65536 here"):
        records.check_config(tmp_path, remembering, defaults=remembering)


@pytest.mark.parametrize("task", ["pretrain", "finetune", "embed"])
def test_saved_configs_are_completed(task):
    whole = complete({"task": task, "model": {"depth": 18}, "seed": 3})
    assert whole["model"]["depth"] == 18 and whole["model"]["se_ratio"] == 0.0 and whole["seed"] == 3


# ----------------------------------------------------------------- storage


def immutable(path):
    subprocess.run(["chattr", "+i", str(path)], check=True)


def mend(path):
    subprocess.run(["chattr", "-R", "-f", "-i", str(path)])


try:
    _probe = subprocess.run(["chattr", "+i", "/tmp"], capture_output=True, timeout=5).returncode == 0
    subprocess.run(["chattr", "-i", "/tmp"], capture_output=True, timeout=5)
except OSError:
    _probe = False
needs_chattr = pytest.mark.skipif(not _probe, reason="this file system or user knows no chattr +i")

PLACES = {
    "a file": lambda path: path.write_text(""),
    "below a file": lambda path: path.parent.write_text(""),
    "a loop of links": lambda path: path.symlink_to(path),
    "a link to nowhere": lambda path: path.symlink_to("/nowhere/at/all"),
    "checkpoints is a file": lambda path: (path.mkdir(), (path / "checkpoints").write_text("")),
}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_workdirs_are_one_line(place, tmp_path):
    path = tmp_path / "below" / "run" if place == "below a file" else tmp_path / "run"
    PLACES[place](path)
    with pytest.raises(
        UserError, match=r"cannot be written to \(.+: .+\): choose another --workdir"
    ) as raised:
        lock.prepare(path)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("path", ["/proc/none/run", "x" * 300, "a\0b"], ids=["proc", "too long", "NUL"])
def test_paths_that_cannot_be_are_one_line(path, tmp_path):
    with pytest.raises(UserError, match="cannot be written to"):
        lock.prepare(tmp_path / path)


@needs_chattr
@pytest.mark.parametrize("which", ["", "checkpoints"])
def test_read_only_workdirs_are_one_line(which, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    immutable(tmp_path / "run" / which)
    try:
        with pytest.raises(UserError, match="Operation not permitted"):
            lock.prepare(tmp_path / "run")
    finally:
        mend(tmp_path)
    lock.prepare(tmp_path / "run")


def test_nothing_is_left_where_nothing_came_of_a_run(tmp_path):
    with pytest.raises(UserError), lock.locked(lock.prepare(tmp_path / "run")):
        raise UserError("no such dataset")
    assert not (tmp_path / "run").exists()


def end_of(small, seconds=10):
    """Exit code and lines but those of steps, which have to come within so many seconds."""
    code, output = small.end(seconds)
    return code, [
        line for line in output.splitlines() if line and not line.startswith(("step", "first step"))
    ]


LATER = {
    "checkpoints read-only": (lambda run: immutable(run / "checkpoints"), mend),
    "workdir read-only": (immutable, mend),
    "workdir removed": (lambda run: shutil.rmtree(run), lambda run: None),
    "workdir removed and made again": (lambda run: (shutil.rmtree(run), run.mkdir()), lambda run: None),
    "workdir renamed": (
        lambda run: run.rename(run.parent / "moved"),
        lambda run: (run.parent / "moved").rename(run),
    ),
}


@pytest.mark.parametrize("fault", LATER)
def test_storage_that_fails_while_running_ends_it_in_one_line(fault, tmp_path):
    if "read-only" in fault and not _probe:
        pytest.skip("this file system or user knows no chattr +i")
    run = tmp_path / "run"
    small = Small(run, tmp_path / "log", num_steps=2000, pause=0.05)
    small.wait_for("step    7")
    happen, undo = LATER[fault]
    for _ in range(100):  # a save may be writing there at that moment
        try:
            happen(run)
            break
        except OSError:
            time.sleep(0.05)
    try:
        code, (line,) = end_of(small)
    finally:
        undo(run)
    assert code == 1 and line.startswith(f"error: {run}") and "the same command goes on" in line
    small = Small(run, tmp_path / "again", num_steps=12)
    code, lines = end_of(small, 60)
    assert code == 0
    if "removed" not in fault:  # before this line, perhaps, that the last save was cut short
        assert len([line for line in lines if line.startswith("resuming after step")]) == 1


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk_ends_a_run_in_one_line_and_it_goes_on(small_disk, tmp_path):
    run = small_disk / "run"
    small = Small(run, tmp_path / "log", num_steps=2000, pause=0.05, size=50_000)
    small.wait_for("step    7")
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/fill", "bs=1k"], capture_output=True)
    code, (line,) = end_of(small)
    assert code == 1 and line.startswith(f"error: {run}") and "No space left on device" in line
    (small_disk / "fill").unlink()
    code, lines = end_of(Small(run, tmp_path / "again", num_steps=12, size=50_000), 60)
    assert code == 0 and lines[0].startswith("resuming after step")


# ----------------------------------------------------------------- names

NAMES = [
    "a[b]c",
    "st*r?",
    "{x}%d$#'\"\\",
    "two\nlines and spaces",
    "Läufe-é-日本",
    os.fsdecode(b"\xff\xfebytes"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_workdirs_of_any_name_are_written_and_read_back(name, tmp_path):
    workdir = tmp_path / name
    train.fit(task_of(num_steps=3), config_of(), lock.prepare(workdir))
    starts = []
    train.fit(task_of(starts.append, num_steps=6), config_of(), workdir)
    assert starts == [3] and checkpoint.steps_in(workdir) == [3, 6]
    for path in (workdir, workdir / "checkpoints" / "6"):
        assert checkpoint.load_params(path)[1]["num_classes"] == 0
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]
    assert len([path for path in workdir.iterdir() if path.name.startswith("events")]) == 2
    cut(workdir / "checkpoints" / "6" / "state" / "d", 0.5)
    with pytest.raises(UserError) as raised:
        checkpoint.load_params(workdir)
    assert escape(workdir) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_shown_on_one_line_of_any_console(name):
    assert escape(name).isprintable() and "\n" not in escape(name)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream.reconfigure(errors="backslashreplace")
    print(escape(name), file=stream, flush=True)


# ----------------------------------------------------------------- consoles

SCRIPT = "from simclr_jax.process import console; console.protect()\n"
SCRIPT += "print('L\\xe4ufe \\udcff', flush=True); print('y' * 100000, flush=True)\n"
SCRIPT += "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('went on')\n"
CONSOLES = {
    "ascii": '"$@" > /dev/null',
    "a reader that goes away": '"$@" | true',
    "closed": '"$@" >&- 2>&-',
    "full": '"$@" > /dev/full',
    "both full": '"$@" > /dev/full 2>&1',
}


@pytest.mark.parametrize("place", CONSOLES)
def test_no_console_ends_a_run(place, tmp_path):
    command = ["bash", "-o", "pipefail", "-c", CONSOLES[place], "-", sys.executable, "-c", SCRIPT]
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run([*command, tmp_path / "x"], env=os.environ | ascii_only, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "x").read_text() == "went on"


# ----------------------------------------------------------------- signals

SIGNALS = {
    "SIGTERM": ([signal.SIGTERM], 0.02, 0, "finishing this step and saving"),
    "SIGHUP": ([signal.SIGHUP], 0.02, 0, "finishing this step and saving"),
    "Ctrl-C": ([signal.SIGINT], 0.02, 130, "finishing this step and saving"),
    "Ctrl-C twice": ([signal.SIGINT] * 2, 0.7, 130, "still saving: a third signal"),
    "a long step": ([signal.SIGTERM], 4.0, 0, "the stop waits for the step"),
}


@pytest.mark.parametrize("case", SIGNALS)
def test_signals_save_and_stop(case, tmp_path):
    numbers, pause, code, message = SIGNALS[case]
    small = Small(tmp_path / "run", tmp_path / "log", num_steps=999, pause=pause)
    small.wait_for("step   1/")
    for number in numbers:
        os.kill(small.process.pid, number)
        time.sleep(0.3)
    ended, lines = end_of(small, 30)
    assert ended == code and message in "\n".join(lines)
    step = int(lines[-1].partition("saved after step ")[2].partition(":")[0])
    assert max(checkpoint.steps_in(tmp_path / "run")) == step and checkpoint.newest_is_whole(tmp_path / "run")


def test_third_signal_ends_at_once(tmp_path):
    small = Small(tmp_path / "run", tmp_path / "log", num_steps=999, pause=5.0)
    small.wait_for("step   1/")
    for _ in range(3):
        os.kill(small.process.pid, signal.SIGINT)
        time.sleep(0.3)
    assert end_of(small, 3)[0] == 130


def test_an_evaluation_gives_way_to_a_signal(tmp_path):
    def evaluate(state):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    task = task_of(num_steps=4)._replace(evaluate=evaluate, evaluate_every_steps=2, best="top1")
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train.fit(task, config_of(), tmp_path)
    assert stopped.value.code == 0 and checkpoint.steps_in(tmp_path) == [2]
    assert time.monotonic() - begun < 30


START = "from simclr_jax.process import stopping; stopping.take_signals(); print('taken', flush=True)\n"
STARTING = {
    "imports": START + "import time; time.sleep(60)",
    "Python": START + "import time\nwith stopping.handled(): time.sleep(60)",
    "a compilation": START
    + "import hashlib\nwith stopping.handled(): hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}


@pytest.mark.parametrize("phase", STARTING)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_signals_before_the_first_step_end_within_seconds(phase, number, code):
    with subprocess.Popen(
        [sys.executable, "-c", STARTING[phase]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert process.returncode == code and err == ""
    assert "stopping; what was saved is kept" in out


def test_nohup_stays_nohup():
    script = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + START
    script += "os.kill(os.getpid(), signal.SIGHUP); print('went on')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "went on" in done.stdout and done.returncode == 0


def test_signals_are_the_callers_again_afterwards():
    before = [signal.getsignal(number) for number in stopping._SIGNALS]
    with stopping.handled():
        assert signal.getsignal(signal.SIGHUP) is stopping._receive
    assert [signal.getsignal(number) for number in stopping._SIGNALS] == before


# ----------------------------------------------------------------- one workdir, one run


def test_second_run_in_a_workdir_is_refused_and_a_killed_one_blocks_nobody(tmp_path):
    first = Small(tmp_path / "run", tmp_path / "first", num_steps=999, pause=0.1)
    first.wait_for("step   2")
    code, (line,) = end_of(Small(tmp_path / "run", tmp_path / "second"), 30)
    assert code == 2
    assert f"{tmp_path / 'run'} is in use by process {first.process.pid} on " in line and " since 2" in line
    first.process.kill()
    first.process.join()
    begun = time.monotonic()
    assert end_of(Small(tmp_path / "run", tmp_path / "third"), 60)[0] == 0
    assert time.monotonic() - begun < lock.SILENCE
    assert not (tmp_path / "run" / "lock.json").exists()


OWNERS = {
    "empty": "",
    "cut": '{"id": "x", "ho',
    "of another machine": '{"id": "x", "host": "elsewhere", "pid": 1, "boot": "b", "since": "yesterday"}',
}


@pytest.mark.parametrize("owner", OWNERS)
def test_lock_without_signs_of_life_is_taken_after_a_while(owner, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 0.3)
    (tmp_path / "lock.json").write_text(OWNERS[owner])
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_lock_of_another_machine_that_beats_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    with lock.locked(tmp_path), monkeypatch.context() as elsewhere:
        elsewhere.setattr(lock, "_is_alive", lambda owner: None)  # which this machine cannot know
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"), lock.locked(tmp_path):
            pass


def test_run_whose_workdir_was_taken_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.locked(tmp_path):
        lock.check()
        (tmp_path / "lock.json").write_text('{"id": "other", "host": "elsewhere", "pid": 7}')
        time.sleep(0.5)
        with pytest.raises(RunError, match="was taken by process 7 on elsewhere"):
            lock.check()
    lock._failures.clear()
    assert (tmp_path / "lock.json").exists()  # theirs


def test_lock_lives_on_where_tests_of_others_mock_the_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.locked(tmp_path):
        with tfds.testing.MockFs():  # as tfds.testing.mock_data does for every dataset it opens
            time.sleep(0.5)
        lock.check()


# ----------------------------------------------------------------- what ends a command


def test_errors_of_storage_that_nobody_foresaw_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as ended, errors.one_line_errors():
        os.stat("/nowhere/at/all")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: /nowhere/at/all: No such file or directory\n"


@pytest.mark.parametrize("kind, code", [(UserError, 2), (files.StorageError, 1)])
def test_errors_are_one_line_and_a_code(kind, code, capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    printed = []
    with pytest.raises(SystemExit) as ended, errors.one_line_errors(lambda *line: printed.append(line)):
        raise kind("two\nlines")
    assert ended.value.code == code and capsys.readouterr().err == "error: two\\nlines\n"
    assert printed == [("error: two\\nlines", code)]


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), errors.one_line_errors():
        np.int64(1) // (1 // 0)


def test_protecting_the_console_twice_is_once():
    console.protect()
    stream = sys.stdout
    console.protect()
    assert sys.stdout is stream
