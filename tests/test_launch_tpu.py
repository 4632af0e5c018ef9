"""tpu.sh and what it runs on the workers, with a stand-in for gcloud."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from test_launch import CHECK, MAKE_VENV, NASTY, StandIns

pytestmark = pytest.mark.slow

MACHINE = ("--name=simclr", "--zone=us-central2-b")
V4 = ("--accelerator_type=v4-8",)
MAIN = ("--", "--config=configs/digits.py", "--workdir=gs://bucket/run")
SUMMARY = r"0 gs://bucket/run/summary.json\n"
DELETE = "bash launch/tpu.sh delete --name=simclr --zone=us-central2-b\n"
THERE = f"== simclr is still there and costs money until you delete it:\n{DELETE}"
PERHAPS = f"== simclr may be there and cost money until you delete it:\n{DELETE}"
# The words by which `kinds` tells a call of gcloud, tried in this order.
KINDS = {
    "summary": "storage objects list",
    "queue": "queued-resources list",
    "machine": "tpu-vm list",
    "create": " create ",
    "delete": " delete ",
    "scp": "tpu-vm scp",
    "install": "tpu_worker.sh install",
    "start": "tpu_worker.sh start",
    "stop": "tpu_worker.sh stop",
    "state": "tpu_worker.sh state",
    "tail": "tail",
}


@pytest.fixture
def cloud(tmp_path):
    stand_ins = StandIns(tmp_path, "gcloud", "python3")
    stand_ins.env["TPU_POLL_SECONDS"] = "0.01"
    python = stand_ins.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    shutil.copy(stand_ins.path / "python3", python)
    (stand_ins.root / "simclr_jax").mkdir()
    return stand_ins


def answer(cloud, **answers):
    """Sets the answers of gcloud to calls of a kind, one after the other."""
    for kind, sequence in answers.items():
        cloud.rule(KINDS[kind], *([sequence] if isinstance(sequence, str) else sequence))


def kinds(cloud, *, but=("summary", "queue", "machine", "state")):
    """The kinds of the calls of gcloud so far, in order, without those that only look."""
    kinds = [
        next(kind for kind, words in KINDS.items() if words in " ".join(call))
        for call in cloud.calls("gcloud")
    ]
    return [kind for kind in kinds if kind not in but]


def command_of(call):
    return call[-1].removeprefix("--command=")


# The exact calls.

LISTS = [
    "gcloud compute tpus queued-resources list --zone=us-central2-b --quiet"
    " --filter=name~/queuedResources/simclr$ --format=value(state.state)",
    "gcloud compute tpus tpu-vm list --zone=us-central2-b --quiet"
    " --filter=name~/nodes/simclr$ --format=value(state)",
]
SSH = "gcloud compute tpus tpu-vm ssh simclr --zone=us-central2-b --quiet --ssh-flag=-oServerAliveInterval=30"
STATE = f"{SSH} --worker=all --command=bash simclr/launch/tpu_worker.sh state 2>/dev/null || echo absent"


def lines(cloud):
    return [" ".join(call) for call in cloud.calls("gcloud")]


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-4", "v2-alpha-tpuv6e"),
    ],
)
def test_create_makes_a_machine(cloud, accelerator, version):
    answer(cloud, queue="0 ", machine=["0 ", "0 READY"])
    _, err = cloud.run("tpu.sh", "create", *MACHINE, f"--accelerator_type={accelerator}")
    create = "gcloud compute tpus tpu-vm create simclr --zone=us-central2-b --quiet"
    create += f" --accelerator-type={accelerator} --version={version}"
    assert lines(cloud) == [*LISTS, create, *LISTS]
    assert err == THERE


def test_create_takes_settings_from_the_environment(cloud):
    answer(cloud, queue="0 ", machine=["0 ", "0 READY"])
    settings = {"NAME": "mine", "ZONE": "here", "ACCELERATOR_TYPE": "v9-8", "PROJECT": "my project"}
    env = {f"TPU_{name}": value for name, value in settings.items()}
    _, err = cloud.run("tpu.sh", "create", "--zone=there", "--spot", TPU_RUNTIME_VERSION="new", **env)
    create = "gcloud compute tpus tpu-vm create mine --zone=there --project=my project --quiet"
    assert lines(cloud)[2] == f"{create} --accelerator-type=v9-8 --version=new --spot"
    assert err.endswith(r"delete --name=mine --zone=there --project=my\ project" + "\n")


def test_create_waits_in_the_queue(cloud):
    waiting = ["0 WAITING_FOR_RESOURCES"] * 3
    answer(cloud, queue=["0 ", *waiting, "0 PROVISIONING", "0 ACTIVE"], machine=["0 "] * 5 + ["0 READY"])
    out, err = cloud.run("tpu.sh", "create", *MACHINE, *V4, "--queued", "--spot")
    create = "gcloud compute tpus queued-resources create simclr --zone=us-central2-b --quiet"
    create += " --node-id=simclr --accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base --spot"
    assert lines(cloud) == [*LISTS, create, *LISTS * 5]
    assert out.count("WAITING_FOR_RESOURCES") == 1 and out.count("PROVISIONING") == 1
    assert err == THERE


def test_create_ends_where_the_queue_fails(cloud):
    answer(cloud, queue=["0 ", "0 WAITING_FOR_RESOURCES", "0 FAILED"], machine="0 ")
    _, err = cloud.run("tpu.sh", "create", *MACHINE, *V4, "--queued", code=1)
    assert err.startswith("error: simclr is not ready (queued resource FAILED, machine none): ")
    assert err.endswith(THERE)


def test_create_leaves_a_machine_alone(cloud):
    answer(cloud, queue="0 ", machine="0 READY")
    cloud.run("tpu.sh", "create", *MACHINE, *V4)
    assert lines(cloud) == LISTS


def test_install_copies_the_tree_and_prepares_it(cloud):
    answer(cloud, queue="0 ", machine="0 READY", state="0 absent")
    others = (".git/HEAD", ".venv/lib", "runs/a", "digits/1.png", "photos/2.png")
    for name in ("simclr_jax/runs/kept.py", "a b/c", *others):
        (cloud.root / name).parent.mkdir(parents=True, exist_ok=True)
        (cloud.root / name).touch()
    out, err = cloud.run(
        "tpu.sh", "install", *MACHINE, "--", "--config.dataset.path=a b", "--workdir=gs://b/r"
    )
    assert " MB to all workers (launch configs simclr_jax requirements.txt a b)" in out
    archive = cloud.root / "build/simclr.tar.gz"
    assert lines(cloud)[:-1] == [
        *LISTS,
        STATE,
        f"gcloud compute tpus tpu-vm scp {archive} simclr:simclr.tar.gz --zone=us-central2-b --quiet"
        " --scp-flag=-oServerAliveInterval=30 --worker=all",
    ]
    assert lines(cloud)[-1].startswith(f"{SSH} --worker=all --command=mkdir -p simclr && ")
    assert err == THERE
    packed = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True).stdout.split("\n")
    assert {"launch/tpu_worker.sh", "simclr_jax/runs/kept.py", "a b/c"} <= set(packed)
    assert not set(others) & set(packed)


def test_run_starts_the_training_on_all_workers(cloud):
    answer(cloud, queue="0 ", machine="0 READY", state=r"0 exited 2\nabsent\n")
    out, err = cloud.run("tpu.sh", "run", *MACHINE, *MAIN)
    start = "bash simclr/launch/tpu_worker.sh start --config=configs/digits.py --workdir=gs://bucket/run"
    assert lines(cloud) == [*LISTS, STATE, f"{SSH} --worker=all --command={start}"]
    assert "bash launch/tpu.sh log --name=simclr" in out and err == THERE


@pytest.mark.parametrize("verb", ["run", "install"])
def test_a_training_is_not_disturbed(cloud, verb):
    answer(cloud, queue="0 ", machine="0 READY", state=r"0 running\nrunning\n")
    _, err = cloud.run("tpu.sh", verb, *MACHINE, *MAIN, code=1)
    assert err == f"error: a training runs on simclr already: watch, log or stop it\n{THERE}"
    assert not kinds(cloud)


def test_log_follows_worker_0(cloud):
    answer(cloud, queue="0 ", machine="0 READY", tail=r"0 step 7\n")
    out, err = cloud.run("tpu.sh", "log", *MACHINE)
    assert lines(cloud) == [*LISTS, f"{SSH} --worker=0 --command=tail -n 100 -F simclr_run/log"]
    assert out == "step 7\n" and err == THERE


def test_stop_tells_that_the_machine_costs(cloud):
    answer(cloud, queue="0 ", machine="0 READY", stop=r"0 stopped\nstopped\n")
    out, err = cloud.run("tpu.sh", "stop", *MACHINE)
    assert lines(cloud) == [*LISTS, f"{SSH} --worker=all --command=bash simclr/launch/tpu_worker.sh stop"]
    assert "== training: 2 stopped\n" in out and err == THERE


def test_stop_tells_of_a_training_that_goes_on(cloud):
    answer(cloud, queue="0 ", machine="0 READY", stop=r"0 stopped\nrunning\nrunning\n")
    out, err = cloud.run("tpu.sh", "stop", *MACHINE, code=1)
    assert "== training: 2 running, 1 stopped\n" in out
    assert err.startswith("error: it still runs after two minutes: ") and err.endswith(THERE)


def test_status_tells_the_states(cloud):
    answer(cloud, queue="0 ACTIVE", machine="0 READY", state=r"0 running\nexited 1\nrunning\n")
    out, err = cloud.run("tpu.sh", "status", *MACHINE)
    assert out == ("== simclr: queued resource ACTIVE, machine READY\n== training: 2 running, 1 exited 1\n")
    assert lines(cloud) == [*LISTS, STATE] and err == THERE


def test_status_of_nothing_costs_nothing(cloud):
    out, err = cloud.run("tpu.sh", "status", *MACHINE)
    assert out == "== simclr: queued resource none, machine none\n" and not err


@pytest.mark.parametrize(
    ("queue", "machine", "calls"),
    [
        ("", "READY", ["gcloud compute tpus tpu-vm delete simclr --zone=us-central2-b --quiet"]),
        (
            "SUSPENDED",
            "PREEMPTED",
            ["gcloud compute tpus queued-resources delete simclr --zone=us-central2-b --quiet --force"],
        ),
        ("", "", []),
    ],
)
def test_delete_deletes_what_there_is(cloud, queue, machine, calls):
    answer(cloud, queue=f"0 {queue}", machine=f"0 {machine}")
    _, err = cloud.run("tpu.sh", "delete", *MACHINE)
    assert lines(cloud) == [*LISTS, *calls] and not err


@pytest.mark.parametrize("verb", ["install", "run", "log", "stop"])
def test_verbs_want_a_machine_that_is_ready(cloud, verb):
    answer(cloud, queue="0 ", machine="0 REPAIRING")
    _, err = cloud.run("tpu.sh", verb, *MACHINE, *MAIN, code=1)
    assert err.startswith("error: simclr is not ready (queued resource none, machine REPAIRING): ")
    assert err.endswith(THERE) and lines(cloud) == LISTS


# The dry run.


@pytest.mark.parametrize("queued", [(), ("--queued", "--spot")])
@pytest.mark.parametrize("verb", ["create", "install", "run", "log", "stop", "status", "delete", "watch"])
def test_dry_run_prints_what_is_run(cloud, verb, queued):
    there = "0 ACTIVE" if queued else "0 "
    creates = verb in ("create", "watch")
    answer(
        cloud,
        summary=["0 ", "0 ", SUMMARY],
        queue=["0 ", there] if creates else there,
        machine=["0 ", "0 READY"] if creates else "0 READY",
        state="0 absent",
        stop="0 stopped",
    )
    arguments = (verb, *MACHINE, *V4, *queued, *MAIN, NASTY)
    cloud.run("tpu.sh", *arguments)
    cloud.check_dry_run("tpu.sh", *arguments)


# Refused arguments.


@pytest.mark.parametrize("options", [(), ("--dry_run",)])
@pytest.mark.parametrize(("accelerator", "topology"), [("v4-8", ["--topology=v4-8"]), ("v9-8", [])])
def test_what_check_refuses_creates_nothing(cloud, options, accelerator, topology):
    cloud.rule("simclr_jax.check", "sh echo 'error: no' >&2; exit 2")
    machine = [*MACHINE, f"--accelerator_type={accelerator}", "--runtime_version=new"]
    _, err = cloud.run("tpu.sh", "watch", *options, *machine, *MAIN, NASTY, code=2)
    assert err == "error: no\n"
    assert cloud.calls() == [[*CHECK, *topology, "--elsewhere", *MAIN[1:], NASTY]]


def test_without_an_environment_a_note_says_that_nothing_is_checked(cloud):
    shutil.rmtree(cloud.root / ".venv")
    answer(cloud, queue="0 ", machine="0 READY", state="0 absent")
    _, err = cloud.run("tpu.sh", "run", *MACHINE, *MAIN)
    assert err.startswith("note: the arguments of main are not checked: bash launch/environment.sh makes")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "the verb is missing: give one of watch create install run "),
        (("wach", *MACHINE), "'wach' is no verb: give one of watch create install run "),
        (("status", "--zone=z"), "--name is missing: give --name=simclr or set TPU_NAME"),
        (("status", "--name=n"), "--zone is missing: give --zone=us-central2-b or set TPU_ZONE"),
        (("status", "--name=n", "--zone="), "--zone is missing: "),
        (("status", "--name=My TPU", "--zone=z"), "--name=My TPU is no name of a machine: "),
        (("create", *MACHINE), "--accelerator_type is missing: give --accelerator_type=v4-8 or set TPU_"),
        (("watch", *MACHINE, *MAIN), "--accelerator_type is missing: "),
        (("create", *MACHINE, "--accelerator_type=v9-8"), "--runtime_version is missing: "),
        (("watch", *MACHINE, *V4, *MAIN[:1], *MAIN[2:]), "--config is missing: give it after --"),
        (("run", *MACHINE, *MAIN[:1], *MAIN[2:]), "--config is missing: give it after --"),
        (("run", *MACHINE, "--", "--config=/etc/hostname"), "--config=/etc/hostname is not in "),
        (("run", *MACHINE, *MAIN[:2]), "--workdir is missing: give it after --"),
        (("run", *MACHINE, *MAIN[:2], "--workdir", "runs/a"), "--workdir=runs/a goes when the machine is "),
        (("run", *MACHINE, *MAIN[1:]), "--config=configs/digits.py is an argument of main: "),
        (("status", *MACHINE, "--spott"), "--spott is unknown: "),
        (("status", *MACHINE, "--attempts=many"), "--attempts=many is no number: "),
    ],
)
def test_refuses(cloud, arguments, error):
    assert cloud.refused("tpu.sh", *arguments).startswith(f"error: {error}")


# Watching.


@pytest.mark.parametrize(
    ("options", "queue", "machine"),
    [
        ((), ["0 "], ["0 ", "0 READY", "0 READY", "0 PREEMPTED", "0 ", "0 READY"]),
        ((), ["0 "], ["0 ", "0 READY", "0 READY", "0 TERMINATED", "0 ", "0 READY"]),
        (
            ("--queued", "--spot"),
            ["0 ", "0 ACTIVE", "0 ACTIVE", "0 SUSPENDED", "0 ", "0 ACTIVE"],
            ["0 ", "0 READY", "0 READY", "0 ", "0 ", "0 READY"],
        ),
    ],
)
def test_watch_starts_again_after_a_preemption(cloud, options, queue, machine):
    running = r"0 running\nrunning\n"
    answer(cloud, summary=["0 "] * 7 + [SUMMARY], queue=queue, machine=machine)
    answer(cloud, state=["0 absent", running, "0 absent", running])
    out, err = cloud.run("tpu.sh", "watch", *MACHINE, *V4, *options, *MAIN)
    once = ["create", "scp", "install", "start"]
    assert kinds(cloud) == [*once, "delete", *once]
    assert "== lost: " in out and "== finished: gs://bucket/run/summary.json\n" in out
    assert err == THERE
    assert lines(cloud)[0] == (
        "gcloud storage objects list gs://bucket/run/summary.json"
        " --filter=-noncurrent_time:* --format=value(name)"
    )


def test_watch_creates_again_what_has_vanished(cloud):
    answer(cloud, summary=["0 "] * 4 + [SUMMARY], queue="0 ")
    answer(cloud, machine=["0 READY", "0 ", "0 READY"], state=["0 running", "0 absent"])
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN)
    assert kinds(cloud) == ["create", "scp", "install", "start"]


def test_watch_deletes_a_queued_resource_that_lost_its_machine(cloud):
    answer(cloud, summary=["0 "] * 3 + [SUMMARY], queue=["0 ACTIVE", "0 ", "0 ACTIVE"])
    answer(cloud, machine=["0 ", "0 ", "0 READY"], state="0 absent")
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, "--queued", *MAIN)
    assert kinds(cloud) == ["delete", "create", "scp", "install", "start"]


def test_watch_waits_for_what_is_on_its_way(cloud):
    waits = [("0 WAITING_FOR_RESOURCES", "0 "), ("0 PROVISIONING", "0 CREATING"), ("0 SUSPENDING", "0 READY")]
    waits += [("0 ", "0 REPAIRING"), ("0 ", "0 DELETING"), ("0 SUSPENDED", "0 DELETING")]
    waits += [("0 DELETING", "0 READY")]
    answer(cloud, summary=["0 "] * len(waits) + [SUMMARY])
    answer(cloud, queue=[queue for queue, _ in waits], machine=[machine for _, machine in waits])
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN)
    assert not kinds(cloud, but=("summary", "queue", "machine"))


def test_watch_forgets_failures_once_the_training_runs(cloud):
    answer(cloud, summary=["0 "] * 9 + [SUMMARY], queue="0 ", state="0 running")
    answer(cloud, machine=["0 READY", "0 READY", "0 PREEMPTED", "0 "] * 2 + ["0 READY"])
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, "--attempts=2", *MAIN)
    assert kinds(cloud) == ["delete", "create"] * 2


def test_watch_installs_again_after_a_repair(cloud):
    answer(cloud, summary=["0 "] * 5 + [SUMMARY], queue="0 ")
    answer(cloud, machine=["0 READY", "0 READY", "0 REPAIRING", "0 READY"])
    answer(cloud, state=["0 absent", "0 running", "0 exited 1", "0 running"])
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN)
    assert kinds(cloud) == ["scp", "install", "start"] * 2


def test_watch_of_a_finished_run_does_nothing(cloud):
    answer(cloud, summary=SUMMARY)
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN)
    assert kinds(cloud, but=()) == ["summary"]


def test_watch_joins_a_training_that_runs(cloud):
    answer(cloud, summary=["0 ", "0 ", SUMMARY], queue="0 ", machine="0 READY", state="0 running")
    out, _ = cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN)
    assert "a training runs on simclr already: watching it" in out and not kinds(cloud)


def test_watch_ends_at_a_user_error_and_shows_the_log(cloud):
    log = r"0 error: temperature=0\n"
    answer(cloud, summary="0 ", queue="0 ", machine="0 READY", tail=log)
    # The exit code of an earlier training does not count.
    answer(cloud, state=["0 exited 2", "0 running", r"0 exited 1\nexited 2\n"])
    out, err = cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN, code=2)
    assert kinds(cloud) == ["scp", "install", "start", "tail"]
    assert kinds(cloud, but=()).count("state") == 3
    assert cloud.calls()[-1][-2:] == ["--worker=0", "--command=tail -n 30 simclr_run/log"]
    assert out.endswith("error: temperature=0\n")
    assert err == f"error: the training exited 2 by itself: mend that, and watch again\n{THERE}"


def test_watch_waits_for_a_preemption_behind_a_crash(cloud):
    answer(cloud, summary=["0 "] * 6 + [SUMMARY], queue="0 ")
    answer(cloud, machine=["0 READY", "0 READY", "0 READY", "0 PREEMPTED", "0 ", "0 READY"])
    answer(cloud, state=["0 absent", "0 running", r"0 exited 134\nrunning\n", "0 absent"])
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN)
    begin = ["scp", "install", "start"]
    assert kinds(cloud) == [*begin, "delete", "create", *begin]


def test_watch_ends_at_a_crash(cloud):
    answer(cloud, summary="0 ", queue="0 ", machine="0 READY")
    answer(cloud, state=["0 absent", "0 running", r"0 exited 134\nrunning\n"])
    _, err = cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN, code=134)
    assert kinds(cloud) == ["scp", "install", "start", "tail"] and "exited 134" in err


@pytest.mark.parametrize("state", [r"running\nabsent\n", "exited 0"])
def test_watch_starts_what_was_cut_off(cloud, state):
    answer(cloud, summary=["0 "] * 5 + [SUMMARY], queue="0 ", machine="0 READY")
    answer(cloud, state=["0 absent", "0 running", f"0 {state}", f"0 {state}", "0 running"])
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN)
    assert kinds(cloud) == ["scp", "install", "start", "start"]


def test_watch_does_not_start_what_was_stopped(cloud):
    answer(cloud, summary="0 ", queue="0 ", machine="0 READY")
    answer(cloud, state=["0 absent", "0 running", "0 stopped"])
    _, err = cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN, code=1)
    assert err == f"error: the training was stopped: watch again to go on\n{THERE}"
    assert kinds(cloud) == ["scp", "install", "start"]


def test_watch_leaves_a_machine_that_is_off(cloud):
    answer(cloud, summary="0 ", queue="0 ", machine="0 STOPPED")
    _, err = cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN, code=1)
    assert "machine STOPPED" in err and not kinds(cloud)


def test_watch_outlasts_failures_of_gcloud(cloud):
    answer(cloud, summary=["1 ", "0 ", "0 ", "0 ", "0 ", "0 ", SUMMARY])
    answer(cloud, queue=["0 ", "1 ", "0 "], machine=["0 ", "0 ", "0 READY"])
    answer(cloud, create=["1 ", "0 "], install=["1 ", "0 "], state="0 absent")
    cloud.run("tpu.sh", "watch", *MACHINE, *V4, *MAIN)
    assert kinds(cloud) == ["create", "create", "scp", "install", "scp", "install", "start"]


def test_watch_gives_up_after_many_failures(cloud):
    answer(cloud, summary="0 ", queue="0 ", machine="0 ", create="1 ")
    _, err = cloud.run("tpu.sh", "watch", *MACHINE, *V4, "--attempts=3", *MAIN, code=1)
    assert kinds(cloud) == ["create"] * 3
    assert err == f"error: gave up after 3 failures in a row\n{PERHAPS}"


def test_a_failed_queue_does_not_loop_for_ever(cloud):
    answer(cloud, summary="0 ", machine="0 ", queue=["0 ", "0 FAILED"] * 9)
    _, err = cloud.run("tpu.sh", "watch", *MACHINE, *V4, "--queued", "--attempts=3", *MAIN, code=1)
    assert kinds(cloud) == ["create", "delete"] * 3 and "gave up" in err


# The reminder.


@pytest.mark.parametrize(
    ("verb", "failing"),
    [("create", "create"), ("install", "scp"), ("run", "start"), ("log", "tail"), ("stop", "stop")]
    + [("status", "machine"), ("delete", "delete"), ("install", "install")],
)
def test_a_failure_of_gcloud_ends_with_the_delete_command(cloud, verb, failing):
    answer(cloud, **{failing: "3 "})
    answer(cloud, queue="0 ", machine="0 " if verb == "create" else "0 READY", state="0 absent")
    _, err = cloud.run("tpu.sh", verb, *MACHINE, *V4, *MAIN, code=3)
    assert err == (PERHAPS if failing in ("create", "machine") else THERE)
    assert kinds(cloud, but=())[-1] == failing


@pytest.mark.parametrize(
    ("waits_for", "reminder"), [("create", PERHAPS), ("install", THERE), ("poll", THERE)]
)
def test_interrupting_ends_with_the_delete_command(cloud, waits_for, reminder):
    if waits_for != "poll":
        answer(cloud, **{waits_for: "sh exec sleep 30"})
    missing = waits_for == "create"
    answer(cloud, queue="0 ", machine="0 " if missing else "0 READY", state=["0 absent", "0 running"])
    process = cloud.start("bash", "launch/tpu.sh", "watch", *MACHINE, *V4, *MAIN, TPU_POLL_SECONDS="30")
    deadline = time.monotonic() + 20
    wanted = "start" if waits_for == "poll" else waits_for
    while wanted not in kinds(cloud) or (waits_for == "poll" and kinds(cloud, but=())[-1] != "state"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.endswith(reminder)


# The workers.


@pytest.fixture
def worker(cloud):
    """gcloud reaches one worker, a folder of this machine; its Python waits for SIGTERM as main does."""
    home = cloud.home / "worker"
    home.mkdir()
    cloud.rule("tpu-vm ssh", 'sh cd "$home/worker"; command=${!#}; HOME=$PWD bash -c "${command#--command=}"')
    cloud.rule("tpu-vm scp", 'sh cp "$5" "$home/worker/${6#*:}"')
    cloud.rule("queued-resources list", "0 ")
    cloud.rule("tpu-vm list", "0 READY")
    cloud.rule("uv python find", f"0 {cloud.path}/python3")
    cloud.rule("-m venv", MAKE_VENV)
    cloud.rule("simclr_jax.check", "0 ")
    cloud.rule("--seed=2", r"sh echo error: seed=2; exit 2")
    cloud.rule("simclr_jax.main", "sh trap 'echo saved; exit 0' TERM; while :; do sleep 0.02; done")
    yield home
    for file in home.glob("simclr_run/pid"):
        subprocess.run(["kill", "-KILL", "--", f"-{file.read_text().strip()}"], stderr=subprocess.DEVNULL)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def mains(cloud):
    return [call[3:] for call in cloud.calls("python") if call[2] == "simclr_jax.main"]


def status(cloud):
    return cloud.run("tpu.sh", "status", *MACHINE)[0].split("training: ")[1]


def test_a_worker_from_install_to_stop(cloud, worker):
    (cloud.root / "removed.txt").touch()
    cloud.run("tpu.sh", "install", *MACHINE)
    (cloud.root / "removed.txt").unlink()
    (worker / "simclr/.venv/kept").touch()
    cloud.run("tpu.sh", "install", *MACHINE)
    assert (worker / "simclr/.venv/kept").exists() and not (worker / "simclr/removed.txt").exists()
    asked = [" ".join(call[1:]) for call in cloud.calls() if "python" in call[0] and call[1] == "-m"]
    assert asked[:3] == [
        "-m pip install --quiet --user uv",
        "-m uv python install --quiet 3.12",
        "-m uv python find --managed-python 3.12",
    ]
    pip = next(line for line in asked if "--requirement=" in line)
    assert "requirements.txt" in pip and f"{worker}/simclr/launch/requirements-tpu.txt" in pip
    assert status(cloud) == "1 absent\n"

    before = len(cloud.calls())
    cloud.run("tpu.sh", "run", *MACHINE, *MAIN, NASTY)
    wait_for(lambda: mains(cloud))
    arguments = [f"--config={MAIN[1][9:]}", MAIN[2], NASTY]
    assert mains(cloud) == [arguments]
    assert not [call for call in cloud.calls()[before:] if "pip" in call]
    assert status(cloud) == "1 running\n"
    out, _ = cloud.run("tpu.sh", "stop", *MACHINE)
    assert "training: 1 stopped\n" in out and status(cloud) == "1 stopped\n"
    assert (worker / "simclr_run/exit_code").read_text() == "0\n"
    assert (worker / "simclr_run/log").read_text().endswith("saved\n")
    cloud.run("tpu.sh", "run", *MACHINE, *MAIN, "--seed=2")
    wait_for(lambda: "running" not in status(cloud))
    assert status(cloud) == "1 exited 2\n"


def test_a_worker_tells_what_the_program_exited_with(cloud, worker):
    cloud.run("tpu.sh", "install", *MACHINE)
    cloud.run("tpu.sh", "run", *MACHINE, *MAIN, "--seed=2")
    wait_for((worker / "simclr_run/exit_code").exists)
    assert status(cloud) == "1 exited 2\n"
    cloud.run("tpu.sh", "run", *MACHINE, *MAIN)
    wait_for(lambda: len(mains(cloud)) == 2)
    assert status(cloud) == "1 running\n"


def test_a_worker_ends_what_is_left_before_it_starts(cloud, worker):
    shutil.copytree(cloud.root, worker / "simclr")
    env = {**cloud.env, "HOME": str(worker), "BASE_PYTHON": str(cloud.path / "python3")}

    def start(seed):
        script = worker / "simclr/launch/tpu_worker.sh"
        subprocess.run(["bash", script, "start", f"--seed={seed}"], env=env, check=True)
        wait_for(lambda: [f"--seed={seed}"] in mains(cloud))
        return int((worker / "simclr_run/pid").read_text())

    first = start(3)
    second = start(4)
    assert first != second
    with pytest.raises(ProcessLookupError):
        os.killpg(first, 0)
    os.killpg(second, 0)


def test_a_worker_that_was_rebooted_knows_of_no_training(cloud, worker):
    shutil.copytree(cloud.root, worker / "simclr")
    (worker / "simclr_run").mkdir()
    (worker / "simclr_run/pid").write_text(f"{os.getpid()}\n")
    assert status(cloud) == "1 absent\n"


def test_remote_commands_survive_two_shells(cloud):
    answer(cloud, queue="0 ", machine="0 READY", state="0 absent")
    cloud.run("tpu.sh", "run", *MACHINE, *MAIN, NASTY, "--empty=", "--tab=a\tb")
    command = command_of(cloud.calls("gcloud")[-1])
    words = subprocess.run(
        ["bash", "-c", f"bash() {{ printf '%s\\0' \"$@\"; }}; {command}"], capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    assert words == ["simclr/launch/tpu_worker.sh", "start", *MAIN[1:], NASTY, "--empty=", "--tab=a\tb"]
