"""The reports of a run: metric files, the console, and the check that the loss is still finite."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from simclr_jax.process import UserError, escape, files, machine, say, trial

_quiet = False  # whether the run is a part of another command
_LONGEST_SILENCE = 10  # Seconds between two lines of a quiet run.


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out tables, summaries and most steps of the runs inside; notes stay."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def say_aloud(line: str) -> None:
    """Prints a line, unless the run is quiet."""
    if not _quiet:
        say(line)


def print_table(rows: dict[str, str]) -> None:
    """Prints a description of a run, one line for each row."""
    width = max(map(len, rows))
    say("\n".join(f"  {name:<{width}}  {escape(value)}" for name, value in rows.items()))


def announce(rows: dict[str, str], batches: Callable | None = None) -> None:
    """Prints the description of a run whose work begins now, where a trial of it ends.

    Args:
      rows: see `print_table`.
      batches: those of a `train.Task`, which a trial opens.
    """
    if not _quiet:
        print_table(rows)
    if trial.active and batches:
        batches(0)
    trial.end()
    say_aloud("compiling")


def print_summary(summary: dict, workdir) -> None:
    """Prints a run's summary: scores as tables, notes as lines, other values as one line."""
    if _quiet:
        return
    groups = {name: value for name, value in summary.items() if isinstance(value, dict)}
    for name, value in groups.pop("few_label_deviation", {}).items():
        groups[name] = groups[name] | {"deviation": value}
    nested = {
        name: group for name, group in groups.items() if isinstance(next(iter(group.values()), 0), dict)
    }
    flat = {name: group for name, group in groups.items() if name not in nested}
    for title, rows in {**nested, "": flat}.items():
        # A longer row would not fit into a line.
        _print_scores(title, {name: row for name, row in rows.items() if len(row) <= 12})
    for note in summary.get("notes", ()):
        say(f"\n  note: {note}")
    values = [
        f"{_WORDS.get(name, name)} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in summary.items()
        if value is not None and not isinstance(value, dict | list)
    ]
    say(f"\n  {', '.join(values)}, written to {escape(workdir)}/summary.json")


def _print_scores(title, scores):
    """Prints {row: {column: score}} as a table; a row may lack columns."""
    if not scores:
        return
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    rows = {title: columns}
    for name, row in scores.items():
        rows[name] = [f"{row[column]:.3f}" if column in row else "" for column in columns]
    width = max(map(len, rows))
    say("")
    for name, cells in rows.items():
        cells = [f"{cell:>{max(len(column) + 2, 10)}}" for cell, column in zip(cells, columns)]
        say(f"  {name:<{width}}{''.join(cells)}".replace("_", " "))


# The words of a summary's line whose names say too little.
_WORDS = {"l2": "weight of the L2 penalty", "validation": "which had a validation score of"}

# The console shows some metrics under short names and leaves others out; files hold all under full names.
_SHORT_NAMES = {
    "learning_rate": "lr",
    "contrastive_accuracy": "contrastive accuracy",
    "contrastive_entropy": "entropy",
    "features_effective_rank": "rank",
}
_UNSHOWN = ("images_per_second", "data_wait", "gradient_norm", "probe_loss")
_UNSHOWN += ("features_alignment", "features_uniformity", "features_collapsed")

_STARVED = 0.1  # Share of the time in which accelerators wait for images, from which on a note says so.
_LONG_RUN = 0.5  # Hours; a longer run on a CPU gets a note that says how long it takes.
# A network and images that train in minutes on a CPU.
_SMALL = {"image_size": 64, "model.depth": 8, "model.width": 0.75}

_listeners: list[Callable[..., None]] = []


@contextmanager
def listening(on_report: Callable[..., None]) -> Iterator[None]:
    """Passes every line that process 0 writes to a metrics file to `on_report(folder, step, metrics)`."""
    _listeners.append(on_report)
    try:
        yield
    finally:
        _listeners.remove(on_report)


_writers = {}  # TensorBoard's writers that meters have open, by workdir


def show(workdir, step: int, *, pictures: dict[str, np.ndarray] | None = None, texts=None) -> None:
    """Adds pictures, uint8 [h, w, 3], and texts, in Markdown, to TensorBoard's files of a run.

    While a meter is open they go into its file, since TensorBoard reads no file further once there is a newer
    one.
    """
    from simclr_jax.data import tf

    with files.storage(workdir):
        open_writer = _writers.get(str(workdir))
        writer = open_writer or tf.summary.create_file_writer(str(files.portable_path(workdir)))
        with writer.as_default(step):
            for name, picture in (pictures or {}).items():
                tf.summary.image(name, picture[None])
            for name, text in (texts or {}).items():
                tf.summary.text(name, text)
        writer.flush() if open_writer else writer.close()


