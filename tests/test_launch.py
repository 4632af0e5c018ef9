"""The two commands and gpu.sh, with stand-ins that record what they are asked to do."""

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

RECORD = """#!/usr/bin/env bash
echo "$PWD|$*" >>"{log}"
if [ "$*" = "-m venv --clear {root}/.venv" ]; then
  rm -rf "{root}/.venv" # its Python may be a link
  mkdir -p "{root}/.venv/bin" && cp "$0" "{root}/.venv/bin/python"
fi
"""

STAND_IN = r"""#!/usr/bin/env bash
# Notes its call, as the number of words and the words; then follows the first rule whose pattern is in them.
home="{home}"
words=("${0##*/}" "$@")
printf '%s\0' "${#words[@]}" "${words[@]}" >>"$home/calls"
for rule in "$home"/rules/*; do
  [ -e "$rule" ] || break
  mapfile -t lines <"$rule"
  [[ "${words[*]}" == *"${lines[0]}"* ]] || continue
  [ "${#lines[@]}" -le 2 ] || printf '%s\n' "${lines[0]}" "${lines[@]:2}" >"$rule"
  case ${lines[1]} in
    "sh "*) eval "${lines[1]#sh }"; exit ;;
    *) printf '%b' "${lines[1]#* }"; exit "${lines[1]%% *}" ;;
  esac
done
"""
MAKE_VENV = 'sh mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python"'
CHECK = ["python", "-m", "simclr_jax.check"]
NASTY = "--config.dataset.path=/data/my photos; rm -rf $HOME \"'`*"


class StandIns:
    """A copy of the scripts, and a PATH on which the commands that they call only note that they were called.

    Attributes:
      root: the copy.
      home: what the stand-ins use, and HOME for the scripts.
    """

    def __init__(self, folder, *names):
        self.home, self.root = folder, folder / "the clone"
        self.path = folder / "bin"
        for part in ("launch", "configs"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "requirements.txt", self.root)
        (folder / "rules").mkdir()
        self.path.mkdir()
        for name in names:
            (self.path / name).write_text(STAND_IN.replace("{home}", str(folder)))
            (self.path / name).chmod(0o755)
        (folder / "calls").touch()
        self.env = {"PATH": f"{self.path}:/usr/bin:/bin", "HOME": str(folder)}

    def rule(self, pattern, *answers):
        """Sets the answers to calls that hold `pattern`: each in turn, then the last one for ever.

        An answer is an exit code, a space and what to print; or `sh ` and a line of bash.
        """
        rules = self.home / "rules"
        (rules / f"{len(list(rules.iterdir())):03}").write_text("\n".join([pattern, *answers]) + "\n")

    def forget(self):
        """Removes all rules and calls."""
        for rule in (self.home / "rules").iterdir():
            rule.unlink()
        (self.home / "calls").write_text("")

    def calls(self, name=None):
        """The calls so far, as lists of words; of one command if `name` is given."""
        words = (self.home / "calls").read_bytes().decode().split("\0")[:-1]
        calls = []
        while words:
            count = int(words[0])
            calls.append(words[1 : 1 + count])
            words = words[1 + count :]
        return [call for call in calls if name in (None, call[0])]

    def start(self, *command, **env):
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell never heeds a signal that was ignored where it started, as in the background of another.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script, *arguments, code=0, **env):
        """Runs launch/SCRIPT; returns what it printed, (stdout, stderr)."""
        process = self.start("bash", f"launch/{script}", *arguments, **env)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (process.returncode, out, err)
        return out, err

    def refused(self, script, *arguments, **env):
        """Runs launch/SCRIPT, which has to refuse its arguments before any work; returns its one line."""
        out, err = self.run(script, *arguments, code=2, **env)
        assert not out and not self.calls() and err.count("\n") == 1 and err.startswith("error: ")
        return err

    def check_dry_run(self, script, *arguments):
        """Holds what a dry run prints against the calls of a real run that has just been made."""
        real = self.calls()
        (self.home / "calls").write_text("")
        before = self._times()
        verbs = 0 if arguments[0].startswith("-") else 1
        out, _ = self.run(script, *arguments[:verbs], "--dry_run", *arguments[verbs:])
        assert [call[:3] for call in self.calls()] in ([], [CHECK])  # which a dry run makes, too
        assert self._times() == before
        (self.home / "calls").write_text("")
        pasted = ["bash", "-ec", out]
        subprocess.run(pasted, env=self.env, cwd=self.root, capture_output=True, check=True)
        assert self.calls() == real and real

    def _times(self):
        return {path: path.stat().st_mtime_ns for path in self.root.rglob("*")}


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


def test_new_python_is_refused_before_anything_is_made(clone):
    (clone.parent / "python").write_text("#!/usr/bin/env bash\necho it is 3.14.0 >&2\nexit 1\n")
    assert "(it is 3.14.0): set BASE_PYTHON to one" in error_of_local(clone)
    assert not (clone / ".venv").exists()


