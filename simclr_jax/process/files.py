"""One way to write a file in one piece, on any file system; one way to say that storage failed."""

import atexit
import functools
import json
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from etils import epath

from simclr_jax.process.console import escape
from simclr_jax.process.errors import RunError, UserError, is_of_storage, reason_of

REACHED_WITHIN = 25  # seconds that storage has to answer in, before a run
_PLAIN = re.compile(r"[\w/.,:=@+ -]*", re.ASCII)


class StorageError(RunError):
    """Files could not be read or written, though nothing is wrong with what was asked for."""


@contextmanager
def storage(path) -> Iterator[None]:
    """Says in one line of which path storage failed, whatever raised inside.

    Raises:
      StorageError: in the place of OSError and of the errors of TensorFlow and TensorStore.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_of_storage(error):
            raise
        raise StorageError(
            f"{escape(named(path))}: {reason_of(error)}; what was saved is kept, and the same command goes "
            "on once this is mended"
        ) from error


@contextmanager
def writing(path) -> Iterator[Any]:
    """Opens a binary file that is there under its name only when all is written."""
    path = _at(path)
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
    write_text(path, json.dumps(value, **options) + "\n")


def read_json(path, kind: type = dict) -> Any:
    """The value in a JSON file.

    Raises:
      ValueError: the file is none, cut short, no UTF-8, or holds something else than a `kind`.
      OSError: it cannot be read.
    """
    value = json.loads(_at(path).read_bytes().decode())
    if not isinstance(value, kind):
        raise ValueError(f"holds a {type(value).__name__} instead of a {kind.__name__}")
    return value


def set_aside(path) -> epath.Path:
    """Renames what is damaged, so that it is neither read nor lost; returns where it is now."""
    path = epath.Path(path)
    with storage(path):
        for number in range(1, 1000):
            aside = path.parent / f"{path.name}.damaged{number if number > 1 else ''}"
            if not exists(aside):
                return path.rename(aside)
    raise StorageError(f"{escape(path)} is damaged, and so many others were: remove some")


def exists(path) -> bool:
    """Whether anything has this name, a link that leads nowhere too."""
    return os.path.lexists(path) if is_local(path) else epath.Path(path).exists()


def is_local(path) -> bool:
    """Whether a path is of this machine's file system."""
    return "://" not in os.fspath(path)


def _at(path) -> Path | epath.Path:
    """A path to read and write by, which here asks no library that tests mock while a lock is renewed."""
    return Path(path) if is_local(path) else epath.Path(path)


@functools.cache
def plain(path) -> epath.Path:
    """`path` under a name that every library takes.

    Orbax takes brackets for patterns; TensorStore and TensorFlow take UTF-8 alone. A path whose name holds
    such is reached through a link without.
    """
    path = epath.Path(path)
    if not is_local(path) or _PLAIN.fullmatch(os.path.abspath(path)):
        return path
    link = Path(_links(), uuid.uuid4().hex)
    link.symlink_to(os.path.abspath(path))
    return epath.Path(link)


def named(path) -> str:
    """What the user calls a path that `plain` may have given another name."""
    path = os.fspath(path)
    link, _, rest = (
        path.removeprefix(f"{_links()}/").partition("/") if path.startswith(_links()) else ("", "", "")
    )
    return os.path.join(os.readlink(os.path.join(_links(), link)), rest).rstrip("/") if link else path


@functools.cache
def _links():
    folder = tempfile.mkdtemp(prefix="simclr-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_reachable(path) -> None:
    """Raises a UserError unless what lies elsewhere answers within `REACHED_WITHIN` seconds."""
    if is_local(path):
        return
    answered = []

    def ask():
        try:
            epath.Path(path).exists()
            answered.append(None)
        except Exception as error:
            answered.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACHED_WITHIN)
    if not answered or answered[0]:
        reason = reason_of(answered[0]) if answered else f"no answer in {REACHED_WITHIN} s"
        raise UserError(f"{escape(path)}: {reason}; check the path, the network and your credentials")
