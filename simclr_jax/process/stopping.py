"""Signals: how a run stops, alone or with all its processes.

SIGTERM, SIGHUP and Ctrl-C end a run at once where there is nothing to save: while it starts, compiles or
measures. From its first step on it finishes the step, saves and stops; a second signal changes nothing, a
third one ends it without waiting. The exit code is 0 after SIGTERM and SIGHUP, 130 after Ctrl-C.

In a program that uses the package as a library, a signal ends the run and not the process: where there is
nothing to save, Ctrl-C, or a notebook's stop button, raises KeyboardInterrupt, another signal `Stopped`.
"""

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from simclr_jax.process.console import end_process, say

PATIENCE = 3.0  # Seconds after which a signal that had no effect yet is explained, or ends the process.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interrupted(BaseException):
    """A signal came inside `unless_stopped`."""


class Stopped(SystemExit):
    """A signal ended a run, which has saved its state if it had one."""


def exit_code(number: int) -> int:
    """Returns the exit code of a run that a signal ended."""
    return 130 if number == signal.SIGINT else 0


class _State:
    """The state that the signal handler shares with the thread that watches signals; a process has one."""

    received: list[signal.Signals] = []  # noqa: RUF012
    previous_handlers: dict = {}  # noqa: RUF012
    ends_process = True  # a signal ends the process, not the run alone
    starting = False  # the modules are still being imported
    saving = False  # there are steps to save
    saved = False  # the steps are saved, and the process is about to end
    interruptible = False
    announced = threading.Event()  # a line on the console says that a signal came
    wakeup_socket: socket.socket | None = None
    previous_wakeup_fd = -1


def take_signals(*, ends_process: bool = True) -> None:
    """Handles signals from now on; until `handled` begins, one ends the process.

    Python runs a handler only between two of its own instructions, so that a compilation delays it. The bytes
    that Python writes to the wakeup descriptor arrive at once, in a thread.

    Args:
      ends_process: False lets a signal end a run and leave its process alone.
    """
    _State.received, _State.previous_handlers, _State.ends_process = [], {}, ends_process
    _State.starting, _State.saving, _State.saved = ends_process, False, False
    _State.announced.clear()
    pipe, _State.wakeup_socket = socket.socketpair()
    _State.wakeup_socket.setblocking(False)
    _State.previous_wakeup_fd = signal.set_wakeup_fd(_State.wakeup_socket.fileno(), warn_on_full_buffer=False)
    for number in _SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            _State.previous_handlers[number] = signal.signal(number, _receive)
    threading.Thread(target=_watch, args=(pipe,), daemon=True).start()


@contextmanager
def handled(*, ends_process: bool = True) -> Iterator[None]:
    """Handles signals for as long as a command runs; `ends_process` is that of `take_signals`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals, and they stay the caller's
        return
    if not _signals_taken():
        take_signals(ends_process=ends_process)
    _State.starting = False
    try:
        yield
    finally:
        for number, handler in _State.previous_handlers.items():
            # The handler is None where it was not set from Python, as by jax.distributed.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(_State.previous_wakeup_fd)
        if not _State.received or not _State.ends_process:  # else the thread makes sure that the process ends
            _State.wakeup_socket.close()
            _State.received = []


def _signals_taken() -> bool:
    return signal.getsignal(signal.SIGTERM) == _receive


def retake_signals() -> None:
    """Handles the signals again after a library has set its own handlers."""
    for number in _State.previous_handlers:
        signal.signal(number, _receive)


@contextmanager
def saving() -> Iterator[list[signal.Signals]]:
    """Yields the list of received signals, which a train loop looks at once it has called `expect_save`."""
    if threading.current_thread() is threading.main_thread() and not _signals_taken():
        with handled(ends_process=False), saving() as received:  # no command line handles signals
            yield received
        return
    try:
        yield _State.received
    finally:
        _State.saving, _State.saved = False, bool(_State.received)


def expect_save() -> None:
    """Lets a signal stop the run only after the next save, from now on."""
    _State.saving = True


def unless_stopped(function):
    """Returns `function()`, or None if a signal comes or has come; for work that a run can do without.

    With several processes none may abandon a computation that they share: there the signal waits.
    """
    import jax  # here, since signals are taken before the seconds in which jax is imported

    if jax.process_count() > 1:
        return function()
    try:
        _State.interruptible = True
        return None if _State.received else function()
    except Interrupted:
        return None
    finally:
        _State.interruptible = False


def _receive(number, _frame):
    """Handles a signal, in the main thread."""
    _State.received.append(signal.Signals(number))
    if not (_State.saving or _State.interruptible):
        _State.announced.wait(0.5)
    if _State.starting:
        end_process(exit_code(number))
    if _State.interruptible:
        _State.interruptible = False
        raise Interrupted
    if not _State.ends_process:
        if (not _State.saving and len(_State.received) == 1) or len(_State.received) > 2:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(128 + number)
    elif not _State.saving and len(_State.received) == 1:
        sys.exit(exit_code(number))


def _watch(pipe):
    """Announces signals, and ends a process that cannot end itself; runs in a thread."""
    numbers, explained, deadline = [], False, None
    with pipe:
        while True:
            pipe.settimeout(None if deadline is None else max(0.05, deadline - time.monotonic()))
            with suppress(TimeoutError):
                received = pipe.recv(64)
                if not received:
                    return
                for number in received:
                    if number in _SIGNALS:
                        numbers.append(number)
                        _announce(numbers)
                        _State.announced.set()
                if len(numbers) > 2 and _State.ends_process:
                    end_process(130 if numbers[0] == signal.SIGINT else 128 + numbers[0])
            if numbers and deadline is None:
                deadline = time.monotonic() + PATIENCE
            if numbers and time.monotonic() >= deadline:
                if not _State.saving and not _State.saved and _State.ends_process:
                    end_process(exit_code(numbers[0]))  # the main thread may be compiling
                if _State.saving and not explained:
                    say("the stop waits for the step, and then for the save: a step takes long here")
                explained, deadline = True, time.monotonic() + PATIENCE


def _announce(numbers):
    """Prints the effect of the newest signal."""
    if len(numbers) == 1:
        effect = "finishing this step and saving" if _State.saving else "stopping; what was saved is kept"
        say(f"\n{signal.Signals(numbers[0]).name} received: {effect}")
    elif len(numbers) == 2 and _State.saving:
        say("still saving: a third signal ends this at once, and loses the steps since the last save")


def leave(code) -> None:
    """Ends the process if a signal has stopped it; returns otherwise.

    The interpreter's own exit would crash while compilations or input pipelines are still at work.
    """
    if _State.received and _State.ends_process:
        end_process(code or 0)
