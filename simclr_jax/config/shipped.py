"""The config files that come with this program: configs/ beside the package, or inside it once installed."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

PACKAGE = Path(__file__).parent.parent
FOLDER = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def files() -> dict[str, Path]:
    """Returns the paths of the files that have a `get_config`, by their names, as in 'digits'."""
    return {path.stem: path for path in sorted(FOLDER.glob("[!_]*.py")) if path.stem != "base"}


@contextmanager
def importable() -> Iterator[None]:
    """Lets config files import `configs.base` from `FOLDER` inside the context.

    A package of this name that a program has of its own is back afterwards.
    """
    if _is_shipped(sys.modules.get("configs")):
        yield
        return
    users_modules = _remove_imported()
    sys.modules.update(_imported or {"configs": _package()})
    try:
        yield
    finally:
        _imported.update(_remove_imported())
        sys.modules.update(users_modules)


_imported: dict[str, ModuleType] = {}  # modules that were imported inside, so that none runs twice


def _remove_imported():
    """Removes the package `configs` and its modules from the imported ones, and returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "configs"]
    return {name: sys.modules.pop(name) for name in names}


def base() -> ModuleType:
    """Imports configs/base.py."""
    with importable():
        return importlib.import_module("configs.base")


def tasks() -> list[str]:
    """Returns the names of all tasks, sorted."""
    return sorted(["pretrain", *base().tasks()])


def defaults_of(task: str) -> ConfigDict:
    """Returns the config of a task as configs/base.py has it: its keys with their defaults."""
    return base().task_config(task, base().pretrain)


def _package():
    spec = importlib.util.spec_from_file_location(
        "configs", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def _is_shipped(package):
    return Path(getattr(package, "__file__", None) or "").parent == FOLDER
