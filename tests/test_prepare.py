"""Datasets that `simclr_jax.data.prepare` wrote, and runs on them."""

import csv
import functools
import importlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pytest
import tensorflow as tf
from conftest import log_of, run_task, tiny_config
from PIL import Image
from pyarrow import parquet
from test_datasets import config, write_image
from test_processes import ROOT, environment, join

from simclr_jax import train
from simclr_jax.data import datasets, decode, pipeline, prepare
from simclr_jax.models import make_model
from simclr_jax.process import UserError, workers
from simclr_jax.tasks import pretrain

pytestmark = pytest.mark.slow

IMAGES = [f"train/{kind}/{cow}/{n}.jpg" for kind in ("calf", "cow") for cow in ("a", "b") for n in range(6)]
IMAGES += [f"val/{kind}/{cow}/{n}.png" for kind in ("calf", "cow") for cow in ("c", "d") for n in range(2)]


def photographs(root):
    for number, name in enumerate(IMAGES):
        write_image(root / name, number, size=(30 + number % 3, 20))
    return root


def run(data_dir, *arguments, name="cows"):
    prepare.main([*map(str, arguments), f"--name={name}", f"--data_dir={data_dir}"])
    return data_dir / name


def load(data_dir, split="train", name="cows", **keys):
    return datasets.load(config(name, data_dir=str(data_dir), **keys), split, seed=0)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_out(home):
    rows = csv.reader((home / "left_out.csv").read_text("utf-8-sig").splitlines())
    return dict(list(rows)[1:])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory):
    """data_dir of the photographs."""
    data_dir = tmp_path_factory.mktemp("tfds")
    run(data_dir, photos, "--group=2")
    return data_dir


@pytest.mark.parametrize("split, folder, size", [("train", "train", 24), ("eval", "val", 8)])
def test_names_groups_labels_and_bytes_are_those_of_the_folder(split, folder, size, photos, prepared):
    source = load(prepared, split)
    assert sorted(source.names) == sorted(name for name in IMAGES if name.startswith(folder))
    assert len(source.names) == size and source.class_names == ("calf", "cow")
    assert [source.class_names[label] for label in source.labels] == [n.split("/")[1] for n in source.names]
    assert list(source.groups) == [name.split("/")[2] for name in source.names]
    for name, record in zip(source.names, source.records.numpy()):
        assert record == (photos / name).read_bytes()


def test_a_stream_gives_the_examples_that_memory_does(prepared):
    images = [
        list(pipeline.eval_batches(load(prepared, in_memory=in_memory), image_size=8, batch_size=24))
        for in_memory in (True, False)
    ]
    jax.tree.map(np.testing.assert_array_equal, *images)
    assert len(images[0]) == 1 and images[0][0]["mask"].all()


def test_slices_and_sums_of_splits(prepared):
    whole = load(prepared).names
    np.testing.assert_array_equal(load(prepared, train_split="train[:50%]").names, whole[:12])
    both = load(prepared, train_split="train[75%:]+test")
    np.testing.assert_array_equal(both.names, [*whole[18:], *load(prepared, "eval").names])
    stream = load(prepared, train_split="train[75%:]+test", in_memory=False)
    (batch,) = pipeline.eval_batches(stream, image_size=8, batch_size=14)
    np.testing.assert_array_equal(batch["label"], both.labels)


def test_array_record_files_have_names_and_groups_too(photos, prepared, tmp_path, monkeypatch):
    pytest.importorskip("array_record")
    builders = prepare.tfds.dataset_builders
    store = functools.partial(builders.store_as_tfds_dataset, file_format="array_record")
    monkeypatch.setattr(builders, "store_as_tfds_dataset", store)
    run(tmp_path, photos, "--group=2")
    assert list(tmp_path.glob("cows/1.0.0/*.array_record*"))
    for column in ("names", "groups", "labels"):
        np.testing.assert_array_equal(getattr(load(tmp_path), column), getattr(load(prepared), column))


