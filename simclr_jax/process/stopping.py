"""Signals: how a run stops, alone or with all its processes.

SIGTERM, SIGHUP and Ctrl-C end a run at once where there is nothing to save: while it starts, compiles or
measures. From its first step on it finishes the step, saves and stops; a second signal changes nothing, a
third one ends it without waiting. The exit code is 0 after SIGTERM and SIGHUP, 130 after Ctrl-C.

Used as a library a run ends, not its process: Ctrl-C, or a notebook's stop button, is a KeyboardInterrupt
where there is nothing to save, another signal is `Stopped`.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from simclr_jax.process.console import say

PATIENCE = 3.0  # seconds of silence that a person is left in
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interrupted(BaseException):
    """A signal came inside `unless_stopped`."""


class Stopped(SystemExit):
    """A signal ended a run, which has saved what there was to save."""


def exit_code(number: int) -> int:
    """Of a run that a signal ended."""
    return 130 if number == signal.SIGINT else 0


class _State:
    """What the handlers and the thread beside them know; a process has one."""

    received: list[signal.Signals] = []  # noqa: RUF012
    previous: dict = {}  # noqa: RUF012
    ends = True  # a signal ends the process, not the run alone
    starting = False  # the modules are still being imported
    saving = False  # there are steps to save
    saved = False  # and the process is on its way out
    interruptible = False
    told = threading.Event()  # that a signal came
    wake: socket.socket | None = None
    woken = -1  # the descriptor that had this task before


def take(*, ends: bool = True) -> None:
    """Takes the signals, of which Python itself would make tracebacks; until `handled` begins they end it.

    Unless `ends`, they end a run and leave its process alone.

    Python runs handlers between two lines of its own, for which a compilation lets it wait. What the wakeup
    descriptor gets comes at once, to a thread.
    """
    _State.received, _State.previous, _State.ends = [], {}, ends
    _State.starting, _State.saving, _State.saved = ends, False, False
    _State.told.clear()
    ours, _State.wake = socket.socketpair()
    _State.wake.setblocking(False)
    _State.woken = signal.set_wakeup_fd(_State.wake.fileno(), warn_on_full_buffer=False)
    for number in _SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            _State.previous[number] = signal.signal(number, _receive)
    threading.Thread(target=_watch, args=(ours,), daemon=True).start()


@contextmanager
def handled(*, ends: bool = True) -> Iterator[None]:
    """Takes the signals for as long as a command runs; `ends` as of `take`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread alone: they stay the caller's
        return
    if not _taken():
        take(ends=ends)
    _State.starting = False
    try:
        yield
    finally:
        for number, handler in _State.previous.items():
            # None: not set from Python, but as jax.distributed does.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(_State.woken)
        if not _State.received or not _State.ends:  # else the thread sees to it that the process ends
            _State.wake.close()
            _State.received = []


def _taken() -> bool:
    return signal.getsignal(signal.SIGTERM) == _receive


def renew() -> None:
    """Takes the signals again, after a library has taken them."""
    for number in _State.previous:
        signal.signal(number, _receive)


@contextmanager
def saving() -> Iterator[list[signal.Signals]]:
    """Inside, once `begin` was called, signals are collected in the list it yields, for the loop to see."""
    if threading.current_thread() is threading.main_thread() and not _taken():
        with handled(ends=False), saving() as received:  # used without a command line
            yield received
        return
    try:
        yield _State.received
    finally:
        _State.saving, _State.saved = False, bool(_State.received)


def begin() -> None:
    """From now on there is something to save."""
    _State.saving = True


def unless_stopped(function):
    """What `function()` returns, or None where a signal comes, or has come; for what can be done without.

    Of several processes none may leave alone what they do together: there the signal waits.
    """
    import jax

    if jax.process_count() > 1:
        return function()
    try:
        _State.interruptible = True
        return None if _State.received else function()
    except Interrupted:
        return None
    finally:
        _State.interruptible = False


def make_agreement():
    """Builds `agreed(received) -> signal or None`, for after every step; all processes get the same answer.

    Among several it is that of the step before, so that none waits for the others.
    """
    import jax

    from simclr_jax import parallel

    if jax.process_count() == 1:
        return lambda received: received[0] if received else None
    answers = deque()

    def agreed(received):
        answers.append(parallel.maximum(received[0] if received else 0))
        number = int(answers.popleft()) if len(answers) > 1 else 0
        return signal.Signals(number) if number else None

    return agreed


def _receive(number, _frame):
    """The handler, in the main thread."""
    _State.received.append(signal.Signals(number))
    if not (_State.saving or _State.interruptible):
        _State.told.wait(0.5)
    if _State.starting:
        _end(exit_code(number))
    if _State.interruptible:
        _State.interruptible = False
        raise Interrupted
    if not _State.ends:
        if (not _State.saving and len(_State.received) == 1) or len(_State.received) > 2:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(128 + number)
    elif not _State.saving and len(_State.received) == 1:
        sys.exit(exit_code(number))


def _watch(pipe):
    """Tells of signals, and ends a process that cannot end itself; in a thread of its own."""
    numbers, told, deadline = [], False, None
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
                        _tell(numbers)
                        _State.told.set()
                if len(numbers) > 2 and _State.ends:
                    _end(130 if numbers[0] == signal.SIGINT else 128 + numbers[0])
            if numbers and deadline is None:
                deadline = time.monotonic() + PATIENCE
            if numbers and time.monotonic() >= deadline:
                if not _State.saving and not _State.saved and _State.ends:
                    # In the middle of a compilation, say.
                    _end(exit_code(numbers[0]))
                if _State.saving and not told:
                    say("the stop waits for the step, and then for the save: a step takes long here")
                told, deadline = True, time.monotonic() + PATIENCE


def _tell(numbers):
    name = signal.Signals(numbers[0]).name
    if not _State.saving:
        if len(numbers) == 1:
            say(f"\n{name} received: stopping; what was saved is kept")
    elif len(numbers) == 1:
        say(f"\n{name} received: finishing this step and saving")
    elif len(numbers) == 2:
        say("still saving: a third signal ends this at once, and loses the steps since the last save")


def leave(code) -> None:
    """Ends the process that a signal has stopped; returns where none came.

    The interpreter's own end would crash where compilations or input pipelines are still at work.
    """
    if _State.received and _State.ends:
        _end(code or 0)


def _end(code):
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
