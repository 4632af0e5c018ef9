"""A trial of a run, for `simclr_jax.check`: all of it up to its work. It writes no files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class Over(BaseException):
    """The run would begin its work now."""


class State:
    """The trial of this process, which has at most one.

    Attributes:
      active: whether there is one.
      devices: the devices that it stands for, in words; '' for those that are here.
      sees_data: whether the images of the run can be read from here.
    """

    active: ClassVar[bool] = False
    devices: ClassVar[str] = ""
    sees_data: ClassVar[bool] = True


@contextmanager
def active(devices: str, *, sees_data: bool) -> Iterator[None]:
    """Lets a run inside end before its work; the arguments are attributes of `State`."""
    State.active, State.devices, State.sees_data = True, devices, sees_data
    try:
        yield
    except Over:
        pass
    finally:
        State.active, State.devices, State.sees_data = False, "", True


def end() -> None:
    """Ends a trial; it is called where the work of a run begins."""
    if State.active:
        raise Over
