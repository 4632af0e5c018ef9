"""Reads the tensors of PyTorch's files; all other objects are skipped, and nothing is executed.

Training scripts save more than tensors: scalars and random states of NumPy, paths, dates, enums, their own
objects. `torch.load(weights_only=True)` refuses a file with any of these; here inert objects replace them.
"""

import collections
import pickle
import sys
import types
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

# Objects of data come from these modules of Python's library; a file that names another one is refused.
_DATA_MODULES = ("_codecs", "argparse", "array", "collections", "copyreg", "dataclasses", "datetime")
_DATA_MODULES += ("decimal", "enum", "fractions", "ipaddress", "numbers", "pathlib", "random", "types")
_DATA_MODULES += ("uuid", "zoneinfo")
_DATA_BUILTINS = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list")
_DATA_BUILTINS += ("object", "range", "set", "slice", "str", "tuple", "type", "getattr")  # of an enum


class Refused(Exception):
    """A file names a function that could execute anything."""


class _Inert(dict):
    """Stands for an object that is no tensor: it takes whatever a file does to it, and keeps items alone."""

    def __init__(self, *_, **__):
        super().__init__()

    def _ignore(self, _):
        pass

    append = extend = __setstate__ = _ignore

    def __hash__(self):
        return id(self)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        import torch

        # Old protocols have the names of Python 2.
        module, name = NAME_MAPPING.get((module, name), (module, name))
        module = IMPORT_MAPPING.get(module, module)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name.startswith("_rebuild_") and name.isidentifier():
            return super().find_class(module, name)
        is_dtype = isinstance(getattr(torch, name, None), torch.dtype)
        if module == "torch" and (is_dtype or name in ("Size", "device")):
            return getattr(torch, name)
        root = module.partition(".")[0]
        allowed = name in _DATA_BUILTINS if root == "builtins" else root in _DATA_MODULES
        if not allowed and root in sys.stdlib_module_names:
            raise Refused(f"{module}.{name}")
        return type(name, (_Inert,), {})


def load(file):
    """Returns what PyTorch has saved in a binary file: tensors on the CPU, in nested dictionaries and lists.

    Raises:
      Refused: the file names what could execute anything.
      Exception: of many types; the file is damaged, or not PyTorch's.
    """
    import torch

    def load_pickle(stream, **options):
        return _Unpickler(stream, **options).load()

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise Refused("a program of TorchScript")
    file.seek(0)
    reader = types.SimpleNamespace(__name__="tensors_only", Unpickler=_Unpickler, load=load_pickle)
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader)
