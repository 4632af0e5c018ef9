"""The console: lines printed once for all processes, names escaped, and writes that never fail a run."""

import atexit
import errno
import functools
import os
import shutil
import sys
import tempfile
from contextlib import suppress

_silent = False


def be_silent() -> None:
    """Turns `say` off in this process, since another one prints the same lines."""
    global _silent
    _silent = True


def say(line: str) -> None:
    """Prints a line, once for all processes."""
    if not _silent:
        print(line, flush=True)


# For notes that several draws of labels repeat, or a config that is made and then run.
say_once = functools.cache(say)


def escape(name) -> str:
    """Returns a path or another name as it may stand in a line: unprintable characters are escaped."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text.encode("utf-8", "backslashreplace").decode()


def protect() -> None:
    """Makes sure that printing never fails a run.

    Where the reader went away, the disk behind a redirection is full or the descriptor is closed, lines are
    lost; a console that is not UTF-8 shows the characters that it lacks escaped.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's errors raise exceptions as well
    for number in (0, 1, 2):  # the next file that is opened would get a closed descriptor
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if not isinstance(stream, _Console):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Console(stream))


_temporary = []  # the folder of this process's temporary files, such as TensorFlow's sources


def keep_temporary_files_apart() -> None:
    """Gives this process, and not a program around it, a temporary folder that goes however it ends."""
    with suppress(OSError):
        if not _temporary:
            _temporary.append(tempfile.mkdtemp(prefix="simclr-"))
            tempfile.tempdir = _temporary[0]
            atexit.register(shutil.rmtree, _temporary[0], ignore_errors=True)


def end_process(code: int) -> None:
    """Ends this process at once, without waiting for its threads; lines that it has printed appear."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    for folder in _temporary:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


class _Console:
    """A text stream whose writes never fail."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, function, *arguments):
        try:
            function(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            if getattr(error, "errno", None) == errno.EINTR:
                raise
            # The interpreter would write the buffer once more at exit, and fail with a traceback.
            self._stream = open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self._stream, name)
