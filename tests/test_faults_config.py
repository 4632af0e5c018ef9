"""Mistakes in command lines and configs: each is one line with value and remedy, before anything runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver
from conftest import tiny_config

from simclr_jax import train
from simclr_jax.benchmark import __main__ as benchmark
from simclr_jax.config import command_line
from simclr_jax.process.errors import UserError
from simclr_jax.tasks import pretrain

ROOT = Path(__file__).parent.parent
ADDRESS = "--coordinator_address=localhost:1234"

# Task of configs/digits.py and words -> what the line has to hold.
MISTAKES = [
    # Numbers that are none, or out of range.
    ("pretrain", "--config.temperature=nan", "temperature=nan: set --config.temperature to a number above 0"),
    (
        "pretrain",
        "--config.temperature=inf",
        "a number above 0 that 32 bits hold, as in --config.temperature=",
    ),
    ("pretrain", "--config.temperature=1e-50", "that 32 bits hold"),
    ("pretrain", "--config.optimizer.weight_decay=nan", "optimizer.weight_decay=nan"),
    ("pretrain", "--config.model.sk_ratio=nan", "a number of at least 0 and at most 1"),
    ("pretrain", "--config.num_epochs=inf", "num_epochs=inf"),
    ("pretrain", "--config.batch_size=99999999999", "batch_size=99999999999"),
    ("pretrain", "--config.batch_size=0", "batch_size=0: set --config.batch_size to a number above 0"),
    ("pretrain", "--config.batch_size=1", "set --config.batch_size to at least 2"),
    ("pretrain", "--config.seed -1", "seed=-1: set --config.seed to a number of at least 0 and at most 2"),
    (
        "pretrain",
        "--config.augment.min_area=0",
        "a number above 0 and at most 1, as in --config.augment.min_area=0.08",
    ),
    (
        "pretrain",
        "--config.warmup_epochs=-1",
        "warmup_epochs=-1.0: set --config.warmup_epochs to a number of at least 0",
    ),
    ("pretrain", "--config.optimizer.momentum=1", "optimizer.momentum=1.0"),
    ("pretrain", "--config.evaluate.max_examples=0", "evaluate.max_examples=0"),
    ("pretrain", "--config.model.width=0", "model.width=0.0"),
    ("pretrain", "--config.model.projection_dim=0", "model.projection_dim=0"),
    ("pretrain", "--config.dataset.num_examples=0", "dataset.num_examples=0"),
    ("knn", "--config.k=0", "k=0: set --config.k"),
    ("embed", "--config.examples_per_part=0", "examples_per_part=0"),
    ("distill", "--config.label_weight=1.5", "label_weight=1.5"),
    ("finetune", "--config.draws=0", "draws=0"),
    (
        "pretrain",
        "--config.dataset.value_range=(0,1e999)",
        "dataset.value_range=(0, inf): expected two numbers",
    ),
    ("pretrain", "--config.dataset.value_range=wide", "value_range=wide: expected two numbers, as in"),
    ("pretrain", "--config.profile_steps=12,10", "profile_steps=(12, 10): expected the first and the last"),
    ("pretrain", "--config.profile_steps=0,3", "profile_steps=(0, 3): expected the first and the last step"),
    ("finetune", "--config.profile_steps=1,2,3", "set --config.profile_steps=10,12, or leave it out"),
    ("pretrain", "--config.profile_steps=1.5,3", "profile_steps=(1.5, 3): expected the first and the last"),
    ("pretrain", "--config.profile_steps=first", "profile_steps=first: expected two numbers, as in"),
    ("pretrain", "--config.dataset.value_range=7", "value_range=7: expected two numbers, as in"),
    # Words that are not among those that are known.
    ("pretrain", "--config.model.depth=51", "model.depth=51: set it to 8, 10, 18, 34, 50, 101, 152 or 200"),
    ("pretrain", "--config.model.stem=tiny", "model.stem='tiny': set it to 'auto', 'cifar' or 'imagenet'"),
    ("pretrain", "--config.model.dtype=float16", "'auto', 'float32' or 'bfloat16'"),
    ("pretrain", "--config.optimizer.name=lamb", "optimizer.name='lamb': set it to 'lars', 'sgd' or 'adam'"),
    ("pretrain", "--config.optimizer.scaling=cubic", "'linear' or 'sqrt', as in --config.optimizer.scaling="),
    ("transfer", "--config.metric=top3", "metric='top3': set it to 'top1' or 'mean_per_class'"),
    ("embed", "--config.splits=train+tset", "splits='train+tset': set --config.splits to train or eval"),
    ("embed", "--config.splits=train+probe", "splits='train+probe'"),
    ("embed", "--config.splits=train+train", "splits='train+train'"),
    ("embed", "--config.splits=", "--config.splits has no value: expected a text"),
    # Settings that do not go together.
    ("pretrain", "--config.num_epochs=3 --config.num_steps=4", "say how long to train: give one of them"),
    ("pretrain", "--config.model.supervised_layer=3", "model.supervised_layer=3, but there are 2 projection"),
    ("finetune", "--config.fine_tune_after_block=4", "a ResNet-8 has 3 block groups"),
    (
        "pretrain",
        "--config.dataset.probe_split=train",
        "is not read where dataset.name=digits: leave it away",
    ),
    ("pretrain", "--config.dataset.train_split=train", "dataset.train_split='train' is not read"),
    ("pretrain", "--config.dataset.num_classes=5", "dataset.num_classes=5 is not read"),
    ("pretrain", "--config.dataset.path=/tmp", "leave it away, or use --config=configs/folder.py"),
    ("pretrain", "--config.dataset.name=cifar10 --config.dataset.path=/tmp", "where dataset.name=cifar10"),
    ("pretrain", "--config.task=knn", "use --config=configs/digits.py:knn"),
    ("knn", "--config.task=linear_eval", "use --config=configs/digits.py:linear_eval"),
    ("pretrain", "--config.task=predcit", "task 'predcit' is unknown: set --config.task to one of distill"),
    # Values of another kind, or none.
    ("pretrain", "--config.batch_size=1e2", "=1e2: expected a whole number, as in --config.batch_size=256"),
    ("pretrain", "--config.batch_size=8.0", "--config.batch_size=8.0: expected a whole number"),
    ("pretrain", "--config.batch_size=", "--config.batch_size has no value: expected a whole number"),
    ("pretrain", "--config.temperature=zero", "=zero: expected a number, as in --config.temperature=0.5"),
    (
        "pretrain",
        "--config.augment.blur=no",
        "=no: expected True or False, as in --config.augment.blur=False",
    ),
    (
        "pretrain",
        "--config.model=3",
        "--config.model is a section: set its keys one by one, as in --config.model.",
    ),
    ("pretrain", "--config.model.depth.x=3", "did you mean --config.model.depth?"),
    ("pretrain", "--config.dataset.path", "--config.dataset.path has no value: expected a text"),
    ("pretrain", "--config.pretrained --workdir=x", "--config.pretrained has no value"),
    ("pretrain", "--config.pretrained=", "--config.pretrained has no value"),
    ("pretrain", "--config.tracker", "--config.tracker has no value"),
    ("pretrain", "--config.tracker=clu", "set it to '', 'wandb' or 'mlflow', as in --config.tracker=mlflow"),
    ("pretrain", "--config.depth=18", "--config.depth is unknown: did you mean --config.model.depth?"),
    ("pretrain", "--config.modle.depth=18", "did you mean --config.model.depth?"),
    # Flags.
    ("pretrain", "--wrokdir=x", "--wrokdir is unknown: did you mean --workdir?"),
    ("pretrain", "--batch_size=16", "--batch_size is unknown: did you mean --config.batch_size?"),
    ("pretrain", "--depth=18", "--depth is unknown: did you mean --config.model.depth?"),
    ("pretrain", "-batch_size=16", "did you mean --config.batch_size?"),
    ("pretrain", "batch_size=16", "'batch_size=16' is not a flag: write --config.KEY=VALUE"),
    ("pretrain", "--workdir=", "--workdir is empty: give a folder, as in --workdir=runs/digits"),
    ("pretrain", "--workdir", "Missing value for flag --workdir"),
    ("pretrain", "--workdir --verbosity=0", "--workdir has no value: write --workdir=VALUE"),
    ("pretrain", "--verbosity=abc", "--verbosity=abc: expected a whole number"),
    ("pretrain", "--stderrthreshold=loud", "stderrthreshold"),
    ("pretrain", "--flagfile=/nowhere", "'/nowhere'"),
    # Places.
    ("pretrain", "--workdir=https://host/run", "--workdir=https://host/run: only local folders and gs://"),
    ("pretrain", "--workdir=s3://bucket/run", "only local folders and gs:// are read and written"),
    ("pretrain", "--workdir=gs://", "names no bucket: write --workdir=gs://BUCKET/RUN"),
    ("pretrain", "--workdir=file:///tmp/run", "leave file:// away, as in --workdir=/tmp/run"),
    ("knn", "--config.pretrained=ftp://host/run", "--config.pretrained=ftp://host/run: only local folders"),
    ("knn", "--config.pretrained=http://host/run", "--config.pretrained=http://host/run"),
    # Processes.
    ("pretrain", "--process_id=-1", "--coordinator_address is missing beside --process_id"),
    ("pretrain", ADDRESS, "--num_processes is missing beside --coordinator_address"),
    ("pretrain", "--num_processes=2", "--coordinator_address is missing beside --num_processes"),
    ("pretrain", f"{ADDRESS} --num_processes=2 --process_id=5", "--process_id=5: expected 0 to 1"),
    ("pretrain", f"{ADDRESS} --num_processes=2 --process_id=-1", "--process_id=-1: expected 0 to 1"),
    ("pretrain", f"{ADDRESS} --num_processes=0 --process_id=0", "--num_processes=0: expected at least 1"),
    ("pretrain", f"{ADDRESS}99 --num_processes=1 --process_id=0", "expected HOST:PORT"),
    (
        "pretrain",
        "--coordinator_address=here --num_processes=1 --process_id=0",
        "here: expected HOST:PORT, as in",
    ),
    (
        "pretrain",
        "--num_processes=two",
        "--num_processes=two: expected a whole number, as in --num_processes=1",
    ),
]

# An own config file -> what the line has to hold.
BARE = "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({})\n"
DIGITS = "from configs import digits\n\ndef get_config():\n    config = digits.get_config()\n"
FILES = [
    (b"def get_config(:\n    pass\n", "FILE:1: SyntaxError: invalid syntax; mend the config"),
    (b"\n\nimport does_not_exist\n", "FILE:3: ModuleNotFoundError: No module named 'does_not_exist'; mend"),
    (b"def get_config():\n    return x\n", "FILE:2: NameError: name 'x' is not defined; mend the config"),
    (
        b"def get_config():\n    raise RuntimeError('one\\ntwo')\n",
        "FILE:2: RuntimeError: one two; mend the config",
    ),
    (b"import sys\nsys.exit(3)\n", "FILE:2: SystemExit: 3"),
    (b"x = '\xe9'\n", "FILE:1: SyntaxError: (unicode error)"),
    (b"x = 1\0\n", "FILE"),
    (b"", "FILE has no get_config: define get_config(), as configs/digits.py does"),
    (b"get_config = 3\n", "FILE has no get_config"),
    (b"def get_config():\n    pass\n", "get_config of FILE returned None: end it with 'return config'"),
    (b"def get_config():\n    return {'seed': 0}\n", "get_config of FILE returned a dict: end it with"),
    (b"def get_config(task):\n    pass\n", "its get_config takes a task: write --config=FILE:TASK"),
    (f"{DIGITS}    config.batch_size = 'many'\n", "FILE:5: TypeError: "),
    (f"{DIGITS}    config.modle.depth = 18\n", "FILE:5: AttributeError: 'modle' Did you mean"),
    (
        f"{DIGITS}    config.temprature = 1\n    return config\n",
        "FILE sets temprature, which task pretrain does ",
    ),
    (
        f"{DIGITS}    del config.model.depth\n    return config\n",
        "FILE lacks model.depth of task pretrain: start",
    ),
    (
        f"{DIGITS}    config.batch_size = None\n    return config\n",
        "batch_size=None: expected a whole number, as ",
    ),
    (
        f"{DIGITS}    config.batch_size = True\n    return config\n",
        "batch_size=True: expected a whole number",
    ),
    (f"{DIGITS}    config.dataset.name = ' '\n    return config\n", "dataset.name is empty: expected a text"),
    (f"{DIGITS}    config.seed = -1\n    return config\n", "seed=-1: set --config.seed to a number of at"),
    (
        BARE.replace("{}", "{'task': 'knn'}"),
        "FILE lacks batch_size, dataset.",
    ),
    (BARE, "FILE lacks the key task: start from configs/base.py"),
]


def line_of(monkeypatch, *words):
    """The one line that a command line ends in."""
    monkeypatch.chdir(ROOT)
    with flagsaver.flagsaver(), pytest.raises(UserError) as error:
        command_line.parse(["main", *words])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("task, words, expected", MISTAKES, ids=lambda value: value.replace("--config.", ""))
def test_command_lines(monkeypatch, task, words, expected):
    assert expected in line_of(monkeypatch, f"--config=configs/digits.py:{task}", *words.split())


@pytest.mark.parametrize("number", range(len(FILES)))
def test_own_config_files(monkeypatch, tmp_path, number):
    text, expected = FILES[number]
    path = tmp_path / "own.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = line_of(monkeypatch, f"--config={path}")
    assert expected.replace("FILE", str(path)) in line


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "--config is missing: give a file of configs/"),
        (["--config="], "--config is missing"),
        (["--config"], "Missing value for flag --config"),
        (["--config", "--workdir=x"], "--config has no value"),
        (["--config=configs"], "--config=configs cannot be read (Is a directory): give a file of configs/"),
        (["--config=configs/digit.py"], "--config=configs/digit.py does not exist"),
        (["--config=gs://bucket/config.py"], "does not exist: give a file of configs/"),
        (["--config=configs/digits.py:knm"], "--config=configs/digits.py:knm: task 'knm' is unknown"),
    ],
)
def test_configs_that_are_not_there(monkeypatch, words, expected):
    assert expected in line_of(monkeypatch, *words)


def test_a_task_of_a_config_without_tasks(monkeypatch, tmp_path):
    (tmp_path / "own.py").write_text("def get_config():\n    pass\n")
    assert "takes no task: leave ':knn' away" in line_of(monkeypatch, f"--config={tmp_path}/own.py:knn")


def test_splits_of_a_file_that_its_dataset_does_not_have(monkeypatch):
    words = ["--config=configs/stl10.py", "--config.dataset.name=digits"]
    assert "set --config.dataset.probe_split=None" in line_of(monkeypatch, *words)


def test_batches_of_pretraining_fit_the_dataset():  # and the eight devices of tests
    config = tiny_config("pretrain", batch_size=112)
    with pytest.raises(UserError, match=r"exceeds the 111 training images.*set --config\.batch_size=104$"):
        pretrain.check_batch(config, 111)
    config.microbatches = 4
    with pytest.raises(UserError, match="--config.batch_size=96$"):
        pretrain.check_batch(config, 111)
    with pytest.raises(UserError, match="add images, or use fewer devices"):
        pretrain.check_batch(config, 5)
    pretrain.check_batch(config, 112)


def test_batches_beyond_few_labels_are_announced_once(capsys):
    config = tiny_config("finetune", batch_size=56, num_steps=7)
    for _ in range(2):
        train.make_schedule(config, 55)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: batch_size=56 exceeds the 55 training images")


def test_a_warmup_beyond_training_is_announced(capsys):
    config = tiny_config("pretrain", num_epochs=2.0, warmup_epochs=4.0)
    train.make_schedule(config, 1437)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: warmup_epochs=4 are 89 steps, but training has 45: the learning rate never")
    config.warmup_epochs = 1.0
    train.make_schedule(config, 1437)
    assert not capsys.readouterr().out


def test_training_ends():
    config = tiny_config("pretrain", num_epochs=1e12)
    with pytest.raises(UserError, match="lower --config.num_epochs"):
        train.make_schedule(config, 1437)


def test_benchmarks_are_of_pretraining(monkeypatch):
    monkeypatch.chdir(ROOT)
    with flagsaver.flagsaver():
        command_line.parse(["benchmark", "--config=configs/digits.py:knn"])
        with pytest.raises(UserError, match="benchmarks are of pretraining, not of knn"):
            benchmark._config()


def test_the_benchmark_of_the_loss_takes_nothing_more():
    command = [sys.executable, "-m", "simclr_jax.benchmark", "loss", "--pairs=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: 'loss --pairs=3' is unknown: give input, step, or loss alone\n"


@pytest.mark.parametrize(
    "module, words",
    [("plan", []), ("benchmark", ["step"]), ("main", [])],
)
def test_every_command_ends_so(tmp_path, module, words):
    done = subprocess.run(
        [sys.executable, "-m", f"simclr_jax.{module}", *words, "--config=configs/digits.py"]
        + ["--config.temperature=nan"],
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: temperature=nan: set --config.temperature")
