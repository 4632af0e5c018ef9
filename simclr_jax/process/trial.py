"""A trial of a run, for `simclr_jax.check`: all of it up to its work. It writes no files."""

from collections.abc import Iterator
from contextlib import contextmanager

active = False  # whether runs of this process are trials
devices = ""  # those that a trial stands for, in words; none where it is of those that are here
sees_data = True  # whether the images of the run can be read from here


class _Over(BaseException):
    """The run would begin its work now."""


@contextmanager
def of(words: str, *, sees: bool) -> Iterator[None]:
    """Lets a run inside end before its work; the arguments are `devices` and `sees_data`."""
    global active, devices, sees_data
    active, devices, sees_data = True, words, sees
    try:
        yield
    except _Over:
        pass
    finally:
        active, devices, sees_data = False, "", True


def end() -> None:
    """Ends a trial; it is called where the work of a run begins."""
    if active:
        raise _Over
