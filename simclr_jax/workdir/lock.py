"""One run at a time in a workdir: `lock.json` tells that one is going on."""

import errno
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

from simclr_jax.process import files
from simclr_jax.process.console import escape, say
from simclr_jax.process.errors import RunError, UserError, is_storage_error, reason_of

BEAT = 5.0  # seconds between two signs of life in lock.json
SILENCE = 3 * BEAT  # without one, the run is taken for dead


def prepare(workdir) -> epath.Path:
    """Makes the folder, and finds out whether files can be written there; leaves nothing behind.

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

    `lock.json` names the process that has it, which shows every few seconds that it lives. One of this
    machine that does not is known at once; one of another, or behind gs://, once it has shown nothing
    for `SILENCE` seconds. What a crash leaves behind therefore stops nobody.

    Raises:
      UserError: another run has it.
      RunError: later, by `check`, once the folder is gone or another run has taken it.
    """
    path = epath.Path(workdir) / "lock.json"
    mine = {"id": uuid.uuid4().hex, "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), **_this_process()}
    with files.storage(path):
        while not _take(path, mine):
            _wait_until_free(workdir, path)
    stop, _failed[:], _held[:] = threading.Event(), [], [path] if files.is_local(path) else []
    beating = threading.Thread(target=_beat, args=(path, mine, stop), daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        _held.clear()
        beating.join(BEAT)
        with suppress(Exception):
            if files.read_json(path)["id"] == mine["id"]:
                path.unlink()
            path.parent.rmdir()  # where nothing came of the run


_failed: list[str] = []
_held: list[epath.Path] = []  # the lock, where looking for it costs nothing


def check() -> None:
    """Raises a RunError if the folder of this run has gone, or was taken by another one."""
    if _failed:
        raise RunError(_failed[0])
    if _held and not files.exists(_held[0].parent):
        raise RunError(_gone(_held[0], "No such file or directory"))


def _gone(lock, reason):
    return (
        f"{escape(lock.parent)}: {reason}, while this run was writing there; what was saved is where the "
        "folder is now, and the same command goes on once this is mended"
    )


def _take(path, mine) -> bool:
    """Writes the lock where there is none; returns whether it is ours."""
    if files.is_local(path):
        unfinished = Path(f"{path}.{mine['id']}.tmp")
        try:  # a link to a whole file: nobody reads half a lock, and only one of two makes it
            unfinished.write_text(json.dumps(mine))
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
    files.write_json(path, mine)
    time.sleep(0.0 if files.is_local(path) else 2.0)  # of two that wrote at once, the last one has it
    return _owner(path).get("id") == mine["id"]


def _wait_until_free(workdir, path):
    """Removes a lock whose run is dead; raises a UserError where it lives."""
    owner = _owner(path)
    if not _is_alive(owner):
        begun, beat = time.monotonic(), owner
        if not owner.get("dead"):
            say(f"{escape(path)} tells of a run that may live: waiting {SILENCE:.0f} s for a sign of it")
        while not owner.get("dead") and time.monotonic() - begun < SILENCE:
            time.sleep(BEAT / 5)
            if not files.exists(path):
                return
            if (now := _owner(path)) != beat:
                owner, beat = now, now
                break
        else:
            with suppress(FileNotFoundError):  # by a name of its own: of two that try, one removes it
                gone = path.rename(path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
                gone.unlink()
            return
    raise UserError(
        f"{escape(workdir)} is in use by process {owner.get('pid', '?')} on {escape(owner.get('host', '?'))} "
        f"since {escape(owner.get('since', '?'))}: wait for it or stop it, or choose another --workdir"
    )


def _owner(path) -> dict:
    """What a lock tells; a damaged one tells of nobody."""
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return {}


def _is_alive(owner) -> bool:
    """Whether the process lives for sure; marks what is known to be dead."""
    here = _this_process()
    if any(owner.get(key) != here[key] for key in ("host", "boot", "namespace")) or not here["boot"]:
        return False
    if _started(owner.get("pid")) == owner.get("started"):
        return True
    owner["dead"] = True
    return False


def _this_process() -> dict[str, Any]:
    """Who this process is, so that another one of the machine can tell whether it still lives."""
    pid, boot, namespace = os.getpid(), "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _started(pid),
        "boot": boot,
        "namespace": namespace,
    }


def _started(pid) -> str:
    """When a process began, in ticks since the machine did; '' for none."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, TypeError, ValueError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _beat(path, mine, stop):
    """Shows that this run lives; notes what makes that impossible."""
    beats = 0
    while not stop.wait(BEAT):
        beats += 1
        try:
            owner = _owner(path)  # of nobody where the lock was lost: it is written anew
            if owner and owner.get("id") != mine["id"]:
                _failed.append(
                    f"{escape(path.parent)} was taken by process {owner.get('pid')} on "
                    f"{escape(owner.get('host'))} while this one was held up: it goes on there"
                )
                return
            files.write_json(path, mine | {"beats": beats})
        except Exception as error:
            if stop.is_set():
                return
            cause = error.__cause__ or error
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # the next save will tell
                continue
            _failed.append(_gone(path, reason_of(cause)))
            return
