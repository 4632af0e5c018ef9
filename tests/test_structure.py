"""Rules of the layout: who may import what, and that every config key is read by someone."""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "simclr_jax").rglob("*.py"))
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base"))
# Where TensorFlow may be imported; the rest runs where only JAX is installed.
TENSORFLOW = ("data/", "official/names.py")


def name_of(path):
    return str(path.relative_to(ROOT / "simclr_jax"))


def imports(path):
    """(module, whether the import is at the top level) of every import of a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, node in tree.body


def test_tensorflow_stays_in_the_input_pipeline():
    for path in SOURCES:
        if not name_of(path).startswith(TENSORFLOW):
            modules = {module.split(".")[0] for module, _ in imports(path)}
            assert not modules & {"tensorflow", "tensorflow_datasets"}, path


def test_only_the_data_package_and_tests_reach_tensorflow_at_import():
    for path in SOURCES:
        if not name_of(path).startswith("data/"):
            top = [module for module, is_top in imports(path) if is_top]
            assert not [m for m in top if m.startswith(("simclr_jax.data", "tensorflow"))], path


def test_imports_run_one_way():
    below = {
        "parallel.py": (),
        "chips.py": (),
        "flops.py": ("parallel",),
        "console.py": (),
        "errors.py": ("console",),
        "losses.py": (),
        "optim.py": ("errors",),
        "files.py": ("console", "errors"),
        "shipped.py": (),
        "settings.py": ("errors", "shipped", "validation"),
        "workdirs.py": ("console", "errors", "files", "shipped"),
        "checkpoint.py": ("console", "errors", "files", "parallel", "workdirs"),
        "report.py": ("console", "data", "errors", "files"),
        "trackers.py": ("console", "errors", "files", "report", "workdirs"),
        "stopping.py": ("console", "parallel"),
        "processes.py": ("console", "errors", "stopping"),
        "profiling.py": ("console", "errors", "files"),
        "evaluation/calibration.py": (),
        "evaluation/features.py": ("data", "parallel"),
        "evaluation/health.py": (),
        "evaluation/parts.py": ("data", "files", "parallel", "processes", "report", "workdirs"),
        "evaluation/probes.py": ("evaluation", "parallel"),
        "plots/figures.py": (),
        "models/": ("errors", "models", "parallel"),
        "data/": ("console", "data", "errors", "files"),
        "train.py": (
            "checkpoint",
            "chips",
            "errors",
            "flops",
            "models",
            "optim",
            "parallel",
            "processes",
            "profiling",
            "report",
            "stopping",
            "workdirs",
        ),
        "official/names.py": (),
        "official/__init__.py": ("data", "errors", "files", "models", "official"),
        "supervised.py": (
            "data",
            "errors",
            "evaluation",
            "files",
            "losses",
            "parallel",
            "pretrained",
            "processes",
            "report",
            "train",
        ),
        "pretrained.py": (
            "checkpoint",
            "console",
            "data",
            "errors",
            "evaluation",
            "files",
            "models",
            "official",
            "parallel",
            "report",
            "torch_weights",
            "train",
            "workdirs",
        ),
        "torch_weights/": ("console", "errors", "models", "report", "torch_weights"),
    }
    for path in SOURCES:
        for prefix, allowed in below.items():
            if name_of(path).startswith(prefix):
                ours = [module.split(".") for module, _ in imports(path) if module.startswith("simclr_jax.")]
                assert {parts[1] for parts in ours} <= set(allowed), path


def test_tasks_never_import_one_another():
    for path in SOURCES:
        if name_of(path).startswith("tasks/"):
            assert not [m for m, _ in imports(path) if m.startswith("simclr_jax.tasks")], path


def test_only_the_command_lines_read_flags():
    for path in SOURCES:
        if name_of(path) not in (
            "command_line.py",
            "main.py",
            "plan/__main__.py",
            "benchmark.py",
            "gpu_report.py",
        ):
            assert not [m for m, _ in imports(path) if m in ("absl.flags", "ml_collections.config_flags")], (
                path
            )


def test_configs_import_nothing_of_the_package():
    for path in (ROOT / "configs").glob("*.py"):
        assert not [m for m, _ in imports(path) if m.startswith("simclr_jax")], path


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in SOURCES} | {ROOT / "simclr_jax" / "configs"}
    assert set(listed) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_every_config_key_is_read_somewhere():
    read = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    for path in CONFIGS:
        for task in tasks_of(path):
            keys = flatten_dict(
                importlib.import_module(f"configs.{path.stem}").get_config(task).to_dict(), sep="."
            )
            assert not [key for key in keys if key.split(".")[-1] not in read], (path, task)


def tasks_of(path):
    """The tasks of a config file, from what it says of an unknown one."""
    with pytest.raises(ValueError) as error:
        importlib.import_module(f"configs.{path.stem}").get_config("?")
    return str(error.value).partition("expected one of ")[2].split(", ")


def test_every_config_has_every_task_that_makes_sense():
    everywhere = {"pretrain", "linear_eval", "finetune", "distill", "knn", "transfer", "embed", "predict"}
    for path in CONFIGS:
        few = set() if path.stem in ("digits", "folder") else {"finetune_1pct", "finetune_10pct"}
        assert set(tasks_of(path)) == everywhere | few, path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_docstrings_hold_the_command(path):
    module = importlib.import_module(f"configs.{path.stem}")
    assert f"python -m simclr_jax.main --config=configs/{path.stem}.py" in module.__doc__


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_unknown_tasks_name_the_known_ones(path):
    with pytest.raises(ValueError, match="task 'linear_evil' is unknown: expected one of pretrain"):
        importlib.import_module(f"configs.{path.stem}").get_config("linear_evil")
