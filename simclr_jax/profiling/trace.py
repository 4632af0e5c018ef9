"""Traces some steps of a run, which show how their time is spent: `--config.profile_steps=10,12`."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import jax
from etils import epath

from simclr_jax.process import escape, files, reason_of, say


class Profile:
    """Lets jax's profiler trace the steps from `first` to `last` into `WORKDIR/profile`.

    Each process traces its own devices and threads; with several processes, each has a folder of its own
    there. A trace that cannot be taken or written stops no run.
    """

    def __init__(
        self, workdir, steps: tuple[int, int] | None, paused: Callable[[], AbstractContextManager]
    ) -> None:
        """Starts nothing yet.

        Args:
          workdir: the folder of the run.
          steps: the first and the last step to trace; None for no trace.
          paused: makes the context in which the profiler starts and writes, which is no time of a step.
        """
        self._first, self._last = steps or (0, 0)
        self._paused = paused
        self._folder = epath.Path(workdir) / "profile"
        if jax.process_count() > 1:
            self._folder /= f"process{jax.process_index()}"
        self._pending = None  # the results of the newest step of a trace that has begun

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surrounds a step and its wait for data; starts the trace before its first step."""
        if self._pending is None and self._first <= step <= self._last:
            self._start()
        with jax.profiler.StepTraceAnnotation("train_step", step_num=step):
            yield

    def end_after(self, step: int, results) -> None:
        """Ends the trace after its last step, once its `results` are there."""
        if self._pending is not None:
            self._pending = results
            if step >= self._last:
                self.close()

    def close(self) -> None:
        """Ends a trace that is under way, and writes it."""
        if self._pending is None:
            return
        pending, self._pending, self._last = self._pending, None, 0
        try:
            with suppress(Exception):  # an error of a step is raised where its metrics are read
                # or the trace would lack work that the devices have not finished
                jax.block_until_ready(pending)
            with self._paused():
                jax.profiler.stop_trace()
                self._copy()
        except Exception as error:
            say(f"note: profile_steps: no trace was written: {reason_of(error)}")
        finally:
            self._local_folder.cleanup()

    def _start(self):
        self._local_folder = tempfile.TemporaryDirectory(prefix="simclr-profile-")
        try:
            with self._paused():
                # Python's frames would be traced in the threads of tf.data, too, where that has crashed.
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                jax.profiler.start_trace(
                    self._local_folder.name, create_perfetto_trace=True, profiler_options=options
                )
            self._pending = ()
        except Exception as error:  # a notebook may be tracing already
            self._local_folder.cleanup()
            self._last = 0
            say(f"note: profile_steps: no trace was taken: {reason_of(error)}")

    def _copy(self):
        """Copies the trace from the local folder, where the profiler has to write, to the workdir."""
        for path in Path(self._local_folder.name).rglob("*"):
            if path.is_file():
                target = self._folder / path.relative_to(self._local_folder.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with path.open("rb") as source, files.writing(target) as file:
                    shutil.copyfileobj(source, file)
        say(
            f"profile: {escape(self._folder)} has the trace: tensorboard --logdir {escape(self._folder)} "
            "(with pip install xprof), or its perfetto_trace.json.gz on https://ui.perfetto.dev"
        )
