"""Rules of the layout: who may import what, and that every config key is read by someone."""

import ast
import contextlib
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

from simclr_jax.config import settings
from simclr_jax.process import UserError

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


# A room, or a file with rules of its own, and the rooms and files that it may import, from the bottom up.
# Inside a room everything may import everything, but for circles between files. Doors and commands may import
# all.
ALLOWED = {
    "parallel.py": "",
    "process/": "parallel.py",
    "profiling/": "parallel.py process/",
    "losses.py": "",
    "memory.py": "parallel.py",
    "config/ranges.py": "config/shipped.py process/",
    "config/saved.py": "config/shipped.py",
    "optim.py": "config/ranges.py",
    "models/": "config/ranges.py config/saved.py parallel.py process/",
    "config/verbs.py": "config/ main.py process/ workdir/records.py",
    "config/": "losses.py models/ optim.py process/",
    "views/": "",
    "views/recipe.py": "",
    "views/distort.py": "views/recipe.py",
    "views/on_device.py": "views/distort.py views/recipe.py",
    "data/": "config/ranges.py process/ views/recipe.py",
    "views/batches.py": "data/ parallel.py process/ views/recipe.py",
    "views/resident.py": "data/ parallel.py process/ views/on_device.py views/recipe.py",
    "workdir/": "data/ process/",
    "checkpoint.py": "parallel.py process/ workdir/",
    "official/": "config/saved.py data/ models/ process/",
    "torch_weights/": "config/saved.py models/ process/",
    "train.py": "checkpoint.py models/ optim.py parallel.py process/ profiling/ workdir/",
    "pretrained.py": "checkpoint.py config/ models/ official/ process/ torch_weights/",
    "evaluation/": "data/ models/ parallel.py pretrained.py process/ workdir/",
    "supervised.py": "data/ evaluation/ losses.py parallel.py plots/figures.py pretrained.py process/ "
    "train.py views/ workdir/",
    "plots/": "config/ data/ evaluation/ pretrained.py process/ workdir/",
    "tasks/": "checkpoint.py data/ evaluation/ losses.py memory.py models/ official/ parallel.py plots/ "
    "pretrained.py process/ supervised.py train.py views/ workdir/",
    "runs.py": "checkpoint.py config/ evaluation/ pretrained.py process/ train.py workdir/",
    "export/": "checkpoint.py data/ models/ pretrained.py process/ torch_weights/",
    "images.py": "data/ process/",
    "encoder.py": "data/ images.py models/ pretrained.py process/",
    "plan/": "models/ parallel.py process/ profiling/ supervised.py tasks/distill.py tasks/pretrain.py "
    "train.py views/",
    "benchmark/": "data/ losses.py models/ parallel.py plan/ process/ train.py views/",
}
ENTRY_POINTS = (
    "__init__.py",
    "__main__.py",
    "main.py",
    "check.py",
    "api.py",
    "gpu_report.py",
    "benchmark/gpu_report.py",
)
ENTRY_POINTS += ("benchmark/cifar10.py", "evaluation/neighbours.py", "evaluation/suggest.py")


def file_of(module):
    """The file of an imported module, or of the module that has the imported name."""
    parts = module.split(".")[1:]
    while parts:
        for name in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if (ROOT / "simclr_jax" / name).exists():
                return name
        parts.pop()
    return "__init__.py"


