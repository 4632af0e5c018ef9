"""Weights & Biases and MLflow get what a run reports, and whatever becomes of them the run goes on."""

import json
import sys
import time

import pytest
import wandb
from conftest import log_of
from etils import epath
from flax.traverse_util import flatten_dict
from test_report import make_meter
from test_report import run as run_steps

import simclr_jax
from simclr_jax.config import settings
from simclr_jax.process import stopping
from simclr_jax.process.errors import UserError
from simclr_jax.tasks import pretrain
from simclr_jax.workdir import trackers

CONFIG = {"seed": 3, "model": {"width": 0.5}, "tracker": "wandb"}
SUMMARY = {"trained": {"knn_accuracy": 0.75}, "steps": 8, "words": "some"}


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    """The folder that Weights & Biases keeps its files in."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield tmp_path / "wandb"
    wandb.teardown()  # which would remember the folder


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"  # made once: it takes seconds


@pytest.fixture
def mlflow_run(database, monkeypatch):
    """(id of a run) -> the run as MLflow's client knows it, and the history of a metric of it."""
    import mlflow

    mlflow.set_tracking_uri(database)
    client = mlflow.MlflowClient()

    def read(run_id, metric="loss"):
        return client.get_run(run_id), [(m.step, m.value) for m in client.get_metric_history(run_id, metric)]

    return read


def follow(name, workdir, start, stop, *, place="", error=None, summary=SUMMARY):
    """Reports the steps from `start` to `stop` of a run, every second one, as a run in `workdir` does."""
    workdir = epath.Path(workdir)
    (workdir / place).mkdir(parents=True, exist_ok=True)
    with trackers.following(name, workdir, CONFIG):
        run_steps(make_meter(workdir / place, start_step=start), range(start + 1, stop + 1))
        if error:
            raise error
        (workdir / "summary.json").write_text(json.dumps(summary))


def id_of(workdir, name):
    return json.loads((workdir / "tracker.json").read_text())[name]