class Meter:
    """Averages the metrics of a run's steps and reports them, without ever holding a step up.

    The metrics of a step are read from the devices while the next step runs on them. Every
    `log_every_steps` steps, the averages since the last report go to `WORKDIR/metrics.jsonl`, to TensorBoard
    and to the console. A restarted run repeats the steps since its last checkpoint: lines that
    the file already holds are not written twice.

    Attributes:
      seconds_at_peak: seconds of a step at the devices' peak, for the utilisation `mfu`; None if unknown.
    """

    seconds_at_peak: float | None = None

    def __init__(self, workdir, config, *, start_step: int, num_steps: int):
        self._writes = jax.process_index() == 0
        if self._writes:
            from simclr_jax.data import tf  # writes event files to remote workdirs as well

            self._path = epath.Path(workdir) / "metrics.jsonl"
            with files.storage(self._path):
                self._written = _last_step(self._path)
                self._file = self._path.open("a")
                self._tensorboard = tf.summary.create_file_writer(str(files.portable_path(workdir)))
            self._workdir = str(workdir)
            _writers[self._workdir] = self._tensorboard
        self._num_steps, self._start_step = num_steps, start_step
        self._config, self._reports = config, 0
        self._pending: tuple[int, dict[str, jax.Array]] | None = None  # the newest step, and its metrics
        self._waiter = ThreadPoolExecutor(1)
        self._ready: Future | None = None  # the moment when the newest step was done
        self._begun = self._flushed = self._printed = time.monotonic()
        self._reset()

    def _reset(self):
        self._sums, self._steps, self._idle, self._since = {}, 0, 0.0, time.monotonic()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Adds the time inside that comes after the end of the previous step: the devices are idle then."""
        start = time.monotonic()
        yield
        if self._ready is None:
            self._idle += time.monotonic() - start
        elif self._ready.done():
            self._idle += max(0.0, time.monotonic() - max(start, self._ready.result()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the throughput."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched; reads and checks those of the one before."""
        self._ready = self._waiter.submit(_ready_time, metrics)
        self.flush()
        self._pending = step, metrics

    def flush(self, evaluation: dict[str, float] | None = None) -> None:
        """Reads and checks the last metrics; `evaluation`, of the same step, makes it report them."""
        if self._pending:
            (step, metrics), self._pending = self._pending, None
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            _check_finite(step, metrics)
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._learning_rate = metrics["learning_rate"]
            self._steps += 1
            self._forecast(step)
            if evaluation or step % self._config.log_every_steps == 0 or step == self._num_steps:
                self._report(step, evaluation or {})

    def _forecast(self, step):
        """Says after three steps how long a run takes, where that is long and there is no accelerator."""
        seconds, self._flushed = time.monotonic() - self._flushed, time.monotonic()
        hours = seconds * (self._num_steps - step) / 3600
        slow = hours >= _LONG_RUN and jax.default_backend() == "cpu"
        if self._writes and slow and step == self._start_step + 3:
            say(
                f"note: about {hours:.2g} hours for {self._num_steps - step:,} more steps of {seconds:.1f} s "
                f"each. It takes less with {' or '.join(_cheaper_than(self._config))}"
            )

    def _report(self, step, evaluation):
        seconds = time.monotonic() - self._since
        metrics = {"loss": 0.0} | {name: value / self._steps for name, value in self._sums.items()}
        metrics["learning_rate"] = self._learning_rate
        metrics["images_per_second"] = self._steps * self._config.batch_size / seconds
        metrics["data_wait"] = self._idle / seconds
        if self._reports == 1 and metrics["data_wait"] > _STARVED and jax.default_backend() != "cpu":
            self._reports = 2  # It is said once.
            say(
                f"note: the devices wait for images {metrics['data_wait']:.0%} of the time, and less with "
                f"{_faster_input(self._config)}; python -m simclr_jax.benchmark input measures the cores here"
            )
        self._reports = max(1, self._reports)  # The first one includes the start of the pipeline.
        if self.seconds_at_peak:
            metrics["mfu"] = self._steps * self.seconds_at_peak / seconds
        self._reset()
        self._write(step, metrics | evaluation)

    def report_start(self, evaluation: dict[str, float] | None) -> None:
        """Reports the evaluation before the first step, if there was one, as step 0."""
        if evaluation:
            self._write(0, evaluation)
        self._begun = time.monotonic()
        self._reset()

    def _write(self, step, metrics):
        if not self._writes:
            return
        if step > self._written:
            from simclr_jax.data import tf

            with files.storage(self._workdir), self._tensorboard.as_default(step):
                self._file.write(json.dumps({"step": step, **metrics}) + "\n")
                self._file.flush()
                for name, value in metrics.items():
                    tf.summary.scalar(name, value)
            for on_report in _listeners:
                on_report(self._path.parent, step, dict(metrics))
        self._print(step, metrics)

    def _print(self, step, metrics):
        head = f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}"
        words = [
            f"{_SHORT_NAMES.get(name, name)} {value:.4g}"
            for name, value in metrics.items()
            if name.removeprefix("average_") not in _UNSHOWN
            and not name.startswith(("projection_", "average_projection_"))
        ]
        remaining = []
        if step > self._start_step:
            words += [f"{metrics['images_per_second']:.0f} images/s", f"data wait {metrics['data_wait']:.0%}"]
            per_step = (time.monotonic() - self._begun) / (step - self._start_step)
            seconds = int(per_step * (self._num_steps - step))
            remaining = [f"{seconds // 60}:{seconds % 60:02d} left"]
        if sys.stdout.isatty():  # one line, cut to the width of the terminal: the remaining time comes first
            done = 10 * step // self._num_steps
            line = "  ".join([f"[{'#' * done:<10}] {head}", *remaining, *words])
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif not _quiet or time.monotonic() - self._printed > _LONGEST_SILENCE:
            self._printed = time.monotonic()
            print("  ".join([head, *words, *remaining]), flush=True)

    def close(self) -> None:
        """Ends the progress line and closes the files."""
        self._waiter.shutdown(wait=False)
        if self._writes:
            del _writers[self._workdir]
            if sys.stdout.isatty():
                print()
            with files.storage(self._workdir):
                self._file.close()
                self._tensorboard.close()


