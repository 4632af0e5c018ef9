"""Experiment trackers: Weights & Biases or MLflow get what a run reports, and can neither stop nor slow it.

Where they keep it is told by their own variables: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, ...
"""

import importlib.util
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flax.traverse_util import flatten_dict

from simclr_jax.process import files
from simclr_jax.process.console import say
from simclr_jax.process.errors import UserError, reason_of
from simclr_jax.workdir import records, report

GRACE = 30.0  # seconds in which, at the end, a tracker has to send what it still holds


class _Wandb:
    def __init__(self, known, name, config):
        import wandb

        self._run = wandb.init(
            id=known,
            resume="allow",
            name=name,
            config=None if known else config,
            reinit="create_new",  # whatever else the program tracks
            settings=wandb.Settings(console="off", finish_timeout=GRACE),
        )
        self._run.define_metric("*", step_metric="step")
        self.id = self._run.id

    def log(self, prefix, step, metrics):
        row = {"step": step} | {prefix + name: value for name, value in metrics.items()}
        self._run.log(row, step=None if prefix else step, commit=True)  # its own count can never fall

    def end(self, status, summary):
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(status != "FINISHED"))


class _Mlflow:
    def __init__(self, known, name, config):
        import mlflow

        self._mlflow = mlflow
        self.id = mlflow.start_run(run_id=known, run_name=None if known else name).info.run_id
        if not known:
            mlflow.log_params(flatten_dict(config, sep="."))

    def log(self, prefix, step, metrics):
        self._mlflow.log_metrics({prefix + name: value for name, value in metrics.items()}, step=step)

    def end(self, status, summary):
        numbers = {f"summary/{name}": x for name, x in summary.items() if isinstance(x, int | float)}
        self._mlflow.log_metrics(numbers)
        self._mlflow.end_run(status)


_TRACKERS = {"wandb": _Wandb, "mlflow": _Mlflow}


def check(name: str) -> None:
    """Raises a UserError unless the package of a tracker is installed."""
    found = importlib.util.find_spec(name)
    if not (found and found.origin):  # a folder of that name, as wandb makes them, is no package
        raise UserError(
            f"tracker={name!r}: the package is not installed: pip install 'simclr-jax[{name}]', or leave "
            "--config.tracker away"
        )


@contextmanager
def following(name: str, workdir, config: dict) -> Iterator[None]:
    """Inside, the tracker gets the lines that are reported, and in the end the summary that is in `workdir`.

    A run that is started again goes on under the id that `WORKDIR/tracker.json` holds. The tracker has a
    thread of its own, in which MLflow also keeps its active run. That ends with the first failure.

    Raises:
      UserError: the tracker cannot be opened, and has not followed this run before.
    """
    path, known = workdir / "tracker.json", {}
    with suppress(OSError, ValueError):
        known = files.read_json(path)
    opened, calls = queue.SimpleQueue(), queue.SimpleQueue()

    def follow():
        try:
            tracker = _TRACKERS[name](known.get(name), str(workdir), config)
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

    def tell(place, step, metrics):
        prefix = os.path.relpath(place, workdir)  # the draws of fine-tuning have folders of their own
        calls.put(("log", "" if prefix == "." else f"{prefix}/", step, metrics))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    if isinstance(found := opened.get(), Exception):
        if name not in known:
            raise UserError(
                f"tracker={name!r} cannot be opened ({reason_of(found)}): mend that, or leave "
                "--config.tracker away"
            )
        _go_on_without(name, reason_of(found))
    elif found != known.get(name):
        files.write_json(path, known | {name: found})
    status = "FAILED"
    try:
        with report.listening(tell):
            yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):  # a signal: the same command goes on
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
