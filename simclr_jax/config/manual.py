"""Writes the text of `--help`: the usage of a command, and every key of a config with value and meaning."""

import ast
import shutil
import sys
import textwrap

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
    """Returns the help of the command that runs.

    Args:
      flags_of_command: absl's flags that it takes beside the keys of a config.
      file: 'FILE' or 'FILE:TASK' whose keys are listed; None lists the configs and tasks.

    Raises:
      UserError: there is no such config.
    """
    usage = (sys.modules["__main__"].__doc__ or "").strip()
    parts = [usage] + ([] if file or "examples:" in usage else [EXAMPLES.rstrip()])
    if file:
        config = settings.defaults(file)
        validation.check_keys(config, file=file)
        meanings, values = meanings_of(config.task), validation.flatten(config)
        keys = {f"{key}={value}": meanings.get(key, "") for key, value in values.items()}
        parts.append(f"the keys of {file}, as --config.KEY=VALUE:\n" + _table(keys))
    else:
        configs = {f"configs/{path.name}": _summary(path) for path in shipped.files().values()}
        tasks = {name: _summary(shipped.PACKAGE / "tasks" / f"{name}.py") for name in shipped.tasks()}
        parts.append("configs, of which --config=FILE --help lists the keys:\n" + _table(configs))
        parts.append("tasks, as --config=FILE:TASK:\n" + _table(tasks))
    given = {f"--{flag.name}": " ".join(flag.help.split()) for flag in flags_of_command}
    return "\n\n".join([*parts, "flags (--helpfull lists those of libraries, too):\n" + _table(given)])


def meanings_of(task: str) -> dict[str, str]:
    """Returns the comments in configs/base.py of the keys of a task, by dotted key."""
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
    """Yields dotted keys and line numbers of the keys that a statement sets.

    Such statements are `return ConfigDict({...})`, `config.a.b = ...` and `config.a = ConfigDict({...})`.
    """
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
    """Returns the comment of a line, after the lines above it that hold only a comment."""
    above = []
    while lines[number - 2 - len(above)].strip().startswith("#"):
        above.insert(0, lines[number - 2 - len(above)].strip("# "))
    _, mark, beside = lines[number - 1].partition("  # ")
    return " ".join([*above, beside] if mark else above)


def _summary(path):
    """Returns the first paragraph of a module's docstring as one line."""
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
