"""Experiment trackers: Weights & Biases or MLflow get a run's reports; one that fails later never stops it.

Their own environment variables decide where they keep them: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI.
"""

import importlib.util
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flax.traverse_util import flatten_dict

from simclr_jax.process import UserError, files, reason_of, say
from simclr_jax.workdir import records, report

GRACE = 30.0  # Seconds that a tracker has at the end to send its remaining reports.


class _Wandb:
    def __init__(self, run_id, name, config):
        import wandb

        self._run = wandb.init(
            id=run_id,
            resume="allow",
            name=name,
            config=None if run_id else config,
            reinit="create_new",  # beside other runs that the program may track
            settings=wandb.Settings(console="off", finish_timeout=GRACE),
        )
        self._run.define_metric("*", step_metric="step")
        self.id = self._run.id

    def log(self, prefix, step, metrics):
        row = {"step": step} | {prefix + name: value for name, value in metrics.items()}
        self._run.log(row, step=None if prefix else step, commit=True)  # its own step count can never fall

    def end(self, status, summary):
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(status != "FINISHED"))


class _Mlflow:
    def __init__(self, run_id, name, config):
        import mlflow

        self._mlflow = mlflow
        self.id = mlflow.start_run(run_id=run_id, run_name=None if run_id else name).info.run_id
        if not run_id:
            mlflow.log_params(flatten_dict(config, sep="."))

    def log(self, prefix, step, metrics):
        self._mlflow.log_metrics({prefix + name: value for name, value in metrics.items()}, step=step)

    def end(self, status, summary):
        numbers = {
            f"summary/{name}": value for name, value in summary.items() if isinstance(value, int | float)
        }
        self._mlflow.log_metrics(numbers)
        self._mlflow.end_run(status)


_TRACKERS = {"wandb": _Wandb, "mlflow": _Mlflow}


def check(name: str) -> None:
    """Raises a UserError unless the package of a tracker is installed."""
    spec = importlib.util.find_spec(name)
    if not (spec and spec.origin):  # a folder of that name, as wandb makes them, is no package
        raise UserError(
            f"tracker={name!r}: the package is not installed: pip install 'simclr-jax[{name}]', or leave "
            "--config.tracker away"
        )


@contextmanager
def following(name: str, workdir, config: dict) -> Iterator[None]:
    """Passes every reported line to the tracker, and at the end the summary of `workdir`.

    A run that is started again goes on under the id that `WORKDIR/tracker.json` holds. The tracker runs in a
    thread, in which MLflow also keeps its active run; the thread ends with the first failure.

    Raises:
      UserError: the tracker cannot be opened, and has not followed this run before.
    """
    path = workdir / "tracker.json"
    run_ids = files.read_if_whole(path)
    opened, calls = queue.SimpleQueue(), queue.SimpleQueue()

    def follow():
        try:
            tracker = _TRACKERS[name](run_ids.get(name), str(workdir), config)
        except Exception as error:
            opened.put(error)
            return
        opened.put(tracker.id)
        try:
            while call := calls.get():
                method, *arguments = call
                getattr(tracker, method)(*arguments)
        except Exception as error:
            _go_on_without(name, reason_of(error))

    def on_report(folder, step, metrics):
        prefix = os.path.relpath(folder, workdir)  # the draws of fine-tuning have folders of their own
        calls.put(("log", "" if prefix == "." else f"{prefix}/", step, metrics))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    if isinstance(run_id := opened.get(), Exception):
        if name not in run_ids:
            raise UserError(f"tracker={name!r} cannot be opened ({reason_of(run_id)}): mend that or unset it")
        _go_on_without(name, reason_of(run_id))
    elif run_id != run_ids.get(name):
        files.write_json(path, run_ids | {name: run_id})
    status = "FAILED"
    try:
        with report.listening(on_report):
            yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):  # a signal, after which the same command resumes the run
        status = "KILLED"
        raise
    finally:
        summary = records.read_summary(workdir) if status == "FINISHED" else None
        calls.put(("end", status, flatten_dict(summary or {}, sep=".")))
        calls.put(None)
        thread.join(GRACE)
        if thread.is_alive():
            _go_on_without(name, f"no answer in {GRACE:.0f} s")


def _go_on_without(name, reason):
    say(f"note: tracker={name!r}: {reason}; the run goes on without it, metrics.jsonl has every line")
