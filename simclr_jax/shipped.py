"""The config files that come with this program: configs/ beside the package, or inside it once installed."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


@contextmanager
def importable() -> Iterator[None]:
    """Inside, `configs` is that folder for whoever imports it; config files import `configs.base`.

    Somebody's own package of this name is back afterwards.
    """
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}
    if not _is_ours(others.get("configs")):
        for name in others:
            del sys.modules[name]
        sys.modules["configs"] = _package()
    try:
        yield
    finally:
        if others and not _is_ours(others.get("configs")):
            for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
                del sys.modules[name]
            sys.modules.update(others)


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