def test_a_missing_venv_package_is_named(clone):
    text = "not created successfully because ensurepip is not\navailable"
    script = f"#!/usr/bin/env bash\n[ $1 = -c ] || {{ echo '{text}'; exit 1; }}\n"
    (clone.parent / "python").write_text(script)
    assert "apt install python3-venv" in error_of_local(clone)
    (clone.parent / "python").write_text(script.replace("ensurepip", "the disk"))
    assert "venv: available; or set BASE_PYTHON" in error_of_local(clone)


def error_of_local(clone):
    """The one line with which local.sh ends."""
    done = subprocess.run(
        ["bash", str(clone / "launch" / "local.sh")],
        env={"PATH": "/usr/bin:/bin", "BASE_PYTHON": str(clone.parent / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("damage", ["no pip", "part of pip", "no Python"])
def test_a_damaged_environment_is_made_anew(damage, clone):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clone / ".venv")], check=True)
    if damage == "part of pip":
        (package,) = (clone / ".venv" / "lib").glob("python3*/site-packages")
        (package / "pip").mkdir()
        (package / "pip" / "__init__.py").touch()
    elif damage == "no Python":
        (clone / ".venv" / "bin" / "python").unlink()
    out, calls = run(clone, "local.sh")
    assert "== making" in out and calls[0][1].startswith("-m venv --clear")


@pytest.fixture
def gpus(tmp_path):
    """gpu.sh beside two GPUs."""
    stand_ins = StandIns(tmp_path, "nvidia-smi", "python3")
    stand_ins.rule("nvidia-smi", r"0 NVIDIA H100\nNVIDIA H100\n")
    stand_ins.rule("-m venv", MAKE_VENV)
    stand_ins.rule("simclr_jax.main", 'sh env >"$home/env"')
    return stand_ins


CONFIG = "--config=configs/digits.py"


def test_gpu_installs_cuda_and_runs_one_process(gpus):
    out, _ = gpus.run("gpu.sh", "--", CONFIG, NASTY)
    assert "== GPUs: 2 NVIDIA H100\n" in out
    calls = [call for call in gpus.calls() if "-c" not in call]
    assert calls[0] == ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    assert [call[:3] for call in calls[1:3]] == [["python3", "-m", "venv"], ["python", "-m", "pip"]]
    files = [word for word in calls[2] if word.startswith("--requirement=")]
    names = ("requirements.txt", "launch/requirements-gpu.txt")
    assert files == [f"--requirement={gpus.root}/{name}" for name in names]
    assert calls[3:] == [["python", "-m", "simclr_jax.main", CONFIG, NASTY]]
    assert "CUDA_VISIBLE_DEVICES" not in (gpus.home / "env").read_text()
    gpus.forget()
    gpus.run("gpu.sh", "--", CONFIG)
    assert not [call for call in gpus.calls() if "pip" in call]


def test_gpu_selects_gpus(gpus):
    gpus.run("gpu.sh", "--gpus=0,1", "--", CONFIG)
    assert gpus.calls()[0][-1] == "--id=0,1"
    assert {"CUDA_VISIBLE_DEVICES=0,1", "CUDA_DEVICE_ORDER=PCI_BUS_ID"} <= set(
        (gpus.home / "env").read_text().splitlines()
    )


def test_gpu_without_gpus_is_one_line(gpus):
    for answer in ("9 NVIDIA-SMI has failed", "sh exit 127"):
        gpus.forget()
        gpus.rule("nvidia-smi", answer)
        out, err = gpus.run("gpu.sh", "--gpus=7", "--", CONFIG, code=2)
        assert not out and err.startswith("error: nvidia-smi finds no GPU 7: ") and err.count("\n") == 1
        assert len(gpus.calls()) == 1


@pytest.mark.parametrize("options", [(), ("--gpus=1",)])
def test_gpu_dry_run_prints_what_is_run(gpus, options):
    gpus.run("gpu.sh", "--", CONFIG)
    (gpus.home / "calls").write_text("")
    gpus.run("gpu.sh", *options, "--", CONFIG, NASTY)
    gpus.check_dry_run("gpu.sh", *options, "--", CONFIG, NASTY)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "--config is missing: give it after --"),
        (("--", "--workdir=x"), "--config is missing: give it after --"),
        (("--", "--config=configs/digts.py"), "--config=configs/digts.py does not exist: "),
        ((CONFIG,), f"{CONFIG} is an argument of main: give it after --, as in -- {CONFIG}"),
        (("--gpu=1", "--", CONFIG), "--gpu is unknown: "),
        (("--gpus", "--", CONFIG), "--gpus has no value: give --gpus=VALUE"),
        (("--gpus=all", "--", CONFIG), "--gpus=all is no list of numbers: "),
        (("--dry_run=no", "--", CONFIG), "--dry_run takes no value: "),
        (("gpus=1", "--", CONFIG), "'gpus=1' is no option: "),
    ],
)
def test_gpu_refuses(gpus, arguments, error):
    assert gpus.refused("gpu.sh", *arguments).startswith(f"error: {error}")


