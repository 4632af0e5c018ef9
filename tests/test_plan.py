"""The planner, as a user runs it, and what it says of plans."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver
from conftest import tiny_config

from simclr_jax.config import command_line
from simclr_jax.plan import __main__ as plan_main
from simclr_jax.plan import cost, forecast, topologies

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = ["--config=configs/digits.py", "--config.model.width=0.125"]


def run(*arguments, code):
    done = subprocess.run(
        [sys.executable, "-m", "simclr_jax.plan", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def a_plan(kind="TPU v5 lite", *, parameters=30e6, **memory):
    return {
        "devices": 4,
        "hosts": 1,
        "kind": kind,
        "parameters": int(parameters),
        "num_steps": 100,
        "flops": 1e12,
        "bytes": 1e9,
        "collectives": {"psum": (3, 1e6)},
        "memory": {name: size * cost.GIB for name, size in memory.items()},
    }


def config_of(batch_size=4096):
    return tiny_config("pretrain", batch_size=batch_size)


def test_what_fits_needs_no_remedy():
    assert forecast.remedy(a_plan(arguments=2, temporaries=13), config_of()) is None
    assert forecast.remedy(a_plan("cpu", arguments=2, temporaries=1300), config_of()) is None


@pytest.mark.parametrize(
    "memory, batch_size, advice",
    [
        (
            {"refused": 20},
            4096,
            "set --config.microbatches=2, set --config.remat=True, lower ",
        ),
        ({"refused": 416}, 4096, "set --config.microbatches=64, "),
        ({"arguments": 4, "temporaries": 13}, 4096, "set --config.microbatches=2, "),
        ({"refused": 416}, 8, "set --config.remat=True, lower --config.batch_size, or take more devices"),
    ],
)
def test_what_does_not_fit_names_the_setting(memory, batch_size, advice):
    assert advice in forecast.remedy(a_plan(**memory), config_of(batch_size))


def test_what_is_set_already_is_not_advised():
    config = config_of()
    config.update(microbatches=4, remat=True)
    advice = forecast.remedy(a_plan(refused=20), config)
    assert advice == "set --config.microbatches=8, lower --config.batch_size, or take more devices"


def test_comparison_has_the_plain_step_and_both_remedies():
    config = config_of()
    forms = [(name, form.microbatches, form.remat) for name, form in plan_main._forms(config)]
    assert forms == [("plain", 1, False), ("remat", 1, True), ("8 microbatches", 8, False)]
    config.microbatches = 64
    assert list(plan_main._forms(config))[2][1].microbatches == 64 and config.microbatches == 64


def test_parts_do_not_help_where_the_views_alone_are_too_many():
    config = config_of(4 * 32768)
    config.update(image_size=224, microbatches=512, remat=True)
    advice = forecast.remedy(a_plan(refused=26.64), config)
    assert "views 18.4" in advice and "--config.batch_size" in advice and "microbatches" not in advice


def test_too_large_a_network_is_told_so():
    assert "--config.model.width" in forecast.remedy(a_plan(parameters=1.5e9, refused=40), config_of())


def test_description_has_every_figure():
    lines = forecast.describe(a_plan(arguments=2, temporaries=3), config_of(), images_per_core=lambda: 100)
    assert lines["memory"] == "5.00 of 16 GiB a device: 2.00 arguments, 3.00 temporaries"
    assert lines["collectives"] == "3 psum of 1.00 MB"
    # 1.5 times compute and memory, and the links.
    expected = "9.5 ms expected; 5.1 at the chip's peaks (compute 5.08, memory 1.22, links 0.01)"
    assert lines["step"] == expected
    assert lines["run"] == "100 steps, 0.0 hours expected, 0.0 device-hours"
    assert re.match(r"433,29\d images/s a host .*: 4,333 cores .*on_device=True", lines["input"])
    on_device = config_of()
    on_device.augment.on_device = True
    lines = forecast.describe(a_plan(arguments=2, temporaries=3), on_device, images_per_core=lambda: 100)
    assert "on_device" not in lines["input"]
    resident = forecast.describe(a_plan(arguments=2, images=0.5), config_of(), images_per_core=None)
    assert resident["memory"].endswith(", 0.50 images") and resident["input"].endswith("made by its devices")
    refused = forecast.describe(a_plan(refused=416), config_of(), images_per_core=None)
    assert refused["memory"] == "416.00 of 16 GiB a device: 416.00 refused"


def test_local_devices_are_planned_for():
    out = run(*TINY, "--topology=local", code=0)
    assert re.search(r"devices +8 x cpu, 1 host", out) and out.endswith("compiles\n")
    assert re.search(r"batch +256 images, 32 a device", out)


def test_only_pretraining_is_planned():
    out = run("--config=configs/digits.py:linear_eval", code=2)
    assert out.startswith("error: ") and "linear_eval" in out and out.count("\n") == 1


@pytest.fixture(scope="module")
def libtpu(monkeypatch_module):
    """The TPU compiler, beside the environment: jax would look for TPUs with one inside it."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("libtpu is for Linux on x86_64")
    folder = Path(sys.prefix) / "libtpu"
    library = folder / "libtpu" / "libtpu.so"
    if not library.exists():
        wanted = next(r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")).split(";")[0]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}", wanted]
        subprocess.run(pip, check=True)
    monkeypatch_module.setenv("TPU_LIBRARY_PATH", str(library))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.journey
def test_a_tpu_topology_is_compiled_for(libtpu):
    out = run(*TINY, "--topology=v4:2x2x1,v5e:4x4", code=0)
    head, _, *rows = out.splitlines()
    assert head.count("|") == 12
    assert "4 x TPU v4 | 64 |" in rows[0] and "16 x TPU v5 lite | 16 |" in rows[1]


@pytest.mark.journey
def test_what_a_tpu_cannot_hold_is_refused(libtpu):
    sizes = ["--config.batch_size=1432", "--config.image_size=640"]
    out = run(*TINY, "--topology=v5e:1x1", *sizes, code=1)
    assert re.search(r"1432 a device", out)
    assert re.search(r"does not fit: set --config.microbatches=\d+, set --config.remat=True", out)


@pytest.fixture(scope="module")
def gpu_compiler(monkeypatch_module):
    """The compiler for GPUs, beside the environment."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("jax-cuda13-pjrt is for Linux")
    folder = Path(sys.prefix) / "pjrt"
    if not (folder / "jax_plugins").exists():
        wanted = f"jax-cuda13-pjrt=={importlib.metadata.version('jax')}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}", wanted]
        subprocess.run(pip, check=True)
    monkeypatch_module.setenv("PYTHONPATH", str(folder))


@pytest.mark.journey
def test_gpus_that_are_not_here_are_compiled_for(gpu_compiler):
    """Quietly, and in bfloat16, as they would: half the traffic of float32."""
    sizes = ["--config.batch_size=4096", "--config.image_size=96", "--config.dataset.num_examples=4096"]
    sizes.append("--config.dataset.on_device=False")  # views made in the step are float32 in both
    out = run(*TINY, *sizes, "--topology=h200:2x8", code=0)
    assert "devices      16 x NVIDIA H200 141GB HBM3e, 2 host(s)\n" in out and out.endswith("fits\n")
    assert "cuda" not in out.lower() and re.search(r" of 105.7 GiB a device", out)
    traffic = [
        float(re.search(r"traffic +([\d.]+) GB", printed)[1])
        for printed in (
            out,
            run(*TINY, *sizes, "--topology=h200:2x8", "--config.model.dtype=float32", code=0),
        )
    ]
    assert traffic[0] < 0.7 * traffic[1]


@pytest.mark.journey
def test_what_a_gpu_cannot_hold_does_not_fit(gpu_compiler):
    """Its compiler refuses nothing."""
    sizes = ["--config.batch_size=131072", "--config.image_size=128", "--config.dataset.num_examples=140000"]
    out = run(*TINY, "--topology=a100:1", *sizes, code=1)
    assert "does not fit: set --config.microbatches=" in out


def test_unknown_topologies_are_one_line_before_a_compiler_is_asked_for(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    out = run(*TINY, "--topology=h100:8,v9:2x2", code=2)
    assert out.startswith("error: --topology=v9:2x2 is unknown") and out.count("\n") == 1


@pytest.mark.journey
@pytest.mark.parametrize("gpu", sorted(path.stem for path in topologies.TARGETS.iterdir()))
def test_every_gpu_is_compiled_for_and_its_peaks_are_known(gpu, gpu_compiler):
    out = run(*TINY, f"--topology={gpu}:1", "--config.dataset.on_device=False", "--price=100", code=0)
    assert out.endswith("fits\n") and " USD) device-hours\n" in out


def test_the_chain_has_a_row_for_each_task():
    out = run(*TINY, "--topology=local", "--chain", "--config.image_size=16", code=0)
    rows = [line.split("|")[1:4] for line in out.splitlines()[2:]]
    names = ["", " linear_eval", " finetune", " distill"]
    assert [name.strip() for name, *_ in rows] == [f"digits local{name}" for name in names]


def test_the_chain_keeps_the_network_but_for_the_student(monkeypatch):
    monkeypatch.chdir(ROOT)
    with flagsaver.flagsaver():
        changes = ["--config.model.depth=34", "--config.batch_size=8", "--config.dataset.on_device=False"]
        command_line.parse(["plan", "--config=configs/imagenet.py", "--config.image_size=96", *changes])
        config = command_line.read_config()
        chain = {name: (task, teacher) for name, task, teacher in plan_main._chain(config)}
    assert [task.model.depth for task, _ in chain.values()] == [34, 34, 50]
    assert [teacher and teacher.depth for _, teacher in chain.values()] == [None, None, 34]
    assert {task.image_size for task, _ in chain.values()} == {96}
    assert 8 not in {task.batch_size for task, _ in chain.values()}


def test_without_the_compiler_for_gpus_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    out = run(*TINY, "--topology=h100:8", code=2)
    assert out.startswith(
        "error: --topology=h100:8 needs the compiler for GPUs: pip install --no-deps jax-cuda"
    )
    assert out.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_without_the_compiler_one_line_says_how_to_get_it():
    environment = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}
    command = [sys.executable, "-m", "simclr_jax.plan", *TINY, "--topology=v4:2x2x1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "pip install 'jax[tpu]'" in done.stderr and done.stderr.count("\n") == 1
