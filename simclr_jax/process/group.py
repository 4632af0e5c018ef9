"""The processes of a run: how they join, agree on values and on stops, and end together.

JAX joins them. Its coordination service on process 0 also keeps their messages: values that one process
hands to the others, and heartbeats.
"""

import atexit
import itertools
import json
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from simclr_jax import parallel
from simclr_jax.process import console, launchers, relay, stopping
from simclr_jax.process.console import escape
from simclr_jax.process.errors import RunError, UserError, reason_of

BEAT = 2.0  # Seconds between two heartbeats.
SILENCE = 16.0  # Seconds without a heartbeat after which a process counts as dead; jax aborts after 100.
SILENCE_AT_END = 300.0  # The same for a process that has announced its end: others may get there later.
PATIENCE = 15  # Seconds for joining where nothing shows that a launcher started this process.
_GOES_ON = "the run ends here, what was saved is kept, and the same command goes on"

_ending = threading.Event()  # this process is about to end
_run_over = threading.Event()  # set once this process has announced the end of the run
_message_numbers = itertools.count()  # processes send and read messages in the same order


def join(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Joins the processes of a run; to be called before anything uses a device.

    Cloud TPU and Slurm tell each process its number; elsewhere the three arguments do. Without either,
    this process is the whole run. From then on the end of any process ends the others, with a line that says
    why.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: how many processes the run has; 1 suffices, whatever launcher the environment names.
      process_id: number of this process, from 0.
      timeout: seconds in which all of them have to join.

    Raises:
      UserError: some do not join in time.
    """
    if num_processes == 1 and not coordinator_address:
        return
    launcher = None if coordinator_address else launchers.find()
    remedy, started = launcher or ("start each with the same flags, but a --process_id of its own", True)
    timeout = timeout if started else min(timeout, PATIENCE)
    limit = f"{timeout} s (--join_timeout)" if started else f"{timeout} s"
    joined, address = threading.Event(), coordinator_address
    arguments = joined, address, num_processes, process_id, timeout, f"{limit}: {remedy}"
    threading.Thread(target=_watch_joining, args=arguments, daemon=True).start()
    try:
        if address and process_id:
            console.be_silent()
            address = relay.start(address, partial(_end_without_coordinator, address))
        jax.distributed.initialize(address, num_processes, process_id, initialization_timeout=timeout + 60)
    except Exception as error:  # Kubernetes raises errors of its own
        if not coordinator_address and "coordinator_address" in str(error):
            return
        raise UserError(f"the processes cannot join ({reason_of(error)}): {remedy}") from None
    finally:
        joined.set()
        stopping.retake_signals()
    if alone():
        return
    if jax.process_index():
        console.be_silent()
    check_agreement("command", {"--num_processes": num_processes})
    atexit.register(_ending.set)
    threading.Thread(target=_watch, args=(coordinator_address, jax.process_count()), daemon=True).start()


def _watch_joining(joined, address, count, index, timeout, remedy):
    """Says whom this process waits for, until it has joined, and ends it after `timeout` seconds."""
    begun = time.monotonic()
    for seconds in (*(moment for moment in (5, *range(30, timeout, 30)) if moment < timeout), timeout + 2):
        if joined.wait(max(0.0, begun + seconds - time.monotonic())):
            return
        count, index = count or _distributed().num_processes, index or _distributed().process_id
        place = escape(address or _distributed().coordinator_address or "an address yet unknown")
        whom = "process 0" if index else f"{count - 1} other processes" if count else "other processes"
        if seconds < timeout:
            print(f"waiting for {whom} at {place}, {seconds} s of {remedy}", flush=True)
    missing = "no process 0" if index else f"{count or 'several'} processes were to join"
    _end(f"error: {missing} at {place}, or not all are there after {remedy}", 2)


def run_on_first(function: Callable[[], Any]) -> Any:
    """Calls `function()` on process 0, and returns its value, or raises its UserError, on all processes.

    The value has to be one that JSON can hold.
    """
    if jax.process_count() == 1:
        return function()
    number = next(_message_numbers)
    if jax.process_index() > 0:
        message = _read(number, 0)
        if message["error"] is not None:
            raise (UserError if message["code"] == 2 else RunError)(message["error"])
        return message["value"]
    try:
        value = function()
    except UserError as error:
        _send(number, {"error": str(error), "code": error.exit_code})
        raise
    _send(number, {"error": None, "value": value})
    return value


def check_agreement(subject: str, values: dict[str, Any]) -> None:
    """Raises a UserError unless all processes have the same values; every process has to call it.

    Args:
      subject: a noun for the values, for the message.
      values: a flat dictionary of values that JSON can hold.
    """
    if jax.process_count() == 1:
        return
    number = next(_message_numbers)
    _send(number, values)
    first = _read(number, 0)
    for index in range(1, jax.process_count()):
        other = _read(number, index)
        differing = [
            f"{key} is {other.get(key)!r} there and {first.get(key)!r} on process 0"
            for key in sorted(other | first)
            if other.get(key) != first.get(key)
        ]
        if differing:
            raise UserError(
                f"process {index} has another {subject} ({escape('; '.join(differing[:3]))[:400]}): start "
                "all processes of a run with the same command on the same files"
            )


def make_stop_agreement() -> Callable[[list[signal.Signals]], signal.Signals | None]:
    """Builds `agreed(received) -> signal or None`, by which processes agree after each step whether to stop.

    With several processes the answer is that of the step before, so that none waits for the others.
    """
    if jax.process_count() == 1:
        return lambda received: received[0] if received else None
    answers = deque()

    def agreed(received):
        answers.append(parallel.maximum(received[0] if received else 0))
        number = int(answers.popleft()) if len(answers) > 1 else 0
        return signal.Signals(number) if number else None

    return agreed


def announce_end() -> None:
    """Tells the other processes that the run is over here, so that silence of this one is no failure."""
    if alone():
        return
    _run_over.set()
    _beat({"through": True})


def alone() -> bool:
    """Returns whether this is the only process of the run, without starting a device."""
    return _client() is None or jax.process_count() == 1


def leave(line: str, code: int) -> None:
    """Ends this process and, with the same line and code, the others; returns where there are none."""
    if alone():
        return
    _ending.set()
    _beat({"left": line, "code": code})
    time.sleep(BEAT + 1)  # the others read the heartbeats once in BEAT seconds
    console.end_process(code)


def wait_for_other_processes() -> None:
    """Waits until it is known whether the end of another process caused the present error.

    If so, `_watch` ends this process in the meantime. Returns where all other processes live.
    """
    if not alone():
        time.sleep(SILENCE + 3 * BEAT)


def _watch(address, count):
    """Sends the heartbeats of this process, and ends it when another one dies; runs in a thread."""
    newest, since = {}, {}  # the newest heartbeat of each process, and when it came
    number = 0
    while not _ending.wait(BEAT):
        number += 1
        try:
            _beat({"number": number, "through": _run_over.is_set()})
            beats = dict(_client().key_value_dir_get("simclr/alive"))
        except Exception as error:
            if not _ending.is_set():
                where = f" at {escape(address)}" if address else ""
                _end(f"error: process 0{where} is gone ({reason_of(error, 60)}): {_GOES_ON}")
            return
        now = time.monotonic()
        for index in range(count):
            key = f"simclr/alive/{index}"
            beat = next((value for name, value in beats.items() if name.endswith(key)), None)
            if beat != newest.get(index, ""):
                newest[index], since[index] = beat, now
            message = json.loads(beat) if beat else {}
            if "left" in message and not _ending.is_set():
                _end(f"process {index} ended: {message['left']}", message["code"])
            silence = now - since[index]
            if silence > (SILENCE_AT_END if message.get("through") else SILENCE) and not _ending.is_set():
                host = f" on {escape(message['host'])}" if "host" in message else ""
                line = f"error: process {index}{host} is gone, silent for {silence:.0f} s: {_GOES_ON}"
                _beat({"left": line, "code": 1})
                _end(line)


def _beat(message):
    message = json.dumps({"host": socket.gethostname(), **message})
    _client().key_value_set(f"simclr/alive/{_distributed().process_id}", message, allow_overwrite=True)


def _end_without_coordinator(address, error):
    """Ends this process after the relay has lost the connection to process 0, by an error or None."""
    if not _ending.is_set():
        time.sleep(0.5)  # time for `_watch` to end this process with the reason that process 0 sent
        reason = f" ({reason_of(error)})" if error else ""
        _end(f"error: process 0 at {escape(address)} is gone{reason}: {_GOES_ON}")


def _end(line, code=1):
    """Ends this process at once, with a line."""
    _ending.set()
    print(line, file=sys.stderr, flush=True)
    console.end_process(code)


def _distributed():
    # jax has no public name for it; jax.process_index() would start the backend, from any thread.
    from jax._src import distributed

    return distributed.global_state


def _client():
    return _distributed().client


def _send(number, value):
    """Leaves a message for the other processes."""
    _client().key_value_set(f"simclr/{number}/{jax.process_index()}", json.dumps(value))


def _read(number, index):
    """Waits for a message of process `index` and returns it; if that process dies, `_watch` ends this one."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(f"simclr/{number}/{index}", 10_000))
        except Exception as error:
            if "DEADLINE" not in str(error):
                wait_for_other_processes()
                raise RunError(f"process {index} does not answer: {reason_of(error)}") from None
