"""Tiles are crops of the whole picture, read without the rest of it, and images like others otherwise."""

import numpy as np
import pytest
from conftest import run_task, tiny_config
from PIL import Image
from test_datasets import config
from test_readers import tiff

import simclr_jax
from simclr_jax import pretrained
from simclr_jax.data import datasets, decode, tiles
from simclr_jax.data.source import find_lost
from simclr_jax.data.sources import folder
from simclr_jax.evaluation import stored, suggest
from simclr_jax.plots import __main__ as plots
from simclr_jax.process import UserError

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

H, W, TILE = 90, 130, 48
RANDOM = np.random.default_rng(0)
SMOOTH = (np.add.outer(np.arange(H), 1.5 * np.arange(W))[..., None] * [0.8, 0.5, 0.3] + 20).astype(np.uint8)
DEEP = RANDOM.integers(0, 4096, (H, W, 5)).astype(np.uint16)


def save(path, **options):
    Image.fromarray(SMOOTH).save(path, **options)


def volume(path, **options):
    tifffile.imwrite(path, np.moveaxis(DEEP, -1, 0)[None], metadata={"axes": "ZCYX"}, **options)


def write(pixels, **options):
    return lambda path: path.write_bytes(tiff(pixels, **options))


ORIENTED = Image.Exif()
ORIENTED[274] = 6
FILES = {
    "tiled.tif": write(DEEP, tile=(32, 32), compression="deflate", predictor=True),
    "stripped.tif": write(DEEP, rowsperstrip=7, compression="deflate"),
    "one_strip.tif": write(DEEP[..., :1], rowsperstrip=H, compression="lzw"),
    "plain.tif": write(DEEP),
    "big_endian.tif": write(DEEP[..., 0], byteorder=">"),
    "planar.tif": write(np.moveaxis(DEEP, -1, 0), planarconfig="separate", tile=(16, 48), compression="lzw"),
    "planes.tif": write(np.moveaxis(DEEP, -1, 0), planarconfig="separate", rowsperstrip=20),
    "rgb.tif": write(SMOOTH, tile=(64, 32), compression="lzw"),
    "inverted.tif": write(SMOOTH[..., 0], photometric="miniswhite", rowsperstrip=9),
    "turned.tif": write(SMOOTH, rowsperstrip=8, extratags=[(274, "H", 1, 8, True)]),
    "jpeg.tif": write(SMOOTH, tile=(48, 48), compression="jpeg"),
    "alpha.tif": write(np.dstack([DEEP[..., :3] * 16, DEEP[..., 3] * 16]), tile=(32, 32), extrasamples=[2]),
    "floats.tif": write(DEEP[..., 0].astype(np.float32) / 4096, tile=(32, 32), compression="deflate"),
    "ome.tif": lambda path: volume(path, ome=True, tile=(32, 32)),
    "imagej.tif": lambda path: volume(path, imagej=True),
    "cielab.tif": lambda path: Image.fromarray(SMOOTH).convert("LAB").save(path),
    "photo.jpg": lambda path: save(path, quality=95),
    "turned.jpg": lambda path: save(path, quality=95, exif=ORIENTED),
    "photo.png": save,
    "array.npy": lambda path: np.save(path, DEEP),
}


@pytest.mark.parametrize("name", FILES)
def test_a_tile_is_a_crop_of_the_displayed_picture(tmp_path, name):
    path = tmp_path / ("a#1,2" + name)
    FILES[name](path)
    facts, deviations = decode.survey(str(path), TILE, 10, decode.MAX_PIXELS, None)
    whole = decode.inspect(path.read_bytes())
    assert facts[:3] == whole[:3]
    dtype = "uint8" if facts.dtype == "uint8" else "float32"
    options = {"value_range": (0, 4095) if dtype != "uint8" else None, "max_pixels": decode.MAX_PIXELS}
    options |= {"channels": facts.channels, "dtype": dtype}
    picture = decode.decode(str(path), **options).numpy()
    assert len(deviations) == 12
    covered = np.zeros(picture.shape[:2], bool)
    for x, y in deviations:
        tile = decode.decode(tiles.name_of(str(path), x, y), tile=TILE, **options).numpy()
        crop = picture[y : y + TILE, x : x + TILE]
        assert tile.shape == crop.shape == (TILE, TILE, facts.channels) and tile.dtype == crop.dtype
        tolerance = {"jpeg.tif": 2, "turned.jpg": 3}.get(name, 0)  # decoded by two libraries
        np.testing.assert_allclose(tile.astype(float), crop.astype(float), atol=tolerance)
        covered[y : y + TILE, x : x + TILE] = True
    assert covered.all()


