"""The processes of a run: how they join, how they find out that they are one run, and what ends them all.

JAX joins them, and keeps the notes here through which they tell one another what only one of them knows.
"""

import atexit
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from simclr_jax.process import console, relay, stopping
from simclr_jax.process.console import escape
from simclr_jax.process.errors import RunError, UserError, reason_of

BEAT = 2.0  # seconds between two signs of life
SILENCE = 16.0  # without one, a process is taken for dead; jax itself waits for 100 and aborts
PARTING = 300.0  # ... unless it had said that it is through: others may take longer to get there
_ended = threading.Event()  # this process is on its way out
_through = threading.Event()  # the run is over, for all processes
_numbers = itertools.count()  # of notes, alike in all processes


def join(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Joins the processes of a run; call it before anything uses a device.

    Cloud TPU and Slurm tell each process who it is; elsewhere the three arguments do. Where nobody tells,
    this process is the whole run. From then on the end of any process ends the others, in a line.

    Args:
      timeout: seconds in which all of them have to be there.

    Raises:
      UserError: not all of them are.
    """
    joined = threading.Event()
    if coordinator_address:
        if process_id:
            console.be_silent()
            local = relay.start(coordinator_address, timeout, _lost_coordinator(coordinator_address))
            options = {"coordinator_address": local}
        else:
            options = {"coordinator_address": coordinator_address}

        def give_up():
            if not joined.wait(timeout + 2):
                _leave_at_once(
                    f"error: {num_processes} processes were to join at {escape(coordinator_address)}, but "
                    f"not all are there after {timeout} s (--join_timeout): start each with the same "
                    "--num_processes and a --process_id of its own",
                    2,
                )

        threading.Thread(target=give_up, daemon=True).start()
    else:
        options = {}
    try:
        jax.distributed.initialize(
            **options,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=timeout + 60 if coordinator_address else timeout,
        )
    except ValueError as error:
        if coordinator_address or "coordinator_address" not in str(error):
            raise UserError(f"the processes cannot join: {reason_of(error)}; check the three flags") from None
        return
    except RuntimeError as error:
        raise UserError(
            f"the processes cannot join at {escape(coordinator_address or 'the coordinator')}: "
            f"{reason_of(error)}; check --coordinator_address, --num_processes and --process_id"
        ) from None
    finally:
        joined.set()
        stopping.renew()
    if alone():
        return
    if jax.process_index():
        console.be_silent()
    number = next(_numbers)
    _put(number, num_processes)
    if (count := _get(number, 0)) != num_processes:
        raise UserError(
            f"--num_processes={num_processes} here, but {count} on process 0: start all with the same"
        )
    atexit.register(_ended.set)
    threading.Thread(target=_watch, args=(coordinator_address, jax.process_count()), daemon=True).start()


def run_on_first(function: Callable[[], Any]) -> Any:
    """What `function()` returns or raises on process 0, on all of them; JSON and UserErrors can travel."""
    if jax.process_count() == 1:
        return function()
    number = next(_numbers)
    if jax.process_index() > 0:
        note = _get(number, 0)
        if note["error"] is not None:
            raise (UserError if note["code"] == 2 else RunError)(note["error"])
        return note["value"]
    try:
        value = function()
    except UserError as error:
        _put(number, {"error": str(error), "code": error.exit_code})
        raise
    _put(number, {"error": None, "value": value})
    return value


def check_agreement(what: str, ours: dict[str, Any]) -> None:
    """Raises a UserError unless all processes have the same values; every process has to ask.

    Args:
      what: they are of, for the message.
      ours: flat, of what JSON can hold.
    """
    if jax.process_count() == 1:
        return
    number = next(_numbers)
    _put(number, ours)
    first = _get(number, 0)
    for index in range(1, jax.process_count()):
        theirs = _get(number, index)
        differing = [
            f"{key} is {theirs.get(key)!r} there and {first.get(key)!r} on process 0"
            for key in sorted(theirs | first)
            if theirs.get(key) != first.get(key)
        ]
        if differing:
            raise UserError(
                f"process {index} has another {what} ({escape('; '.join(differing[:3]))[:400]}): start all "
                "processes of a run with the same command on the same files"
            )


def part() -> None:
    """Tells the others that this process is through, as they all are about to be: it may be silent now."""
    if alone():
        return
    _through.set()
    _beat({"through": True})


def alone() -> bool:
    """Whether this is the only process of the run; brings no devices up to know it."""
    return _client() is None or jax.process_count() == 1


def leave(line: str, code: int) -> None:
    """Ends this process, and the others with it; returns where there are none."""
    if alone():
        return
    _ended.set()
    _beat({"left": line, "code": code})
    time.sleep(BEAT + 1)  # the others look once in a BEAT
    _exit(code)


def wait_for_verdict() -> None:
    """After an error that the end of another process may have caused: waits until that is known.

    Then this process ends in one line. Returns where all others live.
    """
    if not alone():
        time.sleep(SILENCE + 3 * BEAT)


def _watch(address, count):
    """Shows that this process lives, and ends it when another one does not."""
    seen, since = {}, {}
    number = 0
    while not _ended.wait(BEAT):
        number += 1
        try:
            _beat({"number": number, "through": _through.is_set()})
            notes = dict(_client().key_value_dir_get("simclr/alive"))
        except Exception as error:
            if not _ended.is_set():
                where = f" at {escape(address)}" if address else ""
                _leave_at_once(f"error: process 0{where} is gone ({reason_of(error, 60)}): {_GOES_ON}")
            return
        now = time.monotonic()
        for index in range(count):
            key = f"simclr/alive/{index}"
            note = next((value for name, value in notes.items() if name.endswith(key)), None)
            if note != seen.get(index, ""):
                seen[index], since[index] = note, now
            told = json.loads(note) if note else {}
            if "left" in told and not _ended.is_set():
                _leave_at_once(f"process {index} ended: {told['left']}", told["code"])
            silent = now - since[index]
            if silent > (PARTING if told.get("through") else SILENCE) and not _ended.is_set():
                host = f" on {escape(told['host'])}" if "host" in told else ""
                line = f"error: process {index}{host} is gone, silent for {silent:.0f} s: {_GOES_ON}"
                _beat({"left": line, "code": 1})
                _leave_at_once(line)


_GOES_ON = "the run ends here, what was saved is kept, and the same command goes on"


def _beat(note):
    note = json.dumps({"host": socket.gethostname(), **note})
    _client().key_value_set(f"simclr/alive/{_index()}", note, allow_overwrite=True)


def _lost_coordinator(address):
    """Builds the relay's `on_loss`, which ends this process in a line."""

    def on_loss(error):
        if not _ended.is_set():
            time.sleep(0.5)  # process 0 may have told why it left
            why = f" ({reason_of(error)})" if error else ""
            _leave_at_once(f"error: process 0 at {escape(address)} is gone{why}: {_GOES_ON}")

    return on_loss


def _leave_at_once(line, code=1):
    _ended.set()
    print(line, file=sys.stderr, flush=True)
    _exit(code)


def _exit(code):
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # what threads and jax wait for will not come


def _client():
    from jax._src import distributed  # jax has no public name for it; Orbax takes it from here too

    return distributed.global_state.client


def _index():
    from jax._src import distributed  # from any thread: jax.process_index() may start the backend

    return distributed.global_state.process_id


def _put(number, value):
    _client().key_value_set(f"simclr/{number}/{jax.process_index()}", json.dumps(value))


def _get(number, index):
    """What a process put there; where it cannot come any more, `_watch` ends this one."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(f"simclr/{number}/{index}", 10_000))
        except Exception as error:
            if "DEADLINE" not in str(error):
                wait_for_verdict()
                raise RunError(f"process {index} does not answer: {reason_of(error)}") from None
