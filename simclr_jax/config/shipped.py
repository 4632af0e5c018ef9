"""The config files that come with this program: configs/ beside the package, or inside it once installed."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent.parent
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def files() -> dict[str, Path]:
    """{'digits': its path, ...} of those that have a `get_config`, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("[!_]*.py")) if path.stem != "base"}


@contextmanager
def importable() -> Iterator[None]:
    """Inside, `configs` is that folder for whoever imports it; config files import `configs.base`.

    Somebody's own package of this name is back afterwards.
    """
    if _is_ours(sys.modules.get("configs")):
        yield
        return
    others = _take_out()
    sys.modules.update(_ours or {"configs": _package()})
    try:
        yield
    finally:
        _ours.update(_take_out())
        sys.modules.update(others)


_ours: dict[str, ModuleType] = {}  # what was imported inside, so that nothing runs twice


def _take_out():
    names = [name for name in sys.modules if name.partition(".")[0] == "configs"]
    return {name: sys.modules.pop(name) for name in names}


def base() -> ModuleType:
    """configs/base.py: the keys of every task with their defaults."""
    with importable():
        return importlib.import_module("configs.base")


def _package():
    spec = importlib.util.spec_from_file_location(
        "configs", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def _is_ours(package):
    return Path(getattr(package, "__file__", None) or "").parent == FOLDER