def test_what_is_damaged_or_blank_is_left_out_and_listed(tmp_path):
    photos = photographs(tmp_path / "photos")
    start, middle, blank = (photos / f"train/cow/a/{name}" for name in ("7.jpg", "8.png", "9.jpg"))
    start.write_bytes((photos / IMAGES[0]).read_bytes()[:200])
    write_image(middle, 8)
    bytes_ = bytearray(middle.read_bytes())
    bytes_[len(bytes_) // 2] ^= 255
    middle.write_bytes(bytes_)
    Image.new("RGB", (20, 20), "grey").save(blank)
    home = run(tmp_path, photos)
    reasons = left_out(home)
    assert list(reasons) == [f"train/cow/a/{number}" for number in ("7.jpg", "8.png", "9.jpg")]
    assert reasons["train/cow/a/9.jpg"] == "of one colour" and all(reasons.values())
    assert len(load(tmp_path).names) == 24


def test_a_split_without_a_good_image_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20), "grey").save(tmp_path / "photos" / f"{number}.png")
    with pytest.raises(UserError, match="train: all images are left out, as .*of one colour"):
        run(tmp_path, tmp_path / "photos")


def test_larger_photographs_are_reduced_and_others_kept(tmp_path):
    waves = 99 * np.sin(np.arange(20)[:, None] / 4 + np.arange(40) / 5) + 128
    pixels = np.repeat(waves[..., None], 3, -1).astype(np.uint8)
    for name, size in (("large.png", 40), ("small.png", 10), ("large.jpg", 40), ("small.jpg", 10)):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels[:, :size]).save(tmp_path / "photos" / name, quality=95)
    run(tmp_path, tmp_path / "photos", "--max_side=20", "--quality=100")
    records = {}
    for split in ("train", "eval"):
        source = load(tmp_path, split)
        records |= dict(zip(source.names, source.records.numpy()))
    for name in ("small.png", "small.jpg"):
        assert records[name] == (tmp_path / "photos" / name).read_bytes()
    mean = pixels.reshape(10, 2, 20, 2, 3).mean((1, 3))
    assert np.abs(tf.io.decode_png(records["large.png"]).numpy() - mean).max() <= 0.51
    assert np.abs(decode.decode_in_python(records["large.jpg"]) - mean).mean() < 3


def test_other_types_become_png_without_loss(tmp_path, capsys):
    for number, suffix in enumerate((".webp", ".gif", ".tif")):
        write_image(tmp_path / "photos" / f"{number}{suffix}", number)
    run(tmp_path, tmp_path / "photos")
    assert "GIF, TIFF, WEBP files are stored as PNG, without loss" in capsys.readouterr().out
    for split in ("train", "eval"):
        source = load(tmp_path, split)
        for name, record in zip(source.names, source.records.numpy()):
            expected = decode.decode_in_python((tmp_path / "photos" / name).read_bytes())
            np.testing.assert_array_equal(tf.io.decode_png(record), expected)


def test_images_of_more_bits_keep_them_in_the_range_that_a_run_would_tell(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, [2, 30, 20], np.uint16)
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    run(tmp_path, tmp_path / "photos")
    for split in ("train", "eval"):
        source = load(tmp_path, split)
        (number,) = (int(name[0]) for name in source.names)
        pixels = tf.io.decode_png(source.records.numpy()[0], dtype=tf.uint16)[..., 0].numpy()
        np.testing.assert_array_equal((pixels / 65535 * 4095).round(), values[number])


def test_several_folders_and_images_are_parts_of_the_folder_around(photos, tmp_path):
    run(tmp_path, photos / "train/calf", photos / "train/cow/a", name="two")
    names = {*load(tmp_path, name="two").names, *load(tmp_path, "eval", name="two").names}
    expected = {name.removeprefix("train/") for name in IMAGES if name.startswith("train")}
    assert names == {name for name in expected if not name.startswith("cow/b")}
    run(tmp_path, photos / "train/cow/a/0.jpg", photos / "train/cow/a/1.jpg", name="files")
    assert {*load(tmp_path, name="files").names, *load(tmp_path, "eval", name="files").names} == {
        "0.jpg",
        "1.jpg",
    }