def test_an_accelerator_and_the_tests_are_both_installed_once(gpus):
    (gpus.root / "tests").mkdir()
    shutil.copy(ROOT / "tests/requirements.txt", gpus.root / "tests")

    def install():
        (gpus.home / "calls").write_text("")
        gpus.run("local.sh", CONFIG, ACCELERATOR="gpu")
        gpus.run("test.sh")
        return len([call for call in gpus.calls() if "pip" in call])

    assert [install(), install()] == [2, 0]


def test_the_report_is_of_one_gpu_with_what_gpus_need(gpus):
    gpus.run("gpu_report.sh", "--images=256")
    installed, *_, last = gpus.calls("python")
    assert f"--requirement={gpus.root}/launch/requirements-gpu.txt" in installed
    assert last[1:] == ["-m", "simclr_jax.gpu_report", "--config=configs/imagenet.py", "--images=256"]


def test_cifar10_reads_a_folder_of_photographs(gpus, tmp_path):
    _, err = gpus.run("cifar10.sh", tmp_path, code=2)
    assert err.startswith(f"error: {tmp_path} has no folder train")
    (tmp_path / "train").mkdir()
    gpus.run("cifar10.sh", tmp_path, "--config.num_steps=3")
    installed, *_, last = gpus.calls("python")
    assert f"--requirement={gpus.root}/launch/requirements-gpu.txt" in installed
    dataset = ["--config.dataset.name=folder", f"--config.dataset.path={tmp_path}"]
    module = [
        "-m",
        "simclr_jax.benchmark.cifar10",
        "--config=configs/cifar10.py",
        "--workdir=runs/cifar10_table",
    ]
    assert last[1:] == [*module, *dataset, "--config.num_steps=3"]
    gpus.run("cifar10.sh", "--tasks=pretrain_200")
    assert gpus.calls("python")[-1][1:] == [*module, "--tasks=pretrain_200"]


def test_local_takes_an_accelerator_and_refuses_others(gpus):
    gpus.run("local.sh", CONFIG, ACCELERATOR="tpu")
    assert f"--requirement={gpus.root}/launch/requirements-tpu.txt" in gpus.calls("python")[0]
    gpus.run("local.sh", CONFIG)
    gpus.forget()
    _, err = gpus.run("local.sh", CONFIG, ACCELERATOR="npu", code=2)
    assert err.startswith("error: ACCELERATOR=npu is unknown: ") and not gpus.calls()


COUNT_PAGE_FAULTS = """
import ctypes, os, resource, threading

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def fill(size=200 << 20):
    place = libc.malloc(size)
    libc.memset(place, 1, size)
    libc.free(place)

def count():
    fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    print(os.environ["GLIBC_TUNABLES"], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

threading.Thread(target=count).start()
"""
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")


@pytest.mark.skipif(
    os.path.exists("/dev/nvidiactl") or not HUGE_PAGES.exists() or HUGE_PAGES.read_text().strip() != "0",
    reason="this machine's kernel has no huge pages of 1 GB, or a GPU",
)
@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35"), reason="this C library keeps no large heaps")
def test_memory_that_a_thread_frees_is_kept_for_its_next_step(tmp_path):
    (tmp_path / "count.py").write_text(COUNT_PAGE_FAULTS)
    stand_ins = StandIns(tmp_path, "python3")
    stand_ins.rule("-m venv", MAKE_VENV)
    stand_ins.rule("simclr_jax.main", f"sh exec {sys.executable} {tmp_path}/count.py")
    out, _ = stand_ins.run("local.sh", CONFIG, GLIBC_TUNABLES="glibc.malloc.tcache_count=7")
    tunables, faults = out.splitlines()[-1].split()
    assert tunables == "glibc.malloc.tcache_count=7:glibc.malloc.hugetlb=1073741824"
    assert int(faults) < 100  # it is mapped in 51,200 pages


@pytest.mark.parametrize(
    "script", ["gpu.sh", "slurm.sh", "tpu.sh", "local.sh", "test.sh", "gpu_report.sh", "cifar10.sh"]
)
def test_help_is_the_comment_at_the_top(gpus, script):
    """It installs nothing."""
    out, err = gpus.run(script, "--help")
    assert f"usage: bash launch/{script} " in out and "set -e" not in out
    comment = (ROOT / "launch" / script).read_text().split("\nset -e")[0].splitlines()[1:]
    assert out.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in comment]
    assert not err and not gpus.calls()


def test_help_of_local_lists_keys_once_there_is_an_environment(gpus):
    gpus.run("local.sh", CONFIG)
    gpus.forget()
    gpus.run("local.sh", CONFIG, "--help")
    assert gpus.calls() == [["python", "-m", "simclr_jax.main", CONFIG, "--help"]]


def test_scripts_pass_shellcheck():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    command = [os.path.join(os.path.dirname(sys.executable), "shellcheck"), "-x", *scripts, ".ci/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