def test_places_cover_an_axis_by_whole_tiles():
    assert tiles.starts(100, 100, 0) == tiles.starts(7, 100, 0) == [0]
    assert tiles.starts(200, 100, 0) == [0, 100]
    assert tiles.starts(250, 100, 0) == [0, 100, 150]
    assert tiles.starts(250, 100, 50) == [0, 50, 100, 150]
    assert tiles.file_of("a/b#c.tif#12,0") == "a/b#c.tif" and tiles.place_of("a/b#c.tif#12,0") == (12, 0)
    assert tiles.file_of("#1,2.png") == "#1,2.png"


@pytest.mark.parametrize(
    "options, count", [({"tile": (32, 32)}, 6), ({"rowsperstrip": 7}, 8)], ids=["tiled", "stripped"]
)
def test_only_the_parts_that_a_tile_touches_are_read(tmp_path, monkeypatch, options, count):
    path = tmp_path / "slide.tif"
    write(DEEP, compression="deflate", **options)(path)
    read, segment = [], tiles._segment
    monkeypatch.setattr(tiles, "_segment", lambda page, index: read.append(index) or segment(page, index))
    decode.read_file(f"{path}#40,30", decode.MAX_PIXELS, 5, TILE)
    assert len(read) == len(set(read)) == count


def test_a_level_of_a_pyramid_tells_background(tmp_path, monkeypatch):
    pixels = np.full((256, 256, 3), 240, np.uint8)
    pixels[:128, 64:192] = RANDOM.integers(0, 255, (128, 128, 3))
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as file:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
        file.write(pixels, subifds=1, **options)
        file.write(pixels[::4, ::4], subfiletype=1, **options)
    read, segment = [], tiles._segment
    monkeypatch.setattr(tiles, "_segment", lambda page, index: read.append(page) or segment(page, index))
    _, deviations = decode.survey(str(path), 64, 0, decode.MAX_PIXELS, None)
    assert len(read) == 4 and {page.imagewidth for page in read} == {64}
    seen = {place for place, values in deviations.items() if values.max() > 20}
    assert seen == {(x, y) for x in (64, 128) for y in (0, 64)}


def sides(root, workdir=None, **keys):
    keys = {"path": str(root), "tile": 16, **keys}
    return [
        datasets.load(config("folder", **keys), split, seed=0, workdir=workdir) for split in ("train", "eval")
    ]


@pytest.fixture
def slides(tmp_path):
    """Files of 2 x 2 tiles, of which the last is white."""
    root = tmp_path / "slides"
    for number in range(6):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = RANDOM.integers(0, 200, (32, 32, 3), np.uint8)
        pixels[16:, 16:] = 250 + RANDOM.integers(0, 3, (16, 16, 3))
        Image.fromarray(pixels).save(root / "ab"[number % 2] / f"{number}.png")
    return root


def test_tiles_have_names_classes_and_sides_of_their_files(slides, capsys):
    train, held_out = sides(slides)
    places = {"0,0", "16,0", "0,16"}
    for side in (train, held_out):
        files = {tiles.file_of(name) for name in side.names}
        assert set(side.names) == {f"{file}#{place}" for file in files for place in places}
        assert list(side.groups) == [tiles.file_of(name) for name in side.names]
        assert [side.class_names[label] for label in side.labels] == [name[0] for name in side.names]
    assert not set(train.groups) & set(held_out.groups) and len(train.names) + len(held_out.names) == 18
    assert "tiles: 18 of 24 tiles of 6 images; the others have nearly one colour" in capsys.readouterr().out
    row = list(train.names).index(train.names[-1])
    assert train.decode(train.records[row]).shape == (16, 16, 3)