def test_a_csv_file_names_images_labels_and_groups(photos, tmp_path):
    rows = [f"{name},{'young' if 'calf' in name else 'old'},{name.split('/')[-1]}" for name in IMAGES[::2]]
    table = photos / "labels.csv"
    table.write_text("\n".join(["name,label,day", *rows]))
    run(tmp_path, table, "--group=day", name="of_csv")
    source, test = load(tmp_path, name="of_csv"), load(tmp_path, "eval", name="of_csv")
    assert sorted([*source.names, *test.names]) == sorted(IMAGES[::2])
    assert not list(tmp_path.glob("of_csv/1.0.0/*unlabelled*"))
    assert source.class_names == ("old", "young")
    assert [source.class_names[label] == "young" for label in source.labels] == [
        "calf" in n for n in source.names
    ]
    # Without the CSV file as the source, other images are there without labels.
    run(tmp_path, photos, f"--labels={table}", name="some")
    assert len(load(tmp_path, name="some").names) == 12
    rest = load(tmp_path, name="some", train_split="train+train_unlabelled")
    assert len(rest.names) == 24 and not rest.num_classes


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_tar_files_of_webdataset(photos, tmp_path):
    images = [(photos / name).read_bytes() for name in IMAGES]
    labels = {
        "train-000": lambda n: ("cls", f"{n % 3}"),
        "train-001": lambda n: ("json", json.dumps({"label": n % 3})),
        "val-000": lambda n: ("txt", f"{n % 3}"),
    }
    for number, (stem, label) in enumerate(labels.items()):
        samples = {}
        for n in range(6):
            kind, text = label(n)
            samples |= {f"./x/{n}.jpg": images[6 * number + n], f"./x/{n}.{kind}": text.encode()}
        write_tar(tmp_path / f"{stem}.tar", samples)
    run(tmp_path, *sorted(tmp_path.glob("*.tar")))
    for split, count in (("train", 12), ("eval", 6)):
        source = load(tmp_path, split)
        assert len(source.names) == count and source.class_names == ("0", "1", "2")
        assert list(source.labels) == [int(name[-5]) % 3 for name in source.names]
        assert {*source.records.numpy()} <= {*images}
    assert sorted(path.name for path in (tmp_path / "cows").iterdir()) == ["1.0.0", "left_out.csv"]


def test_a_dataset_that_hugging_face_saved(photos, tmp_path):
    library = pytest.importorskip("datasets")
    features = {"picture": library.Image(), "kind": library.ClassLabel(names=["calf", "cow"])}
    rows = {
        "picture": [{"bytes": (photos / name).read_bytes(), "path": None} for name in IMAGES],
        "kind": ["cow" in name.split("/") for name in IMAGES],
    }
    table = library.Dataset.from_dict(rows, features=library.Features(features))
    library.DatasetDict({"train": table, "test": table.select(range(20, 30))}).save_to_disk(
        tmp_path / "saved"
    )
    run(tmp_path, tmp_path / "saved")
    source, test = load(tmp_path), load(tmp_path, "eval")
    assert (len(source.names), len(test.names)) == (32, 10) and source.class_names == ("calf", "cow")
    row = int(source.names[5].split("/")[-1][:-4])
    assert source.records.numpy()[5] == rows["picture"][row]["bytes"]
    assert source.labels[5] == rows["kind"][row]


