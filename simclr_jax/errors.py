"""What users see of an error: one line of text and an exit code; and a console that no run dies of."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something in the user's config, data or folders is wrong.

    The message is one line: the value found, what was expected, and the remedy. Command lines print it
    without a traceback and exit with `exit_code`.
    """

    exit_code = 2


class RunError(UserError):
    """What ends a run that was right when it began: storage that fails, a process that dies.

    The same command goes on once the cause is gone.
    """

    exit_code = 1


def shown(name) -> str:
    """A path or another name as it may stand in a line: line breaks and what is no text are escaped."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text.encode("utf-8", "backslashreplace").decode()


def reason_of(error: BaseException, limit: int = 160) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shown(" ".join(str(error).split()))[:limit] or type(error).__name__


@contextmanager
def told(leave=None) -> Iterator[None]:
    """Turns what ends a command line into one line and an exit code.

    Args:
      leave: is told the line and the exit code.
    """
    protect_console()
    try:
        yield
    except UserError as error:
        line = f"error: {' '.join(shown(error).split(chr(10)))}"
        print(line, file=sys.stderr, flush=True)
        if leave:
            leave(line, error.exit_code)
        if isinstance(error, RunError):  # threads that wait for what has failed would keep the process
            sys.stdout.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def run(main) -> None:
    """The entry point of a command line without a config: user errors are one line and exit code 2."""
    with told():
        main(sys.argv[1:])


def protect_console() -> None:
    """Whatever becomes of the console, printing to it fails no run.

    A reader that went away, a full disk behind a redirection or a closed descriptor lose what is printed; a
    console that is not UTF-8 shows what it lacks escaped.
    """
    for number in (0, 1, 2):  # or the next file opened would become the console
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115
        if not isinstance(stream, _Console):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Console(stream))


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
            # What is buffered would fail again at exit, with a traceback of the interpreter's.
            self._stream = open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self._stream, name)