def records_of(folder):
    """The records of a run's .wandb file, in blocks, behind heads of a checksum, a length and a kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def values_of(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def wandb_runs(folder):
    """[(id, config, rows of the history, summary, exit code)] of the runs there, in order of time."""
    wandb.teardown()  # its service writes what it holds, which a finished run need not wait for
    for run in sorted(folder.glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns):
        records = list(records_of(run))
        first = next(record.run for record in records if record.HasField("run"))
        rows = [values_of(record.history.item) for record in records if record.HasField("history")]
        summary = {}
        for record in records:
            if record.HasField("summary"):
                summary |= values_of(record.summary.update)
        (code,) = [record.exit.exit_code for record in records if record.HasField("exit")]
        yield first.run_id, values_of(first.config.update), rows, summary, code


@pytest.mark.slow
def test_wandb_gets_config_metrics_and_summary(tmp_path, wandb_offline):
    follow("wandb", tmp_path / "run", 0, 8)
    ((run_id, config, rows, summary, code),) = wandb_runs(wandb_offline)
    assert run_id == id_of(tmp_path / "run", "wandb") and code == 0
    assert config["seed"] == 3 and config["model"] == {"width": 0.5}
    assert [(row["_step"], row["step"], row["loss"]) for row in rows] == [
        (2, 2, 1.5),
        (4, 4, 3.5),
        (6, 6, 5.5),
        (8, 8, 7.5),
    ]
    lines = log_of(tmp_path / "run")
    assert [{name: row[name] for name in line} for row, line in zip(rows, lines)] == lines
    assert summary["trained.knn_accuracy"] == 0.75 and summary["words"] == "some"


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(tmp_path, wandb_offline):
    with pytest.raises(KeyboardInterrupt):
        follow("wandb", tmp_path / "run", 0, 4, error=KeyboardInterrupt())
    time.sleep(1.1)  # its folders are named by the second
    follow("wandb", tmp_path / "run", 3, 8)
    first, second = wandb_runs(wandb_offline)
    assert first[0] == second[0] == id_of(tmp_path / "run", "wandb")
    assert [[row["_step"] for row in run[2]] for run in (first, second)] == [[2, 4], [6, 8]]
    assert (first[4], second[4]) == (1, 0) and "trained.knn_accuracy" not in first[3]


@pytest.mark.slow
def test_runs_within_a_run_have_names_of_their_own(tmp_path, wandb_offline):
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    with trackers.following("wandb", workdir, CONFIG):
        for place in ("", "draw1"):
            (workdir / place).mkdir(exist_ok=True)
            run_steps(make_meter(workdir / place), range(1, 5))
    ((_, _, rows, _, _),) = wandb_runs(wandb_offline)
    assert [(row["step"], row.get("loss"), row.get("draw1/loss")) for row in rows] == [
        (2, 1.5, None),
        (4, 3.5, None),
        (2, None, 1.5),
        (4, None, 3.5),
    ]


@pytest.mark.slow
def test_mlflow_gets_config_metrics_and_summary_and_goes_on(tmp_path, mlflow_run):
    with pytest.raises(SystemExit):
        follow("mlflow", tmp_path / "run", 0, 4, error=SystemExit(0))
    run_id = id_of(tmp_path / "run", "mlflow")
    run, history = mlflow_run(run_id)
    assert run.info.status == "KILLED" and history == [(2, 1.5), (4, 3.5)]
    assert run.data.params == {name: str(value) for name, value in flatten_dict(CONFIG, sep=".").items()}
    follow("mlflow", tmp_path / "run", 3, 8)
    assert id_of(tmp_path / "run", "mlflow") == run_id
    run, history = mlflow_run(run_id)
    assert run.info.status == "FINISHED" and history == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5)]
    assert run.data.metrics["summary/trained.knn_accuracy"] == 0.75
    (workdir,) = {line.parent for line in (tmp_path / "run").rglob("tracker.json")}
    assert run.info.run_name == str(workdir)


@pytest.mark.slow
def test_mlflow_tells_that_a_run_failed(tmp_path, mlflow_run):
    with pytest.raises(UserError, match="loss is nan"):
        follow("mlflow", tmp_path / "run", 0, 4, error=UserError("loss is nan"))
    assert mlflow_run(id_of(tmp_path / "run", "mlflow"))[0].info.status == "FAILED"


class Away:
    """A tracker whose server goes away after the first line, and takes its time to say so."""

    id, seconds = "some", 0.0

    def __init__(self, known, name, config):
        self.known, self.lines = known, []

    def log(self, prefix, step, metrics):
        self.lines.append(step)
        if len(self.lines) > 1:
            time.sleep(self.seconds)
            raise ConnectionError("the server is away")

    def end(self, status, summary):
        raise AssertionError("nobody asks a tracker that has failed")


def test_a_tracker_that_fails_in_the_middle_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers._TRACKERS, "wandb", Away)
    follow("wandb", tmp_path / "run", 0, 8)
    assert len(log_of(tmp_path / "run")) == 4 and (tmp_path / "run" / "summary.json").exists()
    out = capsys.readouterr().out
    assert out.count("note: tracker='wandb': the server is away; the run goes on without it") == 1


def test_a_tracker_that_does_not_answer_holds_nothing_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers._TRACKERS, "wandb", type("Slow", (Away,), {"seconds": 60.0}))
    monkeypatch.setattr(trackers, "GRACE", 0.5)
    begun = time.monotonic()
    follow("wandb", tmp_path / "run", 0, 8)
    assert time.monotonic() - begun < 20
    assert "note: tracker='wandb': no answer in 0 s; the run goes on without it" in capsys.readouterr().out


def refuse(known, name, config):
    raise ConnectionError("no route to host")


def test_a_tracker_that_cannot_be_opened_stops_a_first_start_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers._TRACKERS, "wandb", refuse)
    with pytest.raises(UserError, match=r"tracker='wandb' cannot be opened \(no route to host\): mend that"):
        follow("wandb", tmp_path / "run", 0, 4)
    (tmp_path / "run" / "tracker.json").write_text('{"wandb": "before"}')
    follow("wandb", tmp_path / "run", 0, 8)
    assert len(log_of(tmp_path / "run")) == 4
    assert capsys.readouterr().out.count("note: tracker='wandb': no route to host; the run goes on") == 1


@pytest.fixture
def opened(monkeypatch):
    """[(known id, [(step, loss), ...], [(status, summary)])] of every tracker that is opened."""
    calls = []

    class Noted:
        id = "some"

        def __init__(self, known, name, config):
            calls.append((known, [], []))

        def log(self, prefix, step, metrics):
            calls[-1][1].append((step, metrics["loss"]))

        def end(self, status, summary):
            calls[-1][2].append((status, summary.get("trained.knn_accuracy")))

    monkeypatch.setitem(trackers._TRACKERS, "mlflow", Noted)
    return calls


def test_the_key_is_read_by_every_trained_task_and_free_to_change(tmp_path, monkeypatch, opened):
    start = 0

    def run(config, workdir):
        nonlocal start
        begun, start = start, start + 4
        workdir.mkdir(exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        run_steps(make_meter(workdir, start_step=begun), range(begun + 1, start + 1))
        if start < 12:
            raise stopping.Stopped(0)
        return SUMMARY

    monkeypatch.setattr(pretrain, "run", run)
    for tracker in ("mlflow", "", "mlflow"):
        config = simclr_jax.get_config("digits", {"batch_size": 8, "tracker": tracker})
        summary = simclr_jax.run(config, tmp_path / "run")
    assert summary == SUMMARY and id_of(tmp_path / "run", "mlflow") == "some"
    assert opened == [
        (None, [(2, 1.5), (4, 3.5)], [("KILLED", None)]),
        ("some", [(10, 9.5), (12, 11.5)], [("FINISHED", 0.75)]),
    ]
    for task in ("linear_eval", "finetune", "distill"):
        assert simclr_jax.get_config(f"digits:{task}").tracker == ""
    assert settings.make("configs/digits.py", [("tracker", "")], as_text=True)[0].tracker == ""
    with pytest.raises(UserError, match="tracker='mlfow': set it to '', 'wandb' or 'mlflow', as in "):
        simclr_jax.get_config("digits", {"tracker": "mlfow"})


def test_a_missing_package_is_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as Weights & Biases leaves it where its runs began
    config = simclr_jax.get_config("digits", {"batch_size": 8, "tracker": "wandb"})
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"tracker='wandb': .* pip install 'simclr-jax\[wandb\]', or leave "):
        simclr_jax.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
