"""The two commands, with a stand-in for Python that records what it is asked to do."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RECORD = """#!/usr/bin/env bash
echo "$PWD|$*" >>"{log}"
if [ "$*" = "-m venv --clear {root}/.venv" ]; then
  mkdir -p "{root}/.venv/bin" && cp "$0" "{root}/.venv/bin/python"
fi
"""


@pytest.fixture
def clone(tmp_path):
    """A copy of the scripts, without an environment; `clone/../calls` is what Python was asked."""
    root = tmp_path / "the clone"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copytree(ROOT / "configs", root / "configs")
    (root / "tests").mkdir()
    for name in ("requirements.txt", "tests/requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    python = tmp_path / "python"
    python.write_text(RECORD.format(log=tmp_path / "calls", root=root))
    python.chmod(0o755)
    return root


def run(clone, script, *arguments, cwd=None):
    """Runs a script; returns its output and the calls of Python, as (folder, arguments)."""
    calls = clone.parent / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["bash", str(clone / "launch" / script), *arguments],
        cwd=cwd or clone,
        env={"PATH": "/usr/bin:/bin", "BASE_PYTHON": str(clone.parent / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = [line.split("|", 1) for line in calls.read_text().splitlines()]
    return done.stdout, [(folder, call) for folder, call in made if not call.startswith("-c ")]


def test_local_makes_the_environment_once_and_runs_main(clone):
    out, calls = run(clone, "local.sh", "--config=configs/digits.py", "--workdir=a b")
    assert "== making" in out and "== installing" in out and "== python -m simclr_jax.main" in out
    verbs = [call for _, call in calls]
    assert verbs[0].startswith("-m venv") and verbs[1].startswith("-m pip install")
    assert f"--requirement={clone}/requirements.txt" in verbs[1]
    assert verbs[2:] == ["-m simclr_jax.main --config=configs/digits.py --workdir=a b"]
    out, calls = run(clone, "local.sh", "--config=configs/digits.py")
    assert "making" not in out and "installing" not in out
    assert [call for _, call in calls] == ["-m simclr_jax.main --config=configs/digits.py"]


def test_local_installs_again_when_requirements_change(clone):
    run(clone, "local.sh")
    with (clone / "requirements.txt").open("a") as file:
        file.write("another\n")
    out, _ = run(clone, "local.sh")
    assert "== installing" in out


def test_local_finds_configs_from_any_folder(clone, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "configs").mkdir(parents=True)
    (elsewhere / "configs" / "mine.py").touch()
    _, calls = run(clone, "local.sh", "--config=configs/digits.py:pretrain", "--workdir=run", cwd=elsewhere)
    assert calls[-1] == (
        str(elsewhere),
        f"-m simclr_jax.main --config={clone}/configs/digits.py:pretrain --workdir=run",
    )
    _, calls = run(clone, "local.sh", "--config=configs/mine.py", cwd=elsewhere)
    assert calls[-1] == (str(elsewhere), "-m simclr_jax.main --config=configs/mine.py")


def test_test_passes_its_arguments_on(clone, tmp_path):
    _, calls = run(clone, "test.sh", "-k", "losses", cwd=tmp_path)
    assert f"--requirement={clone}/tests/requirements.txt" in calls[1][1]
    assert calls[-1] == (str(clone), "-m pytest -k losses")


def test_old_python_is_named(clone):
    (clone.parent / "python").write_text("#!/usr/bin/env bash\nexit 1\n")
    done = subprocess.run(
        ["bash", str(clone / "launch" / "local.sh")],
        env={"PATH": "/usr/bin:/bin", "BASE_PYTHON": str(clone.parent / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "no Python 3.11 or newer" in done.stderr
