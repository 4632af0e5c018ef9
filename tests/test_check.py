"""`check` says what the run itself says, for configs good and bad, and looks at little of the data."""

from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver
from test_datasets import Shards, shards, write_folder  # noqa: F401

from simclr_jax import check, main, parallel, train
from simclr_jax.config import command_line
from simclr_jax.data.sources import folder
from simclr_jax.evaluation import parts
from simclr_jax.process import UserError
from simclr_jax.workdir import lock

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


class Began(Exception):
    """The run began its work."""


@pytest.fixture(scope="module")
def places(tmp_path_factory, pretrained_run, finetuned_run, shards):  # noqa: F811
    """Folders by the names that the cases below give them."""
    base = tmp_path_factory.mktemp("places")
    by_class = [f"{animal}/{number}.png" for animal in ("cat", "dog") for number in range(30)]
    write_folder(base / "photos", by_class)
    write_folder(base / "flat", [f"{number}.png" for number in range(40)])
    write_folder(base / "few", ["a.png", "b.png"])
    write_folder(base / "splits", ["train/a/1.png", "train/b/1.png", "val/c/1.png"])
    (base / "broken").mkdir()
    (base / "broken" / "1.jpg").write_text("no image")
    (base / "empty").mkdir()
    names = [f"{number}.png,{'even' if number % 2 == 0 else 'odd'}" for number in range(20)]
    (base / "labels.csv").write_text("\n".join(["name,label", *names]) + "\n")
    (base / "wrong.csv").write_text("name,label\nnowhere.png,a\n0.png,b\n")
    (base / "file").touch()
    (base / "bands").mkdir()
    for number in range(2 * folder._GLANCE):
        np.save(base / "bands" / f"{number:02d}.npy", np.full((8, 8, 5), number, np.uint8))
    damaged = base / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    taken = base / "taken"
    taken.mkdir()
    (taken / "lock.json").write_text('{"pid": 1, "host": "other", "since": "now"}')
    return {"run": pretrained_run, "tuned": finetuned_run, "shards": shards, "base": base}


