"""Files written in one piece on any file system, and errors of storage in one line."""

import atexit
import csv
import functools
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from etils import epath

from simclr_jax.process import trial
from simclr_jax.process.console import escape
from simclr_jax.process.errors import RunError, UserError, is_full, is_storage_error, reason_of

STORAGE_TIMEOUT = 25  # Seconds in which storage has to answer before a run begins.
_PORTABLE = re.compile(r"[\w/.,:=@+ -]*", re.ASCII)


class StorageError(RunError):
    """Files could not be read or written, although the request was right."""


@contextmanager
def storage(path) -> Iterator[None]:
    """Turns errors of storage raised inside into one line that names the path.

    Raises:
      StorageError: in the place of OSError and of the errors of TensorFlow and TensorStore.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_storage_error(error):
            raise
        mended = "there is room" if is_full(error) else "this is mended"
        raise StorageError(
            f"{escape(user_path(path))}: {reason_of(error)}; what was saved is kept, and the same command "
            f"goes on once {mended}"
        ) from error


@contextmanager
def writing(path) -> Iterator[Any]:
    """Opens a binary file that gets its name only once it is complete."""
    if trial.active:
        yield io.BytesIO()
        return
    path = _local_or_remote(path)
    unfinished = path.parent / f".{path.name[:100]}.{uuid.uuid4().hex[:8]}.tmp"
    with storage(path):
        try:
            with unfinished.open("wb") as file:
                yield file
            unfinished.replace(path)
        except BaseException:
            with suppress(Exception):
                unfinished.unlink(missing_ok=True)
            raise


def write_text(path, text: str) -> None:
    """Writes a small file in one piece."""
    with writing(path) as file:
        file.write(text.encode())


def write_json(path, value: Any, **options) -> None:
    """Writes a JSON file in one piece."""
    with writing(path) as file:  # It is written piece by piece, since it may list a million images.
        text = io.TextIOWrapper(file, "utf-8")
        json.dump(value, text, **options)
        text.write("\n")
        text.detach()


def write_csv(path, rows: Iterable[Iterable[Any]]) -> None:
    """Writes a CSV file in one piece, with the mark by which spreadsheets take it as UTF-8."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, f"\ufeff{text.getvalue()}")


def holds_predictions(path) -> bool:
    """Returns whether a CSV file is one that `predict` has written, and that spreadsheets may have saved."""
    head = ""
    with suppress(Exception), _local_or_remote(path).open("rb") as file:  # Its reader tells what is wrong.
        head = file.readline().decode("utf-8-sig", "replace")
    cells = {cell.strip('" ').casefold() for cell in re.split("[,;\t\r\n]", head)}
    return {"name", "label", "probability", "margin"} <= cells


def csv_name(name: str) -> str:
    """Returns the name of an image, with ./ in front where a spreadsheet would trim it or compute it."""
    return f"./{name}" if re.match(r"[\s=+\-@']", name) else name


def read_json(path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      ValueError: the file is no JSON, incomplete, not UTF-8, or its value is no object.
      OSError: it cannot be read.
    """
    value = json.loads(_local_or_remote(path).read_bytes().decode())
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__} instead of a dict")
    return value


def read_if_whole(path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one where it is missing or damaged."""
    with suppress(OSError, ValueError):
        return read_json(path)
    return {}


def set_aside(path) -> epath.Path:
    """Renames a damaged file, so that it is neither read nor lost; returns the new path."""
    path = epath.Path(path)
    if trial.active:
        return path
    with storage(path):
        return path.rename(free_path(path.with_name(f"{path.name}.damaged"), separator=""))


def free_path(path: epath.Path, separator: str = "-") -> epath.Path:
    """Returns `path`, or where that exists the first of PATH-2, PATH-3 and so on that does not."""
    others = (path.with_name(f"{path.name}{separator}{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], others) if not exists(candidate))


def check_new(folder) -> None:
    """Raises a UserError if there is anything under `folder`, so that no output overwrites another."""
    folder = epath.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{escape(user_path(folder))} exists already: choose another --output, or remove it")


def exists(path) -> bool:
    """Returns whether anything has this name, be it a link that leads nowhere."""
    return os.path.lexists(path) if is_local(path) else epath.Path(path).exists()


def is_local(path) -> bool:
    """Returns whether a path is of this machine's file system."""
    return "://" not in os.fspath(path)


def _local_or_remote(path) -> Path | epath.Path:
    """Returns a path to read and write.

    Local ones are pathlib's: etils' could be mocked by tests of other libraries while a lock is renewed.
    """
    return Path(path) if is_local(path) else epath.Path(path)


@functools.cache
def portable_path(path) -> epath.Path:
    """Returns a path to `path` that every library takes.

    Orbax takes brackets for patterns; TensorStore and TensorFlow take UTF-8 only. A path with such a name
    is reached through a symbolic link.
    """
    path = epath.Path(path)
    if not is_local(path) or _PORTABLE.fullmatch(os.path.abspath(path)):
        return path
    link = Path(_link_folder(), uuid.uuid4().hex)
    link.symlink_to(os.path.abspath(path))
    return epath.Path(link)


def user_path(path) -> str:
    """Returns the user's name for a path that `portable_path` may have given another name."""
    path = os.fspath(path)
    if not path.startswith(f"{_link_folder()}/"):
        return path
    link, _, rest = path.removeprefix(f"{_link_folder()}/").partition("/")
    return os.path.join(os.readlink(os.path.join(_link_folder(), link)), rest).rstrip("/")


@functools.cache
def _link_folder():
    folder = tempfile.mkdtemp(prefix="simclr-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_reachable(path) -> None:
    """Raises a UserError unless remote storage answers within `STORAGE_TIMEOUT` seconds."""
    if is_local(path):
        return
    reasons = [f"no answer in {STORAGE_TIMEOUT} s"]

    def ask():
        try:
            epath.Path(path).exists()
            reasons.append("")
        except Exception as error:
            reasons.append(reason_of(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(STORAGE_TIMEOUT)
    if reason := reasons[-1]:
        raise UserError(f"{escape(path)}: {reason}; check the path, the network and your credentials")