def _cheaper_than(config) -> list[str]:
    """Returns what would make a run of this config cheaper, in words."""
    if config.get("pretrained"):
        return ["fewer steps (--config.num_steps)"]
    flat = flatten_dict(config.to_dict(), sep=".")
    settings = [f"--config.{key}={value}" for key, value in _SMALL.items() if flat.get(key, 0) > value]
    smaller = [f"smaller images or a smaller network, as in {' '.join(settings)}"] if settings else []
    return ["published weights (docs/published.md)", *smaller]


def _faster_input(config) -> str:
    """Returns what would give the devices of a run of this config more images, in words."""
    remedy = f"more cores for each process (this one has {machine.count_cores()})"
    if not config.dataset.in_memory:
        remedy += ", the data on a disk of each machine (docs/data_on_machines.md)"
    if config.task != "pretrain" or config.augment.on_device:
        return remedy
    small = config.image_size <= 96 and config.dataset.in_memory
    return f"--config.{'dataset' if small else 'augment'}.on_device=True, {remedy}"


def _ready_time(results) -> float:
    """Waits until results are there, and returns when that was, by `time.monotonic`; runs in a thread."""
    with suppress(Exception):  # an error of a step is raised where its metrics are read
        jax.block_until_ready(results)
    return time.monotonic()


def read(path) -> list[dict[str, float]]:
    """Returns the lines of a metrics file, without those that cannot be parsed."""
    return [json.loads(line) for line in _readable_lines(epath.Path(path).read_bytes())[0]]


def _readable_lines(contents: bytes) -> tuple[list[bytes], list[int]]:
    """Returns the lines that hold the metrics of a step, and the numbers of the damaged ones, from 1."""
    readable, damaged = [], []
    for number, line in enumerate(contents.split(b"\n"), 1):
        try:
            whole = type(json.loads(line.decode())["step"]) is int
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole:
            readable.append(line)
        elif line:
            damaged.append(number)
    return readable, damaged


def _last_step(path: epath.Path) -> int:
    """Returns the last step in a metrics file, -1 if there is none.

    A last line that a crash left unfinished is removed. A file that is damaged otherwise is set aside, and
    its readable lines are written to a new one.
    """
    if not files.exists(path):
        return -1
    contents = b"" if path.is_dir() else path.read_bytes()
    readable, damaged = _readable_lines(contents)
    if path.is_dir() or damaged or contents[-1:] not in (b"", b"\n"):
        if path.is_dir() or damaged not in ([], [contents.count(b"\n") + 1]):
            aside = files.set_aside(path)
            lines = f", lines {damaged[0]} to {damaged[-1]} among them" if damaged else ""
            say(f"note: {escape(path)} is damaged{lines}: now {escape(aside.name)}, {len(readable)} are kept")
        files.write_text(path, b"".join(line + b"\n" for line in readable).decode())
    return json.loads(readable[-1])["step"] if readable else -1


def _check_finite(step, metrics):
    infinite = [name for name in ("loss", "gradient_norm") if not np.isfinite(metrics[name])]
    if infinite:
        raise UserError(
            f"{infinite[0]} is {metrics[infinite[0]]} at step {step}: the usual causes are too high a "
            f"learning rate (here {metrics['learning_rate']:.3g}: lower --config.optimizer.learning_rate), "
            "too short a warmup, too low a temperature, or damaged images; earlier checkpoints are kept"
        )
