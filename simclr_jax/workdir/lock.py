"""One run at a time in a workdir: `lock.json` names the process that is running there."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from etils import epath

from simclr_jax.process import RunError, UserError, escape, files, reason_of, say
from simclr_jax.process.errors import is_full, is_storage_error

BEAT = 5.0  # Seconds between two heartbeats in lock.json.
SILENCE = 3 * BEAT  # Seconds without a heartbeat after which a run counts as dead.


def prepare(workdir) -> epath.Path:
    """Makes the folder, and checks by a trial file that files can be written there.

    Raises:
      UserError: it is no folder, cannot be made, or cannot be written to.
    """
    workdir = epath.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for folder in (workdir, workdir / "checkpoints"):
            if folder is workdir or folder.exists():
                trial = folder / f".{uuid.uuid4().hex[:8]}.tmp"
                trial.write_bytes(b"1")
                trial.unlink()
    except Exception as error:
        if not is_storage_error(error) and "null" not in str(error):
            raise
        place = getattr(error, "filename", None) or workdir
        raise UserError(
            f"workdir {escape(workdir)} cannot be written to ({escape(place)}: {reason_of(error)}): "
            "choose another --workdir, or mend this one"
        ) from None
    return workdir


@contextmanager
def locked(workdir) -> Iterator[None]:
    """Keeps other runs out of a folder for as long as this one lives.

    `lock.json` names the owner, which renews it every few seconds, so that the lock of a crashed run stops
    nobody: a dead owner on this machine is recognised at once, on another machine or behind gs:// after
    `SILENCE` seconds without a heartbeat.

    Raises:
      UserError: another run has the folder.
      RunError: later, by `check`, once the folder is gone or another run has taken it.
    """
    path = epath.Path(workdir) / "lock.json"
    claim = {"id": uuid.uuid4().hex, "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), **_this_process()}
    with files.storage(path):
        while not _take(path, claim):
            check_free(workdir)
            with suppress(FileNotFoundError):  # renamed first, since only one of two runs can do that
                path.rename(path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.tmp").unlink()
    stop = threading.Event()
    _failures.clear()
    if files.is_local(path):
        _local_folders[path.parent] = os.open(path.parent, os.O_RDONLY)
    beating = threading.Thread(target=_beat, args=(path, claim, stop), daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        if files.is_local(path):
            os.close(_local_folders.pop(path.parent))
        beating.join(BEAT)
        with suppress(Exception):
            if files.read_json(path)["id"] == claim["id"]:
                path.unlink()
            path.parent.rmdir()  # only succeeds where the run has written nothing


_failures: list[str] = []  # the reason why this run has lost its lock, if it has
_local_folders: dict[epath.Path, int] = {}  # the open folder of this run, if it is local


def check() -> None:
    """Raises a RunError if the folder of this run has gone, or was taken by another one."""
    if _failures:
        raise RunError(_failures[0])
    for folder, descriptor in _local_folders.items():
        try:  # a save in the background may have made a folder of that name again
            same = os.path.samestat(os.stat(folder), os.fstat(descriptor))
            reason = "" if same else "another folder has its name now"
        except OSError as error:
            reason = reason_of(error)
        if reason:
            raise RunError(_lost_folder_message(folder, reason))


def _lost_folder_message(folder, reason):
    return (
        f"{escape(folder)}: {reason}, while this run was writing there; what was saved is where the "
        "folder is now, and the same command goes on once this is mended"
    )


def _take(path, claim) -> bool:
    """Writes the lock where there is none; returns whether this run has it."""
    if files.is_local(path):
        unfinished = Path(f"{path}.{claim['id']}.tmp")
        try:  # a link is there at once with all of the file, and only one of two runs can make it
            unfinished.write_text(json.dumps(claim))
            os.link(unfinished, path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if files.exists(path):
                return False
        finally:
            unfinished.unlink(missing_ok=True)
    elif path.exists():
        return False
    files.write_json(path, claim)
    time.sleep(0.0 if files.is_local(path) else 2.0)  # if two wrote at the same time, the last one has it
    return files.read_if_whole(path).get("id") == claim["id"]


def check_free(workdir) -> None:
    """Raises a UserError if a run that lives has the folder."""
    path = epath.Path(workdir) / "lock.json"
    if not files.exists(path):
        return
    owner = files.read_if_whole(path)
    alive = _is_alive(owner)
    if alive is None:
        say(f"{escape(path)} names a run that may still live: waiting {SILENCE:.0f} s for a sign of it")
        before, deadline = owner, time.monotonic() + SILENCE
        while owner == before and time.monotonic() < deadline:
            time.sleep(BEAT / 5)
            if not files.exists(path):
                return
            owner = files.read_if_whole(path)
        alive = owner != before
    if alive:
        raise UserError(
            f"{escape(workdir)} is in use by process {owner.get('pid', '?')} on "
            f"{escape(owner.get('host', '?'))} since {escape(owner.get('since', '?'))}: wait for it or stop "
            "it, or choose another --workdir"
        )


def holder(workdir) -> tuple[dict[str, Any], bool]:
    """Returns the owner of a folder's lock, {} without one, and whether one look shows that it lives."""
    path = epath.Path(workdir) / "lock.json"
    if not files.exists(path):
        return {}, False
    owner = files.read_if_whole(path)
    alive = _is_alive(owner)
    return owner, time.time() - path.stat().mtime < 2 * SILENCE if alive is None else alive


def _is_alive(owner) -> bool | None:
    """Returns whether the owner of a lock lives; None where only its heartbeats can tell."""
    this = _this_process()
    if any(owner.get(key) != this[key] for key in ("host", "boot", "namespace")) or not this["boot"]:
        return None
    return _started(owner.get("pid")) == owner.get("started")


def _this_process() -> dict[str, Any]:
    """Describes this process, so that another one on the same machine can tell whether it still lives."""
    process = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    process |= {"boot": "", "namespace": ""}
    with suppress(OSError):
        process["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        process["namespace"] = os.readlink("/proc/self/ns/pid")
    return process


def _started(pid) -> str:
    """Returns when a process began, in ticks since the machine started; '' if there is no such process."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, TypeError, ValueError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _beat(path, claim, stop):
    """Renews the lock until `stop` is set, and notes why where that fails; runs in a thread."""
    beats = 0
    while not stop.wait(BEAT):
        beats += 1
        try:
            owner = files.read_if_whole(path)  # a lost lock has none, and is written again
            if owner and owner.get("id") != claim["id"]:
                _failures.append(
                    f"{escape(path.parent)} was taken by process {owner.get('pid')} on "
                    f"{escape(owner.get('host'))} while this one was held up: it goes on there"
                )
                return
            files.write_json(path, claim | {"beats": beats})
        except Exception as error:
            if stop.is_set():
                return
            cause = error.__cause__ or error
            if is_full(cause):  # the next save reports it
                continue
            _failures.append(_lost_folder_message(path.parent, reason_of(cause)))
            return
