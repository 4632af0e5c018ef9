"""Errors as users see them: one line of text and an exit code."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from simclr_jax.process.console import end_process, escape, keep_temporary_files_apart, protect

_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))  # A disk without space, or a spent quota.


class UserError(ValueError):
    """Something in the user's config, data or folders is wrong.

    The message is one line: the value, the expectation and the remedy. Command lines print it
    without a traceback and exit with `exit_code`.
    """

    exit_code = 2


class RunError(UserError):
    """Something outside ended a run that was right when it began: storage that fails, a process that dies.

    The same command goes on once the cause is gone.
    """

    exit_code = 1


def reason_of(error: BaseException, limit: int = 160) -> str:
    """Returns why something failed, in at most `limit` characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if full := [text for text in _FULL if text.lower() in str(error).lower()]:
        return full[0]
    # TensorFlow wraps its reasons in the names of its operations, and in tracebacks of functions it calls.
    names = r"\{\{.*?\}\}|\[Op:.*|\[\[.*|Traceback.*$"
    callers = r"Error in user-defined function passed to .*?iterator: \S+ |^ValueError: "
    text = " ".join(str(getattr(error, "message", None) or error).split())
    text = re.sub(rf"{names}|{callers}", "", text).strip()
    return escape(text)[:limit].strip() or type(error).__name__


def is_full(error: BaseException) -> bool:
    """Returns whether a disk or a quota without space is the reason."""
    return reason_of(error) in _FULL


def first_few(items, count: int = 3) -> str:
    """Lists the first `count` items in sorted order, and how many more there are."""
    items = sorted(map(str, items))
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")


def is_storage_error(error: BaseException) -> bool:
    """Returns whether an exception comes from reading or writing files, and not from our code."""
    if isinstance(error, OSError) or type(error).__module__.startswith("tensorflow."):
        return True
    # TensorStore and Orbax wrap the message of the file system in ValueErrors of this form.
    wrapped = r"(?i)error (writing|reading|opening|creating|locking)|\[OS error|No space left"
    return bool(re.search(wrapped, str(error)))


@contextmanager
def outside_errors_as_run_errors(flag: str = "") -> Iterator[None]:
    """Turns errors of storage that no `files.storage` has caught, and of full memory, into RunErrors.

    `flag` stands before a key where the user sets it, as in '--config.'.
    """
    try:
        yield
    except Exception as error:
        if _is_memory_error(error):
            size = re.search(r"(\d{4,}) ?(?:bytes|B\b)", str(error))
            wanted = f"{int(size[1]) / 2**30:.3g} GiB ({size[1]} bytes) wanted" if size else reason_of(error)
            raise RunError(
                f"out of memory: {wanted}; lower {flag}batch_size, or in pretraining raise "
                f"{flag}microbatches or set {flag}remat=True, with which the run goes on; "
                "python -m simclr_jax.plan tells what fits"
            ) from None
        if isinstance(error, UserError) or not is_storage_error(error):
            raise
        place = f"{error.filename}: " if getattr(error, "filename", None) else ""
        raise RunError(f"{place}{reason_of(error)}") from error


@contextmanager
def naming_python_keys() -> Iterator[None]:
    """Names keys in errors as programs set them, and not as flags of commands."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("--config.", "config.").replace("--workdir", "workdir")
        if text == str(error):
            raise
        raise type(error)(text) from error.__cause__


def _is_memory_error(error):
    # Names of jax's and TensorFlow's errors, which this module does not import.
    kinds = ("JaxRuntimeError", "XlaRuntimeError", "ResourceExhaustedError")
    pattern = r"(?is)out.of.memory|OOM when|failed to allocate|RESOURCE_EXHAUSTED.*(alloc|reserve)"
    is_memory = type(error).__name__ in kinds and re.search(pattern, str(error)) and not is_full(error)
    return is_memory or isinstance(error, MemoryError)


@contextmanager
def one_line_errors(leave=None, flag: str = "") -> Iterator[None]:
    """Prints the error that ends a command as one line, and exits with its code.

    Args:
      leave: called with the line and the exit code before this process ends.
      flag: see `outside_errors_as_run_errors`.
    """
    protect()
    try:
        with outside_errors_as_run_errors(flag):
            yield
    except UserError as error:
        line = f"error: {' '.join(escape(error).split(chr(10)))}"
        print(line, file=sys.stderr, flush=True)
        if leave:
            leave(line, error.exit_code)
        if isinstance(error, RunError):  # threads that wait for storage or processes would never end
            end_process(error.exit_code)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def command_parser(text: str) -> argparse.ArgumentParser:
    """Builds the parser of a command without a config, whose help begins with `text` as it is."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(main) -> None:
    """Runs `main(arguments)` for a command without a config, where user errors are one line and code 2."""
    keep_temporary_files_apart()
    with one_line_errors():
        main(sys.argv[1:])