def imported_files(path):
    """The files of the package that a file imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {file_of(module) for module in modules if module.split(".")[0] == "simclr_jax"}
    return ours - {name_of(path), "__init__.py"}


def test_every_package_imports_only_what_is_below_it():
    for path in SOURCES:
        name = name_of(path)
        if name in ENTRY_POINTS or name.endswith("__main__.py"):
            continue
        key = max((key for key in ALLOWED if name.startswith(key)), key=len)
        allowed = (*ALLOWED[key].split(), *([key] if key.endswith("/") else []))
        wrong = [file for file in imported_files(path) if not file.startswith(allowed)]
        assert not wrong, f"{name} imports {wrong}, which tests/test_structure.py does not allow to {key}"


def test_no_files_import_one_another_in_a_circle():
    remaining = {name_of(path): imported_files(path) for path in SOURCES}
    while leaves := [name for name, files in remaining.items() if not files & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    assert not remaining


def test_the_top_level_holds_few_modules():
    modules = [path.name for path in SOURCES if path.parent.name == "simclr_jax"]
    assert len(modules) <= 17, modules


def test_tasks_never_import_one_another():
    for path in SOURCES:
        if name_of(path).startswith("tasks/"):
            assert not [m for m, _ in imports(path) if m.startswith("simclr_jax.tasks")], path


def test_only_the_command_lines_read_flags():
    for path in SOURCES:
        name = name_of(path)
        if not name.endswith("__main__.py") and name not in (
            "config/command_line.py",
            "check.py",
            "gpu_report.py",
            "benchmark/gpu_report.py",
            "benchmark/cifar10.py",
        ):
            modules = {module for module, _ in imports(path)}
            assert not modules & {"absl.flags", "ml_collections.config_flags"}, path


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
        few = (
            set()
            if path.stem in ("digits", "folder", "microscopy", "satellite")
            else {"finetune_1pct", "finetune_10pct"}
        )
        short = {"pretrain_200"} if path.stem in ("cifar10", "cifar100", "stl10") else set()
        assert set(tasks_of(path)) == everywhere | few | short, path


def texts_in(path):
    """The texts of a file, with {} in the place of values."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


TEXTS = sorted({text for path in SOURCES for text in texts_in(path)})
COMMAND = r"python -m (simclr_jax[\w.]*\w)(?!\.?{)"
SETTING = r"--config\.([a-z_.]+)=([\w+.(),-]*\w)(?![{\w/])"


def test_remedies_name_keys_commands_and_files_that_exist():
    keys = {"KEY"}
    for path in CONFIGS:
        for task in tasks_of(path):
            config = importlib.import_module(f"configs.{path.stem}").get_config(task)
            keys |= set(flatten_dict(config.to_dict(), sep="."))
    wrong = []
    for text in TEXTS:
        named = re.findall(r"--config\.([A-Za-z_.0-9]+\b)(?![{.])", text)
        wrong += [key for key in named if key not in keys and not text.endswith(f"--config.{key}")]
        for module in re.findall(COMMAND, text):
            command = ROOT / module.replace(".", "/")
            if not command.with_suffix(".py").exists() and not (command / "__main__.py").exists():
                wrong.append(module)
        files = re.findall(r"\b(?:docs|launch)/[\w-]+\.\w+", text)
        wrong += [name for name in files if not (ROOT / name).exists()]
    assert set(wrong) <= {"docs/gpu.md", "docs/cifar10.md"}  # which launch/ writes


def is_taken(values):
    for file in ("folder", "imagenet"):
        for task in ("pretrain", "finetune", "embed"):
            needed = {} if task == "pretrain" else {"pretrained": "RUN"}
            with contextlib.suppress(UserError):
                return settings.make(f"configs/{file}.py:{task}", (needed | values).items(), as_text=True)
    return None


@pytest.mark.parametrize(
    "text", [text for text in TEXTS if re.search(SETTING, text)], ids=lambda text: text[:40]
)
def test_settings_that_remedies_name_are_taken(text):
    values = dict(re.findall(SETTING, text))
    # A text names settings that belong together, or several to choose from.
    assert is_taken(values) or all(is_taken({key: value}) for key, value in values.items()), values


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted({name for text in TEXTS for name in re.findall(COMMAND, text)}))
def test_commands_that_remedies_name_run(module):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--" in done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_docstrings_hold_the_command(path):
    module = importlib.import_module(f"configs.{path.stem}")
    assert f"python -m simclr_jax.main --config=configs/{path.stem}.py" in module.__doc__


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_unknown_tasks_name_the_known_ones(path):
    with pytest.raises(ValueError, match="task 'linear_evil' is unknown: expected one of pretrain"):
        importlib.import_module(f"configs.{path.stem}").get_config("linear_evil")
