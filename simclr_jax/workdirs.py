"""The folder of a run: one run at a time, its config, its summary.

`config.json` tells whose run it is, `summary.json` that it is over, `lock.json` that it is going on.
"""

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
from flax.traverse_util import unflatten_dict

from simclr_jax import files, shipped
from simclr_jax.console import say, shown
from simclr_jax.errors import RunError, UserError, is_of_storage, reason_of

SCHEMA_VERSION = 1  # of config.json and of the meta of checkpoints; older ones have none
BEAT = 5.0  # seconds between two signs of life in lock.json
SILENCE = 3 * BEAT  # without one, the run is taken for dead

# What may differ between a run and its continuation: it changes neither the model nor what it sees.
_FREE_KEYS = ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "dataset.data_dir")
_FREE_KEYS += ("microbatches", "remat", "augment.on_device", "augment.crop_dtype")  # as machines need them
_FREE_KEYS += ("profile_steps", "tracker", "evaluate.pictures", "keep_compiled")


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
        if not is_of_storage(error) and "null" not in str(error):
            raise
        place = getattr(error, "filename", None) or workdir
        raise UserError(
            f"workdir {shown(workdir)} cannot be written to ({shown(place)}: {reason_of(error)}): "
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
        f"{shown(lock.parent)}: {reason}, while this run was writing there; what was saved is where the "
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
            say(f"{shown(path)} tells of a run that may live: waiting {SILENCE:.0f} s for a sign of it")
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
        f"{shown(workdir)} is in use by process {owner.get('pid', '?')} on {shown(owner.get('host', '?'))} "
        f"since {shown(owner.get('since', '?'))}: wait for it or stop it, or choose another --workdir"
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
                    f"{shown(path.parent)} was taken by process {owner.get('pid')} on "
                    f"{shown(owner.get('host'))} while this one was held up: it goes on there"
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


def check_config(workdir, config: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
    """Raises a UserError if `workdir` holds a run with another config than this resolved one.

    Args:
      workdir: of the run.
      config: resolved.
      defaults: values of keys that a run of an earlier version may lack.
    """
    path = epath.Path(workdir) / "config.json"
    if not files.exists(path):
        return
    ours = flatten(json.loads(json.dumps(config)))  # as it would be saved: lists where it has tuples
    saved = flatten(json.loads(json.dumps(defaults or {}))) | flatten(read_config(workdir))
    differing = [
        f"{key} is {saved.get(key)!r} there and {ours[key]!r} here"
        for key in sorted(ours)
        if saved.get(key) != ours[key] and key not in _FREE_KEYS
    ]
    if differing:
        raise UserError(
            f"{shown(workdir)} holds a run with another config ({shown('; '.join(differing))}): "
            "choose another --workdir, or the settings of that run to continue it"
        )


def read_config(workdir) -> dict[str, Any]:
    """The config of the run in `workdir`, as saved.

    Raises:
      UserError: there is none, it is damaged, or of a later version.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        config = files.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{shown(workdir)} holds no config.json: give the workdir of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{shown(path)} is damaged ({reason_of(error)}): the checkpoints beside it hold the config too; "
            "move config.json away, and start with the settings of that run"
        ) from None
    check_schema(path, config)
    config.pop("schema_version", None)
    return config


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A saved config, with the defaults of keys that its version had not yet.

    The config of an official checkpoint has no dataset and tells of the network alone: nothing is added to
    how it was trained.
    """
    base, config = shipped.base(), dict(config)
    if config.get("task", "") in ("", "pretrain"):
        defaults = base.pretrain()
    else:
        defaults = getattr(base, config["task"])(base.pretrain())
    defaults = defaults.to_dict() if "dataset" in config else {"model": defaults.model.to_dict()}
    flat = flatten(defaults) | flatten(config)
    return unflatten_dict({tuple(key.split(".")): value for key, value in flat.items()})


def check_schema(path, saved: dict[str, Any]) -> None:
    """Raises a UserError where a later version of this program has written `saved`."""
    version = saved.get("schema_version", 0)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UserError(
            f"{shown(path)} is of schema version {shown(version)}, and this program knows up to "
            f"{SCHEMA_VERSION}: update it"
        )


def save_config(workdir, config: dict[str, Any]) -> None:
    """Writes the resolved config beside the checkpoints, in one piece."""
    workdir = epath.Path(workdir)
    with files.storage(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "config.json", {"schema_version": SCHEMA_VERSION, **config}, indent=2)


def read_summary(workdir) -> dict[str, Any] | None:
    """The summary of a run that is over; None of one that is not. A damaged one is set aside."""
    path = epath.Path(workdir) / "summary.json"
    if not files.exists(path):
        return None
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        aside = files.set_aside(path)
        print(
            f"note: {shown(path)} is damaged ({reason_of(error)}): now {aside.name}, measuring again",
            flush=True,
        )
        return None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
