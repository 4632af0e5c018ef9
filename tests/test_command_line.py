"""A config from the command line: overrides, what was given, notes; the shipped ones pass."""

import os
import shlex
from pathlib import Path

import pytest
from absl.testing import flagsaver
from test_structure import CONFIGS, tasks_of

from configs import base
from simclr_jax import main
from simclr_jax.config import command_line, manual, settings, shipped, validation, verbs
from simclr_jax.process.errors import UserError
from simclr_jax.workdir import records

DIGITS = "--config=configs/digits.py"


@pytest.fixture
def parse(monkeypatch):
    """`parse(*words)`, from the folder that holds configs/, whose flags are forgotten again."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    with flagsaver.flagsaver():
        yield lambda *words: command_line.parse(["main", *words])


def notes(capsys):
    command_line.read_config()
    return capsys.readouterr().out.splitlines()


def test_overrides_are_of_the_kind_of_their_key(parse):
    words = [
        "--config.batch_size=0x20",
        "--config.num_epochs=3",
        "--config.augment.blur",
        "-config.seed",
        "7",
    ]
    words += ["--noconfig.evaluate.compare", "--config.dataset.path", "a=b", "--config.remat=false"]
    words += ["--config.dataset.value_range=(0, 4095)"]
    words[0:0] = ["--config=configs/folder.py"]
    parse(*words)
    config = command_line.read_config()
    assert (config.batch_size, config.num_epochs, config.seed, config.dataset.path) == (32, 3.0, 7, "a=b")
    assert config.augment.blur is True and config.remat is False and config.evaluate.compare is False
    assert isinstance(config.num_epochs, float) and config.dataset.value_range == (0, 4095)
    assert config.is_locked


def test_what_the_user_gave_and_what_the_file_says(parse):
    parse(DIGITS, "--config.model.width=0.5", "--config.seed=0")
    assert command_line.given() == {"model.width": 0.5, "seed": 0}
    assert command_line.defaults().model.width == 0.75
    assert command_line.read_config().model.width == 0.5


def test_none_unsets_what_may_be_unset(parse):
    parse(f"{DIGITS}:finetune", "--config.labels_per_class=None", "--config.dataset.path=None")
    config = command_line.read_config()
    assert config.labels_per_class is None and config.dataset.path is None
    with pytest.raises(UserError, match="batch_size=None: expected a whole number"):
        parse(DIGITS, "--config.batch_size=None")


def test_required_placeholders_can_be_given(parse, tmp_path):
    (tmp_path / "own.py").write_text(
        "from configs import digits\n"
        "from ml_collections.config_dict import required_placeholder\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        "    del config.batch_size\n"
        "    config.batch_size = required_placeholder(int)\n"
        "    return config\n"
    )
    parse(f"--config={tmp_path}/own.py", "--config.batch_size=16")
    assert command_line.read_config().batch_size == 16
    assert command_line.defaults().to_dict()["batch_size"] is None
    with pytest.raises(UserError, match="batch_size is not set: give --config.batch_size=VALUE"):
        parse(f"--config={tmp_path}/own.py")


def test_own_files_may_be_frozen_and_have_whole_numbers_where_others_fit(parse, tmp_path):
    (tmp_path / "own.py").write_text(
        "from configs import digits\n"
        "from ml_collections import ConfigDict, FrozenConfigDict\n"
        "def get_config():\n"
        "    plain = digits.get_config().to_dict() | {'num_epochs': 3}\n"
        "    return FrozenConfigDict(ConfigDict(plain))\n"
    )
    parse(f"--config={tmp_path}/own.py", "--config.num_epochs=2.5", "--config.dataset.num_examples=64")
    config = command_line.read_config()
    assert config.num_epochs == 2.5 and config.dataset.num_examples == 64


def test_epochs_that_were_given_win_over_the_steps_of_the_file(parse, capsys):
    parse(f"{DIGITS}:finetune", "--config.num_epochs=3")
    assert command_line.read_config().num_steps is None
    assert "note: --config.num_epochs=3.0 replaces num_steps=150 of configs/digits.py:finetune" in notes(
        capsys
    )
    parse(f"{DIGITS}:finetune")
    assert command_line.read_config().num_steps == 150 and not notes(capsys)


@pytest.mark.parametrize(
    "words, note",
    [
        (
            ["--config.num_steps=4", "--config.num_steps=6"],
            "--config.num_steps is given more than once, as 4 and 6",
        ),
        (["--workdir=a", "--workdir=b"], "--workdir is given more than once, as a and b: the last counts"),
        (
            ["--config.dataset.in_memory=False"],
            "--config.dataset.in_memory has no effect where dataset.name=digits",
        ),
    ],
)
def test_what_can_be_meant_is_announced(parse, capsys, words, note):
    parse(DIGITS, *words)
    (line,) = notes(capsys)
    assert line.startswith(f"note: {note}")


def test_the_same_twice_is_no_news(parse, capsys):
    parse(DIGITS, "--config.num_steps=4", "--config.num_steps=4")
    assert not notes(capsys)


def test_workdir_is_named_after_dataset_and_task_and_knows_the_home(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    parse(f"{DIGITS}:knn", "--config.pretrained=~/run")
    config = command_line.read_config()
    assert str(command_line.workdir(config)) == "runs/digits/knn"
    assert config.pretrained == "/home/somebody/run"
    parse(DIGITS, "--workdir=~/run")
    assert os.fspath(command_line.workdir(config)) == "/home/somebody/run"


def help_of(parse, capsys, *words):
    with pytest.raises(SystemExit) as stop:
        parse(*words, "--help")
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_tells_flags_configs_and_tasks(parse, capsys):
    out = help_of(parse, capsys)
    for expected in (
        "--config File of configs/",
        "--process_id This process, from 0",
        "configs/digits.py SimCLR on scikit-learn's handwritten digits",
        "linear_eval Linear evaluation: a linear classifier on the frozen encoder",
        "--config.dataset.path=PHOTOS --workdir=RUN learns from a folder",
    ):
        assert expected in out


def test_help_with_a_config_tells_every_key_its_value_and_meaning(parse, capsys, tmp_path):
    out = help_of(parse, capsys, f"{DIGITS}:finetune")
    config = settings.defaults("configs/digits.py:finetune")
    for key, value in validation.flatten(config).items():
        assert f"{key}={value}" in out
    for expected in (
        "batch_size=48 images, over all devices of all hosts",
        "labels_per_class=5 None: all labels",
        "model.sk_ratio=0.0 selective kernels: 0.0625 in SimCLR v2",
        "optimizer.name=sgd with Nesterov momentum",
        "dataset.value_range=None Values of images of more than 8 bits that become black and white",
    ):
        assert expected in out
    for task in ("pretrain", "distill"):
        assert "optimizer.name=lars or 'sgd', 'adam'" in help_of(parse, capsys, f"{DIGITS}:{task}")
    with pytest.raises(UserError, match="does not exist"):
        parse("--config=configs/nothing.py", "--help")
    (tmp_path / "own.py").write_text("import ml_collections\nget_config = ml_collections.ConfigDict")
    with pytest.raises(UserError, match="lacks the key task"):
        parse(f"--config={tmp_path}/own.py", "--help")


def test_what_comes_next_is_a_command_that_is_accepted(parse, tmp_path):
    folder, run = tmp_path / "my photos", tmp_path / "a run"
    parse("--config=configs/folder.py", f"--config.dataset.path={folder}", "--config.dataset.classes=False")
    config = command_line.read_config()
    records.save_config(run, config.to_dict())
    look, board, line = main._next_commands(config, run, {})
    assert shlex.split(look)[3:] == ["look", str(run)] and shlex.split(board)[1:] == ["--logdir", str(run)]
    verb, *words = shlex.split(line)[3:]
    parse(*verbs.flags_of(verb, words))
    config = command_line.read_config()
    assert config.task == "finetune" and config.dataset.path == str(folder) and not config.dataset.classes
    assert config.pretrained == str(run) and config.dataset.labels == "labels.csv"
    digits = settings.defaults("configs/digits.py")
    assert "linear_eval" in main._next_commands(digits, run, {"trained": {}})[-1]
    assert "predict" in main._next_commands(config, run, {})[-1]


def test_every_key_has_a_meaning():
    for task in shipped.tasks():
        flat = validation.flatten(shipped.defaults_of(task))
        assert not {key for key in flat if not manual.meanings_of(task).get(key)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_pass_all_checks(parse, path):
    for task in tasks_of(path):
        parse(f"--config=configs/{path.name}:{task}")


def test_every_number_has_a_range_and_every_word_its_choices():
    free = {"task", "pretrained", "embeddings", "splits", "beam"}
    free |= {f"dataset.{name}" for name in ("name", "path", "data_dir", "labels", "group")}
    free |= {"loss", "model.encoder", "optimizer.name", "class_weights"}  # in registries, or a file
    free |= {f"dataset.{split}_split" for split in ("train", "eval", "probe", "validation")}
    for task in shipped.tasks():
        config = shipped.defaults_of(task)
        for key in validation.flatten(config):
            section, name = validation.section_of(config, key)
            kind = section.get_type(name)
            known = base.RANGES.keys() | base.CHOICES.keys() | set(base.POSITIVE) | free
            assert kind in (bool, tuple) or key in known, (task, key)


def test_ranges_and_choices_hold_the_defaults():
    for task in shipped.tasks():
        config = shipped.defaults_of(task)
        config.dataset.name = "digits"
        assert validation.check(config, file="base") == []