REFUSED = {
    "missing": (["nowhere"], "expected folders and images"),
    "type": ([__file__], "expected folders and images"),
    "mixed": (["PHOTOS", "PHOTOS/labels.csv"], "expected folders and images"),
    "no tar": (["broken.tar"], "expected a tar file of samples"),
    "side": (["PHOTOS", "--max_side=0"], "--max_side=0: expected a whole number from 1"),
    "flag": (["PHOTOS", "--max_sides=5"], "--max_sides=5: unknown; options of Beam need --runner"),
    "name": (["PHOTOS", "--name=mnist"], "--name=mnist: expected a new name"),
    "again": (["PHOTOS"], "exists already: choose another --name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_before_any_work(case, photos, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 500)
    (photos / "labels.csv").write_text("name,label\n")
    arguments, message = REFUSED[case]
    arguments = [word.replace("PHOTOS", str(photos)) for word in arguments]
    data_dir = prepared if case == "again" else tmp_path / "new"
    with pytest.raises(UserError, match=message):
        prepare.main(["--name=cows", f"--data_dir={data_dir}", *arguments])
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    importlib.reload(workers)
    with pytest.raises(UserError, match="apache_beam is not installed: pip install apache-beam"):
        prepare.main([str(photos), "--name=cows", f"--data_dir={tmp_path}", "--runner=DirectRunner"])


def test_beam_writes_the_same_bytes(photos, prepared, tmp_path):
    pytest.importorskip("apache_beam")
    run(tmp_path, photos, "--group=2", "--runner=DirectRunner", "--direct_num_workers=2")
    assert contents(tmp_path / "cows") == contents(prepared / "cows")


def test_beam_lists_what_it_leaves_out(tmp_path):
    pytest.importorskip("apache_beam")
    photos = photographs(tmp_path / "photos")
    Image.new("RGB", (20, 20), "grey").save(photos / "train/cow/a/9.jpg")
    home = run(tmp_path, photos, "--runner=DirectRunner", "--direct_running_mode=in_memory")
    assert left_out(home) == {"train/cow/a/9.jpg": "of one colour"}
    assert len(load(tmp_path).names) == 24


SLOW = """
import sys, time
from simclr_jax.data import prepare

convert = prepare.convert
def slow(*arguments):
    time.sleep(0.5)
    return convert(*arguments)
prepare.convert = slow
prepare.main(sys.argv[1:])
"""


def test_a_start_after_a_kill_writes_the_same_bytes(photos, prepared, tmp_path):
    arguments = [str(photos), "--group=2", "--name=cows", f"--data_dir={tmp_path}"]
    started = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], cwd=ROOT, env=environment(1))
    until = time.monotonic() + 60
    while not list(tmp_path.glob("cows/incomplete.*")):
        assert started.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    time.sleep(1)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert list(tmp_path.glob("cows/incomplete.*")) and not (tmp_path / "cows/1.0.0").exists()
    # Another process has other addresses in memory.
    command = [sys.executable, "-m", "simclr_jax.data.prepare", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment(1), check=True)
    assert not list(tmp_path.glob("cows/incomplete.*"))
    assert contents(tmp_path / "cows") == contents(prepared / "cows")


def pretraining(prepared, **overrides):
    settings = {"dataset.name": "cows", "dataset.data_dir": str(prepared), "dataset.in_memory": False}
    settings |= {"dataset.shuffle_buffer": 8, "batch_size": 8, "num_steps": 5, "log_every_steps": 1}
    return tiny_config("pretrain", **settings, **overrides)


def fit(run_config, until, folder):
    source = datasets.load(run_config.dataset, "train", seed=run_config.seed)
    task = pretrain.make_task(run_config, make_model(run_config.model, source.num_classes), source)
    return jax.device_get(train.fit(task._replace(num_steps=until), run_config, folder)["params"])


@pytest.mark.journey
def test_a_pretraining_resumes_in_the_middle(prepared, tmp_path):
    run_config = pretraining(prepared)
    straight = fit(run_config, 5, tmp_path / "straight")
    fit(run_config, 2, tmp_path / "resumed")
    jax.tree.map(np.testing.assert_array_equal, fit(run_config, 5, tmp_path / "resumed"), straight)


@pytest.mark.journey
def test_two_processes_share_the_examples(prepared, tmp_path):
    flags = ["--config=configs/digits.py", "", "--config.num_steps=3"]
    flags += [f"--config.dataset.{key}" for key in ("name=cows", f"data_dir={prepared}", "in_memory=False")]
    flags += ["--config.batch_size=8", "--config.image_size=16", "--config.model.width=0.125"]
    flags += ["--config.dataset.shuffle_buffer=8", "--config.log_every_steps=1", "--config.model.stem=auto"]
    flags += ["--config.evaluate.compare=False", "--config.evaluate.pictures=False"]
    losses = []
    for count in (1, 2):
        flags[1] = f"--workdir={tmp_path / str(count)}"
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "simclr_jax.main", *flags, *(joining if count > 1 else [])],
                cwd=ROOT,
                env=environment(2 // count),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for joining in join(count)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * count, outputs
        losses.append([line["loss"] for line in log_of(tmp_path / str(count)) if "loss" in line])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_embed_and_predict_write_the_names(prepared, finetuned_run, tmp_path):
    expected = {*load(prepared).names, *load(prepared, "eval").names}
    for task, run_of in (("embed", finetuned_run), ("predict", finetuned_run)):
        keys = {"dataset.name": "cows", "dataset.data_dir": str(prepared), "pretrained": str(run_of)}
        run_task(task, tmp_path / task, batch_size=8, **keys)
        (file,) = (tmp_path / task).glob("*.parquet")
        assert {*parquet.read_table(file)["name"].to_pylist()} == expected