DIGITS = "--config=configs/digits.py"
FOLDER = "--config=configs/folder.py"
SHARDS = "--config=configs/cifar10.py{task} --config.dataset.name=shards --config.dataset.data_dir={shards} "
SHARDS += "--config.dataset.eval_split=validation --config.batch_size=16"
OF_RUN = "--config.pretrained={run}"
LABELS = "--config.dataset.labels={base}"
STREAM = "--config.dataset.in_memory=False"
CASES = f"""
{DIGITS}
{DIGITS} --config.batch_size=60
{DIGITS} --config.batch_size=2048
{DIGITS} --config.batch_size=64 --config.microbatches=3
{DIGITS} --config.batch_size=64 --config.microbatches=4
{DIGITS} --config.memory.size=4096 --config.batch_size=1200
{DIGITS} --config.memory.size=64
{DIGITS} --config.memory.size=64 --config.loss=dcl
{DIGITS} --config.memory.size=64 --config.model.projection_layers=0
{DIGITS} --config.num_epochs=1e12
{DIGITS} --config.dataset.num_examples=2000
{DIGITS} --config.dataset.num_examples=100
{DIGITS} --config.tracker=neptune
{DIGITS} --config.pretrained={{base}}/nothing
{DIGITS} {OF_RUN}
{DIGITS} {OF_RUN} --config.model.depth=18
{DIGITS} {OF_RUN} --config.use_average=True
{DIGITS} --config.dataset.on_device=True
{DIGITS} --workdir={{base}}/file
{DIGITS} --workdir={{base}}/damaged
{DIGITS} --workdir={{base}}/taken
{DIGITS} --workdir={{run}}
{DIGITS} --workdir={{tuned}}
{DIGITS}:linear_eval
{DIGITS}:linear_eval {OF_RUN}
{DIGITS}:linear_eval --config.pretrained={{tuned}}
{DIGITS}:linear_eval {OF_RUN} --config.model.width=2
{DIGITS}:finetune {OF_RUN}
{DIGITS}:finetune {OF_RUN} --config.labels_per_class=500
{DIGITS}:finetune {OF_RUN} --config.labels_per_class=None
{DIGITS}:distill {OF_RUN}
{DIGITS}:distill --config.pretrained={{tuned}}
{DIGITS}:knn {OF_RUN}
{DIGITS}:knn {OF_RUN} --config.use_average=True
{DIGITS}:transfer {OF_RUN}
{DIGITS}:embed {OF_RUN}
{DIGITS}:predict {OF_RUN}
{DIGITS}:predict --config.pretrained={{tuned}}
{FOLDER}
{FOLDER} --config.dataset.path={{base}}/nowhere
{FOLDER} --config.dataset.path={{base}}/empty
{FOLDER} --config.dataset.path={{base}}/broken
{FOLDER} --config.dataset.path={{base}}/bands --config.batch_size=8
{FOLDER} --config.dataset.path={{base}}/few
{FOLDER} --config.dataset.path={{base}}/splits --config.batch_size=8
{FOLDER} --config.dataset.path={{base}}/photos --config.batch_size=32
{FOLDER} --config.dataset.path={{base}}/photos --config.batch_size=64
{FOLDER} --config.dataset.path={{base}}/photos --config.batch_size=32 --config.dataset.num_classes=1
{FOLDER} --config.dataset.path={{base}}/photos --config.batch_size=32 --config.dataset.value_range=(9,3)
{FOLDER} --config.batch_size=32 --config.dataset.path={{base}}/flat {LABELS}/labels.csv
{FOLDER} --config.batch_size=32 --config.dataset.path={{base}}/flat {LABELS}/wrong.csv
{FOLDER} --config.batch_size=32 --config.dataset.path={{base}}/flat {LABELS}/none.csv
{FOLDER}:finetune {OF_RUN} --config.dataset.path={{base}}/flat
{FOLDER}:finetune {OF_RUN} --config.dataset.path={{base}}/flat {LABELS}/labels.csv
{FOLDER}:embed {OF_RUN} --config.dataset.path={{base}}/flat
{SHARDS.replace("{task}", "")}
{SHARDS.replace("{task}", "")} {STREAM}
{SHARDS.replace("{task}", "")} {STREAM} --config.batch_size=104
{SHARDS.replace("{task}", "")} --config.dataset.train_split=none
{SHARDS.replace("{task}", "")} --config.dataset.num_classes=3
{SHARDS.replace("{task}", "")} --config.dataset.data_dir={{base}}
{SHARDS.replace("{task}", ":finetune")} {OF_RUN} --config.labels_per_class=30
{SHARDS.replace("{task}", ":finetune")} {OF_RUN} --config.labels_per_class=3
{SHARDS.replace("{task}", ":finetune")} {OF_RUN} --config.labels_per_class=3 {STREAM}
{DIGITS.replace("digits", "cifar10")} --config.dataset.name=cifar11
""".strip().splitlines()


def said_by(command, words):
    """The refusal of a command; None where it would begin."""
    with flagsaver.flagsaver():
        try:
            command_line.parse(["main", *words])
            command(None)
        except UserError as error:
            return str(error)
        except Began:
            return None
    return None


@pytest.fixture
def works(monkeypatch):
    """Runs raise `Began` in the place of their work; configs are those of the repository."""

    def begin(*_, **__):
        raise Began

    replicate = parallel.replicate
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "fit", begin)
    monkeypatch.setattr(parts, "compute", begin)
    monkeypatch.setattr(
        parallel, "replicate", lambda tree, devices=None: replicate(tree, devices) if devices else begin()
    )
    monkeypatch.setattr(lock, "SILENCE", 0.2)


def files_in(folder):
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", CASES)
def test_check_says_what_the_run_says(words, places, works, tmp_path, monkeypatch):
    filled = [word.format(**places) for word in f"{words} --num_processes=1".split()]
    if "--workdir" not in words:
        filled.append(f"--workdir={tmp_path}/made/RUN")
    inspected = []
    inspect = folder._inspect
    monkeypatch.setattr(
        folder,
        "_inspect",
        lambda path, files, *rest: inspected.append(len(files)) or inspect(path, files, *rest),
    )
    before = files_in(places["base"]) | files_in(places["run"])
    checked = said_by(check.check, filled)
    assert files_in(places["base"]) | files_in(places["run"]) == before and not (tmp_path / "made").exists()
    assert max(inspected, default=0) <= folder._GLANCE
    assert checked == said_by(main.main, filled)