def test_labels_of_files_are_those_of_their_tiles_but_for_tiles_with_their_own(slides, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text('name,label,day\n"a/0.png#16,0",y,1\na/0.png,x,1\nb/1,y,2\na/2,x,1\n')
    keys = {"path": str(slides), "tile": 16, "labels": str(labels), "group": "day"}
    source = datasets.load(config("folder", **keys), "all", seed=0)
    label = {name: source.class_names[at] for name, at in zip(source.names, source.labels) if at >= 0}
    own = {"a/0.png#0,0": "x", "a/0.png#0,16": "x", "a/0.png#16,0": "y"}
    for place in ("0,0", "0,16", "16,0"):
        own |= {f"b/1.png#{place}": "y", f"a/2.png#{place}": "x"}
    assert label == own
    groups = dict(zip(source.names, source.groups))
    assert [groups[f"{file}#0,0"] for file in ("a/2.png", "b/1.png", "b/3.png")] == ["1", "2", "b/3.png"]


def test_a_list_of_tiles_stays_and_vanished_files_are_left_out(slides, tmp_path, capsys):
    first = sides(slides, tmp_path / "run")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(slides / "a" / "new.png")
    again = sides(slides, tmp_path / "run")
    assert [list(side.names) for side in first] == [list(side.names) for side in again]


def test_files_that_vanish_or_break_take_their_tiles_along(slides, tmp_path, capsys):
    for number in range(40):
        pixels = RANDOM.integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(slides / "a" / f"{10 + number}.png")
    train, _ = sides(slides, tmp_path / "run")
    vanished, broken = train.groups == train.groups[0], train.groups == train.groups[-1]
    (slides / train.groups[0]).unlink()
    (slides / train.groups[-1]).write_bytes(b"damaged")
    again, _ = sides(slides, tmp_path / "run")
    assert (datasets.lost_rows(again) == vanished).all()
    assert find_lost(train, np.flatnonzero(broken)[:1], np.arange(len(train.names)))
    assert datasets.lost_rows(train).sum() == 1 + vanished.sum()
    assert f"{train.names[0]} (vanished)" in capsys.readouterr().out


def test_images_of_one_colour_and_wrong_tiles_are_refused(tmp_path, slides):
    (tmp_path / "black").mkdir()
    Image.fromarray(np.full((40, 40, 3), 9, np.uint8)).save(tmp_path / "black" / "black.png")
    with pytest.raises(UserError, match="0 of 9 tiles of 1 image; the others have nearly one colour"):
        folder.catalogue(str(tmp_path / "black"), seed=0, tile=16)
    with pytest.raises(UserError, match="tile_overlap=16: expected less than dataset.tile=16"):
        sides(slides, tile_overlap=16)

    def run_tiles(tile, keys):
        simclr_jax.run(tiny_config("pretrain", **keys, **{"dataset.tile": tile}), tmp_path / "run")

    with pytest.raises(UserError, match="dataset.tile=0: set config.dataset.tile to a number above 0"):
        run_tiles(0, {"dataset.name": "folder"})
    with pytest.raises(UserError, match="dataset.tile=8 is not read where dataset.name=digits"):
        run_tiles(8, {})


def test_damaged_slides_are_left_out_by_name(slides, capsys):
    contents = tiff(DEEP[..., :3], tile=(32, 32), compression="deflate")
    (slides / "a" / "cut.tif").write_bytes(contents[: len(contents) // 2])
    sides(slides)
    assert "skipped 1 corrupt: a/cut.tif" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.journey
def test_pretrain_embed_and_predict_name_tiles(tmp_path):
    keys = {"dataset.name": "folder", "dataset.path": str(tmp_path / "slides")}
    for number in range(12):
        pixels = np.roll(DEEP[:40, :40], number, 0) // (1 + number % 2 * np.array([0, 0, 0, 0, 9], np.uint16))
        path = tmp_path / "slides" / "ab"[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiff(pixels, tile=(16, 16), compression="deflate"))
    tile = {"dataset.tile": 16, "dataset.tile_overlap": 4}
    run_task("pretrain", tmp_path / "run", batch_size=16, num_steps=2, **keys, **tile)

    def settings(task, run):
        settings = tiny_config(task, **keys, pretrained=str(run))
        pretrained.inherit_settings(settings, {"batch_size": 8})
        return settings

    embed = settings("embed", tmp_path / "run")
    assert (embed.dataset.tile, embed.dataset.tile_overlap, embed.dataset.value_range) == (16, 4, (0, 4095))
    simclr_jax.run(embed, tmp_path / "run" / "embed")
    names = stored.read(tmp_path / "run" / "embed", embed).names
    assert len(names) == 12 * 9 and names[:2] == ["a/0.tif#0,0", "a/0.tif#0,12"]
    suggest.main([str(tmp_path / "run"), "--count=3", f"--output={tmp_path / 'labels.csv'}"])
    rows = (tmp_path / "labels.csv").read_text("utf-8-sig").splitlines()
    assert len(rows) == 4 and all(row.split('"')[1] in names for row in rows[1:])
    plots.main([str(tmp_path / "run")])
    assert f'"{names[0]}"' in (tmp_path / "run" / "plots" / "index.html").read_text()
    simclr_jax.run(settings("transfer", tmp_path / "run"), tmp_path / "classifier")
    simclr_jax.run(settings("predict", tmp_path / "classifier"), tmp_path / "predicted")
    rows = (tmp_path / "predicted" / "predictions.csv").read_text("utf-8-sig").splitlines()
    assert len(rows) == 1 + 12 * 9 and rows[1].startswith('"a/0.tif#0,0",')
