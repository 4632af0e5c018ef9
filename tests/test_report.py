"""The metrics file over restarts, and what the console shows."""

import json
import re
import threading
import time
from contextlib import closing

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simclr_jax.process.errors import UserError
from simclr_jax.workdir import report


def make_meter(workdir, start_step=0, log_every_steps=2, num_steps=8):
    config = ConfigDict({"log_every_steps": log_every_steps, "batch_size": 4})
    return report.Meter(workdir, config, start_step=start_step, num_steps=num_steps)


def run(meter, steps, loss=None):
    with closing(meter):
        for step in steps:
            value = jnp.float32(step if loss is None else loss)
            meter.add(
                step, {"loss": value, "gradient_norm": jnp.float32(1), "learning_rate": jnp.float32(step)}
            )
        meter.flush()


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_averages_and_the_current_learning_rate(tmp_path):
    run(make_meter(tmp_path), range(1, 5))
    assert [(line["step"], line["loss"], line["learning_rate"]) for line in lines(tmp_path)] == [
        (2, 1.5, 2.0),
        (4, 3.5, 4.0),
    ]


def test_metrics_are_read_one_step_late(tmp_path):
    meter = make_meter(tmp_path, log_every_steps=1)
    values = {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1), "learning_rate": jnp.float32(1)}
    meter.add(1, values)
    assert lines(tmp_path) == []
    meter.add(2, values)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    meter.close()


class Later:
    """A metric that devices have computed after some seconds."""

    def __init__(self, seconds):
        self.ready_at = time.monotonic() + seconds

    def block_until_ready(self):
        time.sleep(max(0.0, self.ready_at - time.monotonic()))

    def __float__(self):
        self.block_until_ready()
        return 1.0


@pytest.mark.parametrize(
    "step_seconds, least, most", [(0.11, 0.0, 0.1), (0.1, 0.0, 0.1), (0.03, 0.5, 0.8), (0.0, 0.6, 1.0)]
)
def test_devices_wait_for_data_only_while_they_are_idle(tmp_path, step_seconds, least, most):
    """The input takes 0.1 s a batch: devices whose step takes as long are busy, though the host waits."""
    with closing(make_meter(tmp_path, log_every_steps=8)) as meter:
        for step in range(1, 9):
            with meter.waiting_for_data():
                if step > 1:
                    time.sleep(0.1)
            meter.add(step, dict.fromkeys(("loss", "gradient_norm", "learning_rate"), Later(step_seconds)))
        meter.flush()
    (line,) = lines(tmp_path)
    assert least <= line["data_wait"] <= most


def test_a_meter_leaves_no_thread_behind(tmp_path):
    before = set(threading.enumerate())
    run(make_meter(tmp_path), range(1, 5))
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_restart_appends_and_repeats_nothing(tmp_path):
    run(make_meter(tmp_path), range(1, 7))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(make_meter(tmp_path, start_step=3), range(4, 9))
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]


def test_line_that_a_crash_left_unfinished_is_cut_off(tmp_path):
    run(make_meter(tmp_path), range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run(make_meter(tmp_path, start_step=4), range(5, 9))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]


def test_evaluation_joins_the_line_of_its_step(tmp_path):
    meter = make_meter(tmp_path, log_every_steps=4)
    values = {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1), "learning_rate": jnp.float32(1)}
    meter.add(1, values)
    meter.flush({"knn_accuracy": 0.5})
    meter.close()
    (line,) = lines(tmp_path)
    assert line["step"] == 1 and line["loss"] == 1 and line["knn_accuracy"] == 0.5


def test_what_is_measured_before_the_first_step_is_step_0(tmp_path, capsys):
    for _ in range(2):  # a run that was stopped before its first save begins afresh
        meter = make_meter(tmp_path)
        meter.report_start({"knn_accuracy": 0.5})
        meter.close()
    assert lines(tmp_path) == [{"step": 0, "knn_accuracy": 0.5}]
    assert capsys.readouterr().out == 2 * "step 0/8  knn_accuracy 0.5\n"
    run(make_meter(tmp_path), range(1, 5))
    assert [line["step"] for line in lines(tmp_path)] == [0, 2, 4]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    run(make_meter(tmp_path), range(1, 5))
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    losses = {
        event.step: float(np.frombuffer(event.tensor_proto.tensor_content, np.float32)[0])
        if event.tensor_proto.tensor_content
        else event.tensor_proto.float_val[0]
        for event in events.Tensors("loss")
    }
    assert losses == {2: 1.5, 4: 3.5}


