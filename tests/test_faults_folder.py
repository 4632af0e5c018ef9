"""Folders and files that go wrong: what is not opened, refused, set aside, replaced; what is said of it."""

import itertools
import json
import math
import os
import socket

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image
from test_datasets import config, load_folder, names, write_folder, write_image

from simclr_jax.data import datasets, pipeline
from simclr_jax.data import decode as decoder
from simclr_jax.data.sources import folder
from simclr_jax.evaluation import probes
from simclr_jax.process import console
from simclr_jax.process.errors import UserError
from simclr_jax.workdir import records

pytestmark = pytest.mark.slow


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


SPECIAL = {
    "named pipes": pipe,
    "sockets": unix_socket,
    "symbolic links": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.parent),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_never_opened(tmp_path, capsys, kind):
    write_folder(tmp_path, [f"{number}.png" for number in range(4)])
    SPECIAL[kind](tmp_path / "x.jpg")
    listed = folder.catalogue(str(tmp_path), seed=0)
    assert len(listed["train"] + listed["eval"]) == 4
    printed = {"loop": "1 symbolic links", "folder": "ignored nothing"}.get(kind, f"1 {kind}")
    assert printed in capsys.readouterr().out


def test_a_folder_of_links_says_what_helps(tmp_path):
    write_image(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    with pytest.raises(
        UserError, match="1 symbolic links; links are not followed: set --config.dataset.path"
    ):
        folder.catalogue(str(tmp_path / "links"), seed=0)


def test_folders_that_cannot_be_read_are_left_out_and_told(tmp_path, monkeypatch, capsys):
    """As of lost+found, and of a folder of mode 444, whose files are listed only: root may read both."""
    write_folder(tmp_path, [*(f"{number}.png" for number in range(4)), "listed/1.png", "listed/2.png"])
    (tmp_path / "lost+found").mkdir()
    scandir, lstat = os.scandir, os.lstat

    def refuse(function, part):
        def call(path, *rest, **options):
            if part in os.fspath(path):
                raise PermissionError(13, "Permission denied", path)
            return function(path, *rest, **options)

        return call

    monkeypatch.setattr(os, "scandir", refuse(scandir, "lost+found"))
    monkeypatch.setattr(os, "lstat", refuse(lstat, "listed/"))
    listed = folder.catalogue(str(tmp_path), seed=0)
    assert len(listed["train"] + listed["eval"]) == 4
    printed = capsys.readouterr().out
    assert "left out, unreadable (Permission denied): 2 images in listed/, lost+found/" in printed
    with pytest.raises(UserError, match="found no .* and no others; left out, unreadable"):
        folder.catalogue(str(tmp_path / "listed"), seed=0)


def test_what_is_no_photograph_is_left_out_and_told_but_stays_in_an_older_list(tmp_path, capsys):
    photos = [f"{kind}/{number}.png" for kind in ("config", "plots") for number in range(4)]
    others = [
        "@eaDir/a/1.jpg",
        "$RECYCLE.BIN/S-1/1.png",
        "__MACOSX/._1.png",
        ".thumbnails/1.png",
        "a/._1.png",
    ]
    others += ["run/plots/map.png", "run/embed/plots/map.png"]
    root = write_folder(tmp_path / "photos", [*photos, *others])
    (root / "config" / "config.json").write_text('{"model": "of another program"}')
    records.save_config(root / "run", {"dataset": {}, "model": {}})
    names = {name for name, _ in folder.catalogue(str(root), seed=0)["train"]}
    assert names < set(photos)
    printed = capsys.readouterr().out
    assert "2 classes; ignored 1 .json" in printed
    assert "left out, thumbnails and bins: 3 images in $RECYCLE.BIN/S-1/, @eaDir/a/, __MACOSX/" in printed
    assert "left out, hidden: 2 images in .thumbnails/, a/" in printed
    assert "left out, written by runs: 2 images in run/embed/plots/, run/plots/" in printed
    entries = [[name, -1] for name in [*photos, others[0], "run/plots/map.png"]]
    (tmp_path / "images.json").write_text(json.dumps({"classes": [], "train": entries, "eval": []}))
    listed = folder.catalogue(str(root), seed=0, workdir=tmp_path)
    assert listed["train"] == entries and not listed["lost"]


def test_pictures_of_a_run_in_the_folder_itself_are_left_out(tmp_path):
    root = write_folder(tmp_path, ["1.png", "2.png", "plots/map.png"])
    records.save_config(root, {"dataset": {}, "model": {}})
    listed = folder.catalogue(str(root), seed=0)
    assert sorted(name for name, _ in listed["train"] + listed["eval"]) == ["1.png", "2.png"]


def test_the_folder_of_a_run_is_kept_absolute_and_may_move(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", ["1.png"])
    saved = {"dataset": {"name": "folder", "path": "photos", "labels": None}, "seed": 0}
    records.save_config("run", saved)
    assert records.read_config("run")["dataset"]["path"] == str(tmp_path / "photos")
    records.check_config("run", saved)
    moved = {"dataset": {"name": "folder", "path": str(tmp_path / "moved"), "labels": None}, "seed": 0}
    with pytest.raises(UserError, match="dataset.path is .*photos' there and .*moved' here"):
        records.check_config("run", moved)
    (tmp_path / "photos").rename(tmp_path / "moved")
    records.check_config("run", moved)
    assert "note: dataset.path was" in capsys.readouterr().out
    found = ConfigDict(records.read_config("run"))
    with pytest.raises(UserError, match="photos is no folder now: set --path=PHOTOS to where"):
        records.find_images(found)
    records.find_images(found, "moved")
    assert found.dataset.path == "moved"
    with pytest.raises(UserError, match="--path=moved: the run is on digits, no folder: leave it out"):
        records.find_images(ConfigDict({"dataset": {"name": "digits", "path": None}}), "moved")


def test_bombs_are_refused_by_name_with_the_key(tmp_path, capsys):
    write_folder(tmp_path, ["1.png", "2.png"])
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    folder.catalogue(str(tmp_path), seed=0)
    printed = capsys.readouterr().out
    assert "bomb.png (20000 x 10000 pixels)" in printed and "raise --config.dataset.max_pixels" in printed
    write_image(tmp_path / "3.png", size=(30, 30))
    listed = folder.catalogue(str(tmp_path), seed=0, max_pixels=100)
    assert sorted(name for name, _ in listed["train"] + listed["eval"]) == ["1.png", "2.png"]


DAMAGE = [b"", b'{"classes": [], "tra', b"\xff\xfe", b"[]", b"null", b'{"classes": 1, "train": 2, "eval": 3}']
DAMAGE += [b'{"classes": [], "train": [["a\\u0000.png", -1]], "eval": []}', b"\0" * 50, b"[" * 100_000]
DAMAGE += [b'{"classes": [], "train": [[1, 2]], "eval": []}', b'{"classes": [], "train": [], "eval": []}']
DAMAGE += [b'{"classes": ["a"], "train": [["1.png", 5]], "eval": []}', None]


@pytest.mark.parametrize("contents", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_list_is_set_aside_and_made_anew(tmp_path, capsys, contents):
    root, workdir = write_folder(tmp_path / "photos", [f"{i}.png" for i in range(6)]), tmp_path / "run"
    workdir.mkdir()
    expected = folder.catalogue(str(root), seed=0)
    listing = workdir / "images.json"
    listing.mkdir() if contents is None else listing.write_bytes(contents)
    assert folder.catalogue(str(root), seed=0, workdir=workdir) == expected
    assert (workdir / "images.json.damaged").exists() and "made anew" in capsys.readouterr().out
    assert folder.catalogue(str(root), seed=0, workdir=workdir) == expected


@pytest.mark.parametrize("name", ["/etc/hostname.png", "../secret.png", "a/../../b.png"])
def test_a_list_cannot_point_outside(tmp_path, name):
    write_folder(tmp_path / "photos", ["1.png"])
    (tmp_path / "images.json").write_text(json.dumps({"classes": [], "train": [[name, -1]], "eval": []}))
    with pytest.raises(UserError, match="not inside of") as error:
        folder.catalogue(str(tmp_path / "photos"), seed=0, workdir=tmp_path)
    assert "\n" not in str(error.value)


ODD = [b"[a]*?{}", b"%d#$ '\"`\\", b"line\nbreak", "Ünï/côdé 図".encode(), b"\xff\xfe", b"-rf"]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_any_name_is_read_and_shown_escaped(tmp_path, capsys, name):
    root = os.fsencode(tmp_path) + b"/" + name
    os.makedirs(root + b"/" + name.replace(b"/", b"-"))
    for number in range(8):
        image = tf.io.encode_png(np.full([4, 4, 3], number, np.uint8)).numpy()
        with open(
            root + b"/" + name.replace(b"/", b"-") + b"/%d" % number + name.replace(b"/", b"-") + b".png",
            "wb",
        ) as f:
            f.write(image)
    (tmp_path / "run").mkdir()
    for _ in range(2):
        source = load_folder(os.fsdecode(root), workdir=tmp_path / "run")
    batch = next(pipeline.eval_batches(source, image_size=4, batch_size=source.num_examples))
    assert len(set(batch["image"][:, 0, 0, 0])) == source.num_examples > 4
    printed = capsys.readouterr().out
    assert printed.isprintable() or all(line.isprintable() for line in printed.split("\n"))
    assert len(printed.splitlines()) == 1


def test_labels_beyond_num_classes_are_refused(tmp_path):
    write_folder(tmp_path, [f"{kind}/{i}.png" for kind in "abc" for i in range(3)])
    with pytest.raises(UserError, match="num_classes=2, but .* has the 3 classes a, b, c; unset"):
        datasets.load(config("folder", path=str(tmp_path), num_classes=2), "train", seed=0)


def test_16_bits_get_one_range_that_the_list_keeps(tmp_path, capsys):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(6):
        values = (
            np.random.default_rng(number).integers(0, 4000 if number else 300, (8, 8, 1)).astype(np.uint16)
        )
        (root / f"{number}.png").write_bytes(tf.io.encode_png(values).numpy())
    sources = [load_folder(root, workdir=tmp_path) for _ in range(2)]
    assert [source.value_range for source in sources] == [(0, 4095)] * 2
    said = capsys.readouterr().out
    assert "6 PNG, 16 bits, 1 channel; black is 0, white 4095 (--config.dataset.value_range)" in said
    assert {source.dtype for source in sources} == {"float16"}
    keys = config("folder", path=str(root), value_range=(0, 65535))
    dark = datasets.load(keys, "train", seed=0)
    brightest = [source.decode(dark.records[1]).numpy().max() for source in (dark, sources[1])]
    assert brightest[0] < 0.07 and brightest[1] > 0.9


def test_what_was_taken_how_is_told(tmp_path, capsys):
    write_folder(tmp_path, ["1.png", "2.png"])
    tags = Image.Exif()
    tags[0x0112] = 6
    write_image(tmp_path / "turned.jpg", exif=tags)
    write_image(tmp_path / "clear.png", mode="RGBA")
    write_image(tmp_path / "scan.tif")
    (tmp_path / "scan.xcf").touch()
    folder.catalogue(str(tmp_path), seed=0)
    printed = capsys.readouterr().out
    assert "1 TIFF, 8 bits, 3 channels; 1 rotated by their tag; 1 transparent, on white" in printed
    assert "ignored 1 .xcf" in printed


LAYOUTS = {
    "beside": (
        ["train/a/1.png", "train/b/1.png", "test/a/1.png", "unlabeled/1.png", "unlabeled/2.png"],
        "left out: 2 images in unlabeled/; --config.dataset.classes=False",
    ),
    "loose": (["train/a/1.png", "train/b/1.png", "val/a/1.png", "1.png"], "left out: 1 image beside them"),
    "long names": (
        ["training/1.png", "training/2.png", "validation/1.png"],
        "splits: training/ and validation/",
    ),
    "train alone": (["train/a/1.png", "train/b/1.png", "train/b/2.png"], "classes: the 2 sub-folders of"),
    "classes": ([f"day {i}/1.png" for i in range(30)], "classes: the 30 sub-folders of"),
    "stray": (["a/1.png", "b/1.png", "1.png"], "no classes: 1 image beside the 2 sub-folders"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_said(tmp_path, capsys, layout):
    files, printed = LAYOUTS[layout]
    folder.catalogue(str(write_folder(tmp_path, files)), seed=0)
    assert printed in capsys.readouterr().out


def test_without_classes_everything_but_the_held_out_folder_is_trained_on(tmp_path):
    files = LAYOUTS["beside"][0]
    listed = folder.catalogue(str(write_folder(tmp_path, files)), seed=0, classes=False)
    assert listed["classes"] == [] and listed["eval"] == [["test/a/1.png", -1]]
    assert [name for name, _ in listed["train"]] == ["train/a/1.png", "train/b/1.png", *files[3:]]


def test_a_held_out_image_keeps_its_side(tmp_path):
    root = write_folder(tmp_path, [f"{number}.png" for number in range(80)])
    before = names(root, load_folder(root, "eval"))
    write_folder(root, [f"new-{number}.png" for number in range(40)])
    (root / before[0]).unlink()
    after = [name for name in names(root, load_folder(root, "eval")) if not name.startswith("new")]
    assert after == before[1:] and 3 <= len(before) <= 16


def plain(image, seed):
    return {"image": tf.cast(image[:4, :4], tf.float32) / 255}


def test_lost_files_are_replaced_in_training_and_left_out_elsewhere(tmp_path, capsys):
    ahead = 2 * (5 + math.ceil(pipeline._CALLS / 8))  # batches that may be read already, at most half of them
    root = write_folder(tmp_path, [f"{number}.png" for number in range(10 * (ahead + 2))])
    source = load_folder(root)
    steps = 2 * (ahead + 2)
    whole = list(itertools.islice(pipeline.train_batches(source, plain, batch_size=8, seed=0), steps))
    batches = pipeline.train_batches(source, plain, batch_size=8, seed=0)
    first = next(batches)
    ahead = np.concatenate([batch["index"] for batch in whole[:ahead]])
    gone, broken = np.setdiff1d(np.arange(source.num_examples), ahead)[:2]
    (root / source.names[gone]).unlink()
    (root / source.names[broken]).write_bytes(b"cut")
    others = [first, *itertools.islice(batches, steps - 1)]
    for one, two in zip(whole, others, strict=True):
        kept = ~np.isin(one["index"], [gone, broken])
        np.testing.assert_array_equal(one["index"][kept], two["index"][kept])
        assert not np.isin(two["index"], [gone, broken]).any()
    evaluated = list(pipeline.eval_batches(load_folder(root)._replace(lost=None), image_size=4, batch_size=8))
    assert sum(batch["mask"].sum() for batch in evaluated) == load_folder(root).num_examples
    printed = capsys.readouterr().out
    assert f"{source.names[gone]} (vanished)" in printed and f"{source.names[broken]} (no JPEG" in printed


def test_evaluation_leaves_lost_files_out(tmp_path):
    root = write_folder(tmp_path, [f"{number}.png" for number in range(40)])
    source = load_folder(root)
    for row in (9, 20):
        (root / source.names[row]).unlink()
    batches = list(pipeline.eval_batches(source, image_size=4, batch_size=8))
    index = np.concatenate([batch["index"][batch["mask"]] for batch in batches])
    assert index.tolist() == [row for row in range(source.num_examples) if row not in (9, 20)]
    assert np.flatnonzero(datasets.lost_rows(source)).tolist() == [9, 20]


def test_processes_tell_what_they_alone_know(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path / "photos", [f"{number}.png" for number in range(40)])
    monkeypatch.setattr(console, "_silent", True)  # as on all processes but the first
    source = load_folder(root, workdir=tmp_path)
    assert capsys.readouterr().out == ""  # all processes list the folder
    (root / source.names[9]).unlink()
    list(pipeline.eval_batches(source, image_size=4, batch_size=8))
    assert f"{source.names[9]} (vanished)" in capsys.readouterr().out  # others have not read it
    load_folder(root, workdir=tmp_path)
    assert capsys.readouterr().out == ""  # all processes miss it
    monkeypatch.undo()
    load_folder(root, workdir=tmp_path)
    assert f"{source.names[9]} (vanished)" in capsys.readouterr().out


def test_a_tenth_lost_is_an_error(tmp_path):
    root = write_folder(tmp_path, [f"{number}.png" for number in range(40)])
    source = load_folder(root)
    for name in source.names[:6]:
        (root / name).unlink()
    with pytest.raises(UserError, match="6 of .* images can no longer be read: .*restore them"):
        list(pipeline.eval_batches(source, image_size=4, batch_size=8))


def test_whole_files_are_not_decoded_at_the_start_and_damaged_ones_found_later(tmp_path, monkeypatch, capsys):
    tags = Image.Exif()
    tags[0x0112] = 6
    write_folder(tmp_path, ["a.png", "b.jpg"])
    write_image(tmp_path / "clear.png", mode="RGBA")
    write_image(tmp_path / "deep.jpg", exif=tags, comment=b"x" * 60_000, icc_profile=b"y" * 100_000)
    write_image(tmp_path / "turned.jpg", exif=tags)
    contents = (tmp_path / "a.png").read_bytes()
    place = contents.index(b"IDAT") + 8
    (tmp_path / "broken.png").write_bytes(contents[:place] + bytes(20) + contents[place + 20 :])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-9])
    decoded = []
    read = decoder.read
    monkeypatch.setattr(
        decoder, "read", lambda contents, *rest: decoded.append(contents) or read(contents, *rest)
    )
    folder.catalogue(str(tmp_path), seed=0)
    printed = capsys.readouterr().out
    assert "2 rotated by their tag; 1 transparent, on white" in printed and "1 corrupt: cut.jpg" in printed
    assert decoded == [(tmp_path / "deep.jpg").read_bytes()]  # its size is told behind what is read
    source = load_folder(tmp_path, "all")
    batches = pipeline.eval_batches(source, image_size=4, batch_size=2)
    assert sum(batch["mask"].sum() for batch in batches) == 5
    assert "broken.png" in capsys.readouterr().out


def test_groups_stay_on_one_side(tmp_path, capsys):
    files = [f"{label}/p{patient}/{i}.png" for label in "ab" for patient in range(12) for i in range(2)]
    path = str(write_folder(tmp_path / "photos", files))
    for keys in ({"group": "2"}, {"group": "Patient", "labels": str(tmp_path / "labels.csv")}):
        rows = [f"{name},{name[0]},{name.split('/')[1]}" for name in files]
        (tmp_path / "labels.csv").write_text("\n".join(["name,label,patient", *rows]))
        sides = [
            datasets.load(config("folder", path=path, **keys), split, seed=0) for split in ("train", "eval")
        ]
        groups = [set(side.groups) for side in sides]
        assert groups[0] | groups[1] == {f"p{i}" for i in range(12)} and not groups[0] & groups[1]
        assert len(sides[1].names) == 4 * len(groups[1]) > 0
        for learnt, tested in probes.folds(sides[0].labels, sides[0].groups):
            assert len(tested) and not set(sides[0].groups[learnt]) & set(sides[0].groups[tested])
    subset = datasets.subset(sides[0], np.arange(3))
    assert list(subset.groups) == [name.split("/")[1] for name in subset.names]


def test_groups_that_cannot_be_are_refused(tmp_path):
    both = str(write_folder(tmp_path / "both", ["train/p1/1.png", "train/p2/1.png", "val/p1/2.png"]))
    flat = str(write_folder(tmp_path / "flat", ["p/1.png", "2.png"]))
    for path, group, message in (
        (both, "1", "the group p1 has training and held-out images"),
        (flat, "1", "2.png has no sub-folder of level dataset.group=1"),
        (flat, "patient", "dataset.group=patient is a column of a CSV file: set --config.dataset.labels"),
    ):
        with pytest.raises(UserError, match=message):
            folder.catalogue(path, seed=0, group=group)
