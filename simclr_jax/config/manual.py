"""What `--help` prints: how a command is used, and of a config every key with its value and its meaning."""

import ast
import shutil
import sys
import textwrap
from pathlib import Path

from simclr_jax import tasks as task_modules
from simclr_jax.config import settings, shipped, validation

EXAMPLES = """\
examples:
  python -m simclr_jax.main --config=configs/digits.py --workdir=RUN
      learns from scikit-learn's digits, in minutes on a laptop
  python -m simclr_jax.main --config=configs/folder.py --config.dataset.path=PHOTOS --workdir=RUN
      learns from a folder of images without labels
  python -m simclr_jax.main --config=configs/digits.py:linear_eval --config.pretrained=RUN --workdir=OTHER
      a linear classifier on what it has learnt
"""


def text(flags_of_command: list, file: str | None) -> str:
    """The help of the command that runs.

    Args:
      flags_of_command: absl's, that it takes beside the keys of a config.
      file: 'FILE' or 'FILE:TASK' whose keys are listed; None lists what there is to choose from.

    Raises:
      UserError: there is no such config.
    """
    parts = [(sys.modules["__main__"].__doc__ or "").strip()] + ([] if file else [EXAMPLES.rstrip()])
    if file:
        config = settings.defaults(file)
        validation.check_keys(config, file=file)
        parts.append(f"the keys of {file}, as --config.KEY=VALUE:\n" + _table(_keys(config)))
    else:
        configs = {f"configs/{path.name}": _summary(path) for path in shipped.files().values()}
        folder = Path(task_modules.__path__[0])
        tasks = {name: _summary(folder / f"{name}.py") for name in validation.known_tasks()}
        parts.append("configs, of which --config=FILE --help lists the keys:\n" + _table(configs))
        parts.append("tasks, as --config=FILE:TASK:\n" + _table(tasks))
    given = {f"--{flag.name}": " ".join(flag.help.split()) for flag in flags_of_command}
    return "\n\n".join([*parts, "flags (--helpfull lists those of libraries, too):\n" + _table(given)])


def _keys(config):
    meanings = meanings_of(config.task)
    return {
        f"{key}={value}": meanings.get(key, "")
        for key, value in validation.flatten(config, strict=False).items()
    }


def meanings_of(task: str) -> dict[str, str]:
    """{'a.b': its comment in configs/base.py} of the keys of a task."""
    path = shipped.FOLDER / "base.py"
    source = path.read_text()
    lines, functions = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = {
                key: comment
                for statement in ast.walk(node)
                for key, line in _places(statement)
                if (comment := _comment(lines, line))
            }
    shared = functions["_supervised"]
    if task == "distill":  # keeps the optimiser of pretraining
        shared = {key: meaning for key, meaning in shared.items() if not key.startswith("optimizer.")}
    return functions["pretrain"] | shared | functions.get(task, {})


def _places(statement):
    """(dotted key, its line) of what a statement sets: `return ConfigDict({...})`, `config.a.b = ...`."""
    target, value = "", getattr(statement, "value", None)
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
        target = ast.unparse(statement.targets[0]).partition(".")[2]
        yield target, statement.lineno
    elif not isinstance(statement, ast.Return):
        return
    if isinstance(value, ast.Call) and value.args and isinstance(value.args[0], ast.Dict):
        yield from _entries(value.args[0], f"{target}." if target else "")


def _entries(tree, prefix):
    for key, value in zip(tree.keys, tree.values):
        yield prefix + key.value, key.lineno
        if isinstance(value, ast.Dict):
            yield from _entries(value, f"{prefix}{key.value}.")


def _comment(lines, number):
    """The comment of a line, and those above that stand alone."""
    above = []
    while lines[number - 2 - len(above)].strip().startswith("#"):
        above.insert(0, lines[number - 2 - len(above)].strip("# "))
    _, hash, beside = lines[number - 1].partition("  # ")
    return " ".join([*above, beside] if hash else above)


def _summary(path):
    """The first sentence of a module."""
    return " ".join(ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].split())


def _table(rows):
    width = min(max(map(len, rows)), 40)
    columns = max(60, min(shutil.get_terminal_size().columns, 120))
    indent = " " * (width + 4)
    lines = []
    for name, meaning in rows.items():
        head = f"  {name:<{width}}  "
        if len(head) > len(indent):
            lines.append(head.rstrip())
            head = indent
        lines.append(
            textwrap.fill(meaning, columns, initial_indent=head, subsequent_indent=indent) or head.rstrip()
        )
    return "\n".join(lines)
