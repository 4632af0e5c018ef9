"""Cores within a container's quota, the kind of the CPU, accelerators that jax does not use, full memory."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import xla_flags
from jax._src import hardware_utils

from simclr_jax.process import errors, machine
from simclr_jax.process.errors import RunError

FILES = {
    "version 2, inside a container": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "version 2, of the parent": (
        "0::/a/b\n",
        {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"},
        2,
    ),
    "version 1": (
        "3:memory:/\n4:cpu,cpuacct:/docker/x\n",
        {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "less than one core": ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
    "no quota": (
        "4:cpu:/\n0::/\n",
        {"cpu.max": "max 100000", "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        96,
    ),
    "no control groups": ("", {}, 96),
}


@pytest.mark.parametrize("case", FILES)
def test_cores_are_those_of_the_container(case, tmp_path, monkeypatch):
    groups, limits, expected = FILES[case]
    files = {Path("/proc/self/cgroup"): groups}
    files |= {Path("/sys/fs/cgroup", name): text for name, text in limits.items()}

    def read_text(path):
        if Path(os.path.normpath(path)) not in files:
            raise FileNotFoundError(path)
        return files[Path(os.path.normpath(path))]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96), raising=False)
    assert machine.count_cores() == expected


def test_the_kind_of_a_cpu_changes_with_what_it_can_do(monkeypatch):
    def kind(text):
        monkeypatch.setattr(Path, "read_text", lambda path: text)
        return machine.cpu_kind()

    old, new = (
        "processor : {}\nmodel name : A\nflags : sse" + more + "\ncpu MHz : {}\n" for more in ("", " avx")
    )
    assert kind(old.format(0, 2000)) == kind(old.format(1, 2100)) != kind(new.format(0, 2000))


@pytest.fixture
def machine_with(monkeypatch):
    """Puts in so many GPUs and TPU chips, on a machine where nobody has chosen CPUs."""

    def put(gpus, chips):
        machine.say_once.cache_clear()
        monkeypatch.setattr(hardware_utils, "has_visible_nvidia_gpu", lambda: gpus > 0)
        monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (chips, None))

    before = jax.config.jax_platforms
    jax.devices()
    jax.config.update("jax_platforms", None)
    yield put
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("gpus, chips, name", [(1, 0, "cuda13"), (0, 4, "tpu"), (0, 0, None)])
def test_an_accelerator_that_is_not_used_is_a_note(gpus, chips, name, machine_with, capsys):
    machine_with(gpus, chips)
    machine.note_unused_accelerator()
    out = capsys.readouterr().out
    if name is None:
        assert not out
    else:
        assert out.startswith("note: ") and f"pip install 'jax[{name}]=={jax.__version__}'" in out


@pytest.mark.parametrize("choice", ["JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"])
def test_cpus_that_were_chosen_need_no_note(choice, machine_with, monkeypatch, capsys):
    machine_with(1, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if choice == "CUDA_VISIBLE_DEVICES" else "0")
    if choice == "JAX_PLATFORMS":
        jax.config.update("jax_platforms", "cpu")
    machine.note_unused_accelerator()
    assert not capsys.readouterr().out


MEMORY = {
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 42949672960 bytes.": "40 GiB (42949672960 b",
    "RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB (2147483648B) on device 0": "2 GiB (2147",
    "RESOURCE_EXHAUSTED: Attempting to reserve 12.21G at the bottom of memory.": "reserve 12.21G",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.51G of 15.48G hbm.": "20.51G of",
    "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory": "CUDA_ERROR_OUT_OF_MEMORY",
}


@pytest.mark.parametrize("message", MEMORY)
@pytest.mark.parametrize("flag", ["", "--config."])
def test_full_memory_is_one_line_with_what_needs_less(message, flag):
    with pytest.raises(RunError) as raised, errors.outside_errors_as_run_errors(flag):
        raise jax.errors.JaxRuntimeError(message)
    line = str(raised.value)
    assert line.startswith("out of memory: ") and MEMORY[message] in line and "\n" not in line
    assert all(f" {flag}{key}" in line for key in ("batch_size", "microbatches", "remat=True"))
    assert "python -m simclr_jax.plan" in line


@pytest.mark.parametrize(
    "message", ["INVALID_ARGUMENT: shapes differ", "RESOURCE_EXHAUSTED: too many messages"]
)
def test_other_errors_of_devices_stay_as_they_are(message):
    with pytest.raises(jax.errors.JaxRuntimeError), errors.outside_errors_as_run_errors():
        raise jax.errors.JaxRuntimeError(message)


FULL = [
    "{{function_node __wrapped__FlushSummaryWriter_device_/job}} /run/events.v2; No space left on device "
    "[Op:FlushSummaryWriter] name: ",
    "Error writing local file: [OS error 28: ENOSPC No space left on device]",
]


@pytest.mark.parametrize("message", FULL)
def test_a_full_disk_is_named_as_such(message):
    error = type("ResourceExhaustedError", (Exception,), {})(message)
    assert errors.reason_of(error) == "No space left on device" and errors.is_full(error)
    assert "__wrapped__" not in errors.reason_of(Exception(message.replace("No space left", "Nothing")))


def test_a_command_leaves_no_temporary_files(tmp_path):
    script = "import tempfile; from simclr_jax.process import console; console.keep_temporary_files_apart()\n"
    script += "tempfile.NamedTemporaryFile(delete=False)\n"
    for end in ("", "console.end_process(0)"):
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", script + end], env=environment, check=True)
        assert not os.listdir(tmp_path)


def test_compiled_programs_are_kept_for_the_user_and_for_remote_workdirs_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(machine.folder_of_programs("runs/a"))
    assert folder == Path(machine.folder_of_programs("runs/b")) and folder.is_relative_to(tmp_path)
    (folder / "new").touch()
    (folder / "old").touch()
    (folder / "other").mkdir()
    os.utime(folder / "other", (0, 0))
    os.utime(folder / "old", (0, 0))
    machine.folder_of_programs("runs/a")
    assert [path.name for path in folder.iterdir()] in (["new", "other"], ["other", "new"])
    assert machine.folder_of_programs("gs://bucket/run").startswith("gs://bucket/run/compiled/")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert machine.folder_of_programs("runs/a").startswith("runs/a/compiled/")


@pytest.mark.parametrize(
    "rows, flags, expected", [(12, "", 4), (6, "", 3), (7, "", 1), (2, "", 2), (12, xla_flags(8), 8)]
)
def test_a_cpu_is_as_many_devices_as_cores_that_divide_the_batch(rows, flags, expected):
    script = "import sys, jax; from simclr_jax.process import machine; machine.count_cores = lambda: 4\n"
    script += "machine.use_cores(int(sys.argv[1])); print(jax.device_count())\n"
    script += "machine.use_cores(1); assert jax.device_count() == int(jax.devices()[-1].id) + 1"
    command = [sys.executable, "-c", script, str(rows)]
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected
