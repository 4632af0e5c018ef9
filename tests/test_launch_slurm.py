"""slurm.sh and the job that it submits, with stand-ins for Slurm."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from test_launch import CHECK, MAKE_VENV, NASTY, StandIns

pytestmark = pytest.mark.slow

SIZE = ("--nodes=2", "--gpus_per_node=8", "--time=24:00:00")
MAIN = ("--", "--config=configs/digits.py", "--workdir=my run")


@pytest.fixture
def slurm(tmp_path):
    stand_ins = StandIns(tmp_path, "sbatch", "srun", "scontrol", "python3")
    stand_ins.rule("-m venv", MAKE_VENV)
    return stand_ins


def test_submits_one_job(slurm):
    out, _ = slurm.run("slurm.sh", *SIZE, *MAIN, NASTY)
    assert slurm.calls("sbatch") == [
        [
            "sbatch",
            "--nodes=2",
            "--gpus-per-node=8",
            "--ntasks-per-node=8",
            "--time=24:00:00",
            "--signal=TERM@120",
            "--requeue",
            "--open-mode=append",
            "--output=my run/slurm-%j.log",
            f"{slurm.root}/launch/slurm_job.sh",
            str(slurm.root),
            "my run",
            *MAIN[1:],
            NASTY,
        ]
    ]
    assert (slurm.root / "my run").is_dir() and "the log is my run/slurm-JOB.log" in out


def test_prepares_the_environment_once_before_it_submits(slurm):
    slurm.run("slurm.sh", *SIZE, *MAIN)
    names = [" ".join(call[:3]) for call in slurm.calls() if "-c" not in call]
    verbs = ["python3 -m venv", "python -m pip", "python -m simclr_jax.check", "sbatch"]
    assert [name.split(" --")[0] for name in names] == verbs
    pip = next(call for call in slurm.calls() if "pip" in call)
    assert f"--requirement={slurm.root}/launch/requirements-gpu.txt" in pip
    slurm.forget()
    slurm.run("slurm.sh", *SIZE, *MAIN)
    assert not [call for call in slurm.calls() if "pip" in call]


def test_does_not_submit_without_an_environment(slurm):
    slurm.forget()
    slurm.rule("-c import sys", "1 ")
    _, err = slurm.run("slurm.sh", *SIZE, *MAIN, code=2)
    assert "no Python 3.11 or newer" in err and not slurm.calls("sbatch")


def test_passes_further_settings_on(slurm):
    settings = {"partition": "a b", "account": "$HOME", "qos": "q;x", "constraint": "a&b"}
    settings |= {"cpus_per_task": "12", "mem": "0", "job_name": "it's"}
    options = [f"--{name}={value}" for name, value in settings.items()]
    slurm.run("slurm.sh", *options, *SIZE, "--", MAIN[1], "--workdir=50%")
    call = slurm.calls("sbatch")[0]
    assert call[8:16] == ["--output=50%%/slurm-%j.log"] + [
        f"--{name.replace('_', '-')}={value}" for name, value in settings.items()
    ]


def test_finds_configs_from_any_folder(slurm):
    script = slurm.root / "launch/slurm.sh"
    subprocess.run(["bash", script, *SIZE, *MAIN], cwd=slurm.home, env=slurm.env, check=True)
    assert f"--config={slurm.root}/configs/digits.py" in slurm.calls("sbatch")[0]


@pytest.mark.parametrize("options", [(), ("--partition=a b",)])
def test_dry_run_prints_what_is_run(slurm, options):
    slurm.run("slurm.sh", *SIZE, *MAIN)
    (slurm.home / "calls").write_text("")
    shutil.rmtree(slurm.root / "my run")
    slurm.run("slurm.sh", *SIZE, *options, *MAIN, NASTY)
    slurm.check_dry_run("slurm.sh", *SIZE, *options, *MAIN, NASTY)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((*SIZE[1:], *MAIN), "--nodes is missing: give --nodes=2"),
        ((SIZE[0], SIZE[2], *MAIN), "--gpus_per_node is missing: give --gpus_per_node=8"),
        ((*SIZE[:2], *MAIN), "--time is missing: give --time=24:00:00"),
        ((SIZE[0], "--gpus_per_node=a100:8", SIZE[2], *MAIN), "--gpus_per_node=a100:8 is no number: "),
        ((*SIZE[:2], "--time=1day", *MAIN), "--time=1day is no time: "),
        ((*SIZE[:2], "--time=24h", *MAIN), "--time=24h is no time: "),
        (("--nodes=two", *SIZE[1:], *MAIN), "--nodes=two is no number: "),
        ((*SIZE, *MAIN[:2]), "--workdir is missing: give a folder that all nodes share"),
        ((*SIZE, *MAIN[:2], "--workdir=gs://b/r"), "--workdir=gs://b/r is no folder: "),
        ((*SIZE, "--", *MAIN[2:]), "--config is missing: "),
        ((*SIZE, "--gpus=8", *MAIN), "--gpus is unknown: "),
        ((*SIZE, *MAIN[1:]), "--config=configs/digits.py is an argument of main: "),
    ],
)
def test_refuses(slurm, arguments, error):
    assert slurm.refused("slurm.sh", *arguments).startswith(f"error: {error}")


@pytest.mark.parametrize("time", ["90", "90:30", "24:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_takes_every_format_of_a_time(slurm, time):
    slurm.run("slurm.sh", *SIZE[:2], f"--time={time}", *MAIN)
    assert f"--time={time}" in slurm.calls("sbatch")[0]


@pytest.mark.parametrize("options", [(), ("--dry_run",)])
def test_what_check_refuses_is_not_submitted(slurm, options):
    slurm.run("slurm.sh", *SIZE, *MAIN)
    slurm.forget()
    slurm.rule("simclr_jax.check", "sh echo 'error: no' >&2; exit 2")
    _, err = slurm.run("slurm.sh", *options, *SIZE, *MAIN, NASTY, code=2)
    assert err == "error: no\n" and not slurm.calls("sbatch")
    (checked,) = [call for call in slurm.calls() if call[:3] == CHECK]
    assert checked[3:] == ["--nodes=2", "--gpus_per_node=8", *MAIN[1:], NASTY]


def test_cores_are_asked_for_where_none_are_given(slurm):
    assert "give --cpus_per_task=N" in slurm.run("slurm.sh", *SIZE, *MAIN)[1]
    assert not slurm.run("slurm.sh", "--cpus_per_task=12", *SIZE, *MAIN)[1]


def test_cuda_12_can_be_chosen(slurm):
    slurm.run("slurm.sh", *SIZE, *MAIN, ACCELERATOR="gpu12")
    pip = next(call for call in slurm.calls() if "pip" in call)
    assert f"--requirement={slurm.root}/launch/requirements-gpu12.txt" in pip


# The job.


def start_job(slurm, **env):
    """Starts what slurm.sh submits as Slurm does: a copy of the script, elsewhere."""
    slurm.run("slurm.sh", *SIZE, *MAIN, NASTY)
    submitted = slurm.calls("sbatch")[0]
    (slurm.home / "calls").write_text("")
    script = next(i for i, word in enumerate(submitted) if word.endswith("slurm_job.sh"))
    shutil.copy(submitted[script], slurm.home / "spooled")
    return slurm.start(
        "bash", str(slurm.home / "spooled"), *submitted[script + 1 :], SLURM_JOB_ID="42", **env
    )


def run_job(slurm, **env):
    process = start_job(slurm, **env)
    process.communicate(timeout=60)
    return process.returncode


REQUEUE = [["scontrol", "requeue", "42"]]
FINISH = 'sh echo {} >"my run/summary.json"'


@pytest.mark.parametrize(
    ("srun", "code", "requeued"),
    [("0 saved", 0, REQUEUE), (FINISH, 0, []), ("2 ", 2, []), ("143 ", 143, [])],
)
def test_job_is_queued_again_only_where_it_is_unfinished(slurm, srun, code, requeued):
    slurm.rule("srun", srun)
    assert run_job(slurm) == code
    assert slurm.calls("scontrol") == requeued and len(slurm.calls("srun")) == 1


def test_job_that_fails_beside_an_old_summary_tells_so(slurm):
    slurm.rule("srun", FINISH + "; exit 1")
    assert run_job(slurm) == 1 and not slurm.calls("scontrol")


@pytest.mark.parametrize("cpus", [{}, {"SLURM_CPUS_PER_TASK": "12"}])
def test_job_runs_main_in_every_process(slurm, cpus):
    slurm.rule("srun", 'sh while [[ $1 == --* ]]; do shift; done; "$@"')
    slurm.rule("simclr_jax.main", 'sh echo "$PYTHONPATH" >"$home/path"; ' + FINISH[3:])
    assert run_job(slurm, **cpus) == 0
    srun, main = slurm.calls()
    python = [f"{slurm.root}/.venv/bin/python", "-m", "simclr_jax.main", *MAIN[1:], NASTY]
    options = ["--gpu-bind=none", "--kill-on-bad-exit=1", *(["--cpus-per-task=12"] if cpus else [])]
    assert srun == ["srun", *options, *python]
    assert main == ["python", *python[1:]]
    assert (slurm.home / "path").read_text() == f"{slurm.root}\n"


def test_a_job_that_is_cancelled_waits_and_is_not_queued_again(slurm):
    slurm.rule("srun", 'sh trap : TERM; sleep 0.5; touch "$home/saved"')
    process = start_job(slurm)
    deadline = time.monotonic() + 20
    while not slurm.calls("srun"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143 and (slurm.home / "saved").exists() and not slurm.calls("scontrol")