def test_pictures_go_into_the_file_of_an_open_meter(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with closing(make_meter(tmp_path)):
        report.show(tmp_path, 0, pictures={"red": picture}, texts={"words": "some"})
        assert len(list(tmp_path.glob("events.*"))) == 1
    report.show(tmp_path, 8, pictures={"late": picture})
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert {name: events.Tensors(name)[0].step for name in ("red", "words", "late")} == {
        "red": 0,
        "words": 0,
        "late": 8,
    }


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_loss_names_step_and_causes(tmp_path, value):
    with pytest.raises(UserError, match=f"loss is {value} at step 3: .*learning_rate.*warmup.*checkpoints"):
        run(make_meter(tmp_path), [3], loss=float(value))


def test_log_has_plain_lines_and_a_terminal_one_that_moves(tmp_path, capsys, monkeypatch):
    (tmp_path / "terminal").mkdir()
    run(make_meter(tmp_path), range(1, 5))
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and "\r" not in out
    assert "step 2/8" in out and "loss 1.5" in out and "lr 2" in out
    assert "images/s" in out and "data wait" in out and "left" in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    run(make_meter(tmp_path / "terminal"), range(1, 5))
    out = capsys.readouterr().out
    assert out.count("\r") == 2 and out.endswith("\n")
    for line in out.strip().split("\r\033[K")[1:]:
        assert len(line) == 59 and " left  loss " in line
    assert "[#####     ] step 4/8  0:" in out


def test_summary_is_a_table(capsys, tmp_path):
    report.print_summary({"trained": {"knn_accuracy": 0.75}, "untrained": {}, "steps": 3}, tmp_path)
    out = capsys.readouterr().out
    assert "knn accuracy" in out and "0.750" in out and "steps 3" in out and "summary.json" in out


def test_the_spread_over_draws_stands_beside_the_scores(tmp_path, capsys):
    scores = {"trained": {"few_label_accuracy": 0.75}, "untrained": {"few_label_accuracy": 0.5}}
    report.print_summary(scores | {"few_label_deviation": {"trained": 0.02, "untrained": 0.03}}, tmp_path)
    out = capsys.readouterr().out
    assert re.search(
        r"few label accuracy +deviation\n +trained +0.750 +0.020\n +untrained +0.500 +0.030\n", out
    )
    assert "few label deviation" not in out and "few_label_deviation" not in scores


def test_a_run_that_takes_long_without_an_accelerator_is_told_early(tmp_path, monkeypatch, capsys):
    run(make_meter(tmp_path, num_steps=1000), range(1, 6))
    assert "hours" not in capsys.readouterr().out
    monkeypatch.setattr(report, "_LONG_RUN", 0.0)
    (tmp_path / "long").mkdir()
    for start in (0, 7):
        run(make_meter(tmp_path / "long", start_step=start, num_steps=1000), range(start + 1, start + 6))
        printed = capsys.readouterr().out
        assert printed.count(f"hours for {1000 - start - 3} more steps of 0.0 s") == 1
        assert "published weights (docs/published.md)\n" in printed


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, "--config.image_size=64 --config.model.depth=8 --config.model.width=0.75"),
        ({"image_size": 64, "model.width": 0.5}, "as in --config.model.depth=8"),
        ({"image_size": 64, "model.depth": 8, "model.width": 0.75}, None),
        ({"pretrained": "RUN"}, "fewer steps"),
    ],
)
def test_advice_is_cheaper_than_the_run(settings, expected):
    config = ConfigDict({"pretrained": "", "image_size": 224, "model": {"depth": 50, "width": 1.0}})
    config.update_from_flattened_dict(settings)
    *_, advice = report._cheaper_than(config)
    assert advice.endswith(expected or "published weights (docs/published.md)") or expected in advice


def test_notes_of_a_summary_are_told(tmp_path, capsys):
    report.print_summary({"l2": 5.623, "validation": 1.0, "steps": 3}, tmp_path)
    said = capsys.readouterr().out
    assert "weight of the L2 penalty 5.623, which had a validation score of 1, steps 3" in said
    report.print_summary({"steps": 3, "notes": ["no better than raw pixels"]}, tmp_path)
    assert "note: no better than raw pixels" in capsys.readouterr().out


@pytest.mark.parametrize("waits", [False, True])
def test_devices_that_wait_for_images_are_noted_once_but_not_of_the_start(
    tmp_path, capsys, monkeypatch, waits
):
    monkeypatch.setattr(report.jax, "default_backend", lambda: "gpu")
    meter = report.Meter(
        tmp_path, tiny_config("pretrain", log_every_steps=1, batch_size=8), start_step=0, num_steps=5
    )
    with closing(meter):
        for step in range(1, 6):
            with meter.waiting_for_data():
                time.sleep(0.2 if waits or step == 1 else 0)
            meter.add(step, dict.fromkeys(("loss", "gradient_norm", "learning_rate"), jnp.float32(1)))
            time.sleep(0 if waits else 0.3)
        meter.flush()
    out = capsys.readouterr().out
    assert out.count("note: the devices wait for images") == waits


def test_what_gives_devices_more_images():
    config = tiny_config("pretrain", image_size=224)
    assert report._faster_input(config).startswith("--config.augment.on_device=True, more cores for each")
    config.dataset.in_memory = False
    assert "docs/data_on_machines.md" in report._faster_input(config)
    config.augment.on_device = True
    assert report._faster_input(config).startswith("more cores for each process")
    assert report._faster_input(tiny_config("pretrain")).startswith("--config.dataset.on_device=True")
    assert report._faster_input(tiny_config("finetune")).startswith("more cores")
