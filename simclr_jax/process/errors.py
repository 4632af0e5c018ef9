"""What users see of an error: one line of text and an exit code."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from simclr_jax.process.console import escape, protect


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


def reason_of(error: BaseException, limit: int = 160) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return escape(" ".join(str(error).split()))[:limit] or type(error).__name__


def first_few(items, count: int = 3) -> str:
    """The first of them, sorted, and how many more there are."""
    items = sorted(map(str, items))
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")


def is_of_storage(error: BaseException) -> bool:
    """Whether an exception tells of files, not of our code."""
    if isinstance(error, OSError):
        return True
    if type(error).__module__.startswith("tensorflow."):
        return True
    # TensorStore and Orbax wrap what the file system said in ValueErrors of this form.
    return bool(
        re.search(
            r"(?i)error (writing|reading|opening|creating|locking)|\[OS error|No space left", str(error)
        )
    )


@contextmanager
def storage_errors_as_run_errors() -> Iterator[None]:
    """Makes RunErrors of what tells of files and that nobody has thought of closer to it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_of_storage(error):
            raise
        place = f"{error.filename}: " if getattr(error, "filename", None) else ""
        raise RunError(f"{place}{reason_of(error)}") from error


@contextmanager
def one_line_errors(leave=None) -> Iterator[None]:
    """Turns what ends a command line into one line and an exit code.

    Args:
      leave: is told the line and the exit code.
    """
    protect()
    try:
        with storage_errors_as_run_errors():
            yield
    except UserError as error:
        line = f"error: {' '.join(escape(error).split(chr(10)))}"
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
    with one_line_errors():
        main(sys.argv[1:])
