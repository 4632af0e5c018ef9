"""Pixels are what a photo program shows of a file, whatever its type, tags and name; damage is an error."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import warnings
from contextlib import suppress

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFile
from test_datasets import config

from simclr_jax.data import datasets, decode, pipeline
from simclr_jax.data.folder import IMAGE_TYPES, catalogue
from simclr_jax.data.folder import decode as decode_path
from simclr_jax.data.sources import folder
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow

H, W = 40, 56
PICTURE = np.kron(np.random.default_rng(0).integers(0, 256, (5, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)
IMAGE = Image.fromarray(PICTURE)
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def file(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation, order="<"):
    tags = Image.Exif()
    tags.endian = order
    tags[0x010F], tags[0x0112] = "camera", orientation
    return tags


def pixels(contents, **options):
    """As in a pipeline: inside a graph."""
    dataset = tf.data.Dataset.from_tensors(contents).map(lambda one: decode.decode_bytes(one, **options))
    (image,) = dataset.as_numpy_iterator()
    return image


def assert_alike(image, expected, limit=4):
    assert image.shape == expected.shape and image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).mean() < limit


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    "kind, options", [("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_turned_by_its_tag(kind, options, orientation, order):
    stored = IMAGE.transpose(STORED[orientation])
    assert_alike(pixels(file(stored, kind, exif=exif(orientation, order), **options)), PICTURE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_tag_of_1_leaves_it_to_tensorflow(kind):
    assert bool(decode.is_plain(file(IMAGE, kind))) and bool(
        decode.is_plain(file(IMAGE, "JPEG", exif=exif(1)))
    )
    assert not decode.is_plain(file(IMAGE, kind, exif=exif(6)))


def test_a_tag_behind_other_segments_and_in_xmp():
    turned = IMAGE.transpose(STORED[6])
    profile = b"profile " * 9000
    plain, tagged = (
        file(turned, "JPEG", quality=95, subsampling=0, icc_profile=profile),
        file(turned, "JPEG", exif=exif(6)),
    )
    start = tagged.index(b"\xff\xe1")
    length = int.from_bytes(tagged[start + 2 : start + 4], "big") + 2
    place = plain.index(b"\xff\xdb")
    assert place > 70_000
    assert_alike(pixels(plain[:place] + tagged[start : start + length] + plain[place:]), PICTURE)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert_alike(pixels(file(turned, "JPEG", quality=95, subsampling=0, xmp=xmp)), PICTURE)


def test_a_tag_at_the_end_of_a_large_png_file():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    contents = file(Image.fromarray(noise).transpose(STORED[6]), "PNG", exif=exif(6))
    place = contents.index(b"eXIf") - 4
    chunk = contents[place : place + 12 + int.from_bytes(contents[place : place + 4], "big")]
    moved = contents.replace(chunk, b"")
    moved = moved[:-12] + chunk + moved[-12:]
    assert len(moved) > decode.SEARCHED and moved.index(b"eXIf") > decode.SEARCHED
    np.testing.assert_array_equal(pixels(moved), noise)


def test_a_jpeg_file_that_is_cut_off_is_damaged():
    contents = file(IMAGE.resize((400, 300)), "JPEG")
    for length in (len(contents) // 2, 1, 0):
        with pytest.raises(tf.errors.OpError):
            pixels(contents[:length])


def hidden(inside):
    """The picture, and noise where it is transparent."""
    noise = np.random.default_rng(1).integers(0, 256, (H, W, 3), np.uint8)
    return np.where(inside[..., None], PICTURE, noise), np.where(inside[..., None], PICTURE, 255)


INSIDE = np.zeros((H, W), bool)
INSIDE[8:30, 10:40] = True


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_transparency_is_white(kind, options):
    stored, shown = hidden(INSIDE)
    contents = file(Image.fromarray(np.dstack([stored, 255 * INSIDE]).astype(np.uint8)), kind, **options)
    np.testing.assert_array_equal(pixels(contents), shown)


def test_transparent_greys_colours_and_palettes():
    grey = np.asarray(IMAGE.convert("L"))
    contents = file(Image.fromarray(np.dstack([grey, 255 * INSIDE]).astype(np.uint8), "LA"), "PNG")
    np.testing.assert_array_equal(pixels(contents)[..., 1], np.where(INSIDE, grey, 255))
    key = np.where(INSIDE[..., None], np.minimum(PICTURE, 254), (255, 0, 255)).astype(np.uint8)
    contents = file(Image.fromarray(key), "PNG", transparency=(255, 0, 255))
    np.testing.assert_array_equal(pixels(contents), np.where(INSIDE[..., None], key, 255))
    for kind in ("PNG", "GIF"):
        indexed = IMAGE.quantize(16)
        chosen = int(np.asarray(indexed)[0, 0])
        expected = np.asarray(indexed.convert("RGB")).copy()
        expected[np.asarray(indexed) == chosen] = 255
        np.testing.assert_array_equal(pixels(file(indexed, kind, transparency=chosen)), expected)


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_first_frame_of_an_animation(kind, options):
    frames = [IMAGE, IMAGE.transpose(STORED[3])]
    contents = file(frames[0], kind, save_all=True, append_images=frames[1:], duration=90, **options)
    assert_alike(pixels(contents), PICTURE, 8)


def test_a_frame_smaller_than_its_canvas():
    contents = bytearray(file(IMAGE.quantize(16), "GIF"))
    contents[6:10] = (W + 10).to_bytes(2, "little") + (H + 6).to_bytes(2, "little")
    assert pixels(bytes(contents)).shape == (H + 6, W + 10, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("high", [1023, 4095, 65535])
def test_16_bits_are_scaled_by_the_range(channels, high):
    values = np.random.default_rng(0).integers(0, high + 1, (H, W, channels)).astype(np.uint16)
    values[..., 3:] = 65535
    contents = tf.io.encode_png(values).numpy()
    expected = (values[..., :3].astype(np.int64) * 256 // (high + 1)).astype(np.uint8)
    np.testing.assert_array_equal(
        pixels(contents, value_range=(0, high)), np.broadcast_to(expected, (H, W, 3))
    )


def test_contents_decide_and_not_the_extension(tmp_path):
    (tmp_path / "a.jpg").write_bytes(file(IMAGE, "PNG"))
    np.testing.assert_array_equal(decode_path(str(tmp_path / "a.jpg")), PICTURE)


def test_bitmaps_of_other_kinds():
    for image in (IMAGE.quantize(16), IMAGE.convert("1"), IMAGE.convert("RGBA"), IMAGE.convert("L"), IMAGE):
        np.testing.assert_array_equal(pixels(file(image, "BMP")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_more_pixels_than_the_limit_are_refused_by_the_header(kind):
    contents = file(IMAGE, kind)
    assert pixels(contents, max_pixels=H * W).shape == (H, W, 3)
    with pytest.raises(tf.errors.OpError, match=f"{W} x {H} pixels"):
        pixels(contents, max_pixels=H * W - 1)


def test_bombs_are_not_opened():
    tall = bytearray(file(IMAGE, "GIF"))
    tall[6:10] = b"\xff\xff\xff\xff"
    canvas = bytearray(file(IMAGE, "WEBP", save_all=True, append_images=[IMAGE.rotate(5)]))
    canvas[24:30] = b"\xff\xff\x00" * 2
    for contents in (tall, canvas):
        with pytest.raises(decode.TooLarge, match="65535 x 65535|65536 x 65536"):
            decode.decode_in_python(bytes(contents))


def mutants(count):
    """Files of five types with bytes changed, cut off, doubled or moved; the same ones every time."""
    rng = np.random.default_rng(0)
    stored, _ = hidden(INSIDE)
    rgba = Image.fromarray(np.dstack([stored, 255 * INSIDE]).astype(np.uint8))
    files = [file(IMAGE, "JPEG", **options) for options in ({}, {"exif": exif(6)}, {"progressive": True})]
    files += [file(IMAGE, "PNG"), file(rgba, "PNG"), tf.io.encode_png(np.uint16(PICTURE) * 16).numpy()]
    files += [file(IMAGE, "WEBP")]
    files += [file(rgba, "WEBP", save_all=True, append_images=[IMAGE], lossless=True), file(IMAGE, "BMP")]
    files += [
        file(IMAGE.quantize(16), "BMP"),
        file(IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(9)]),
    ]
    for number in range(count):
        contents = bytearray(files[number % len(files)])
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(contents) if rng.random() < 0.5 else min(64, len(contents))))
            contents[place] = int(rng.choice([0, 1, 127, 128, 255, rng.integers(256)]))
        if rng.random() < 0.2:
            del contents[int(rng.integers(1, len(contents))) :]
        if rng.random() < 0.1:
            contents += contents[int(rng.integers(len(contents))) :]
        yield bytes(contents)


def decode_mutants(count):
    """Prints what became of them, the longest time and the most memory."""
    import re
    import time
    from pathlib import Path

    decode_one = tf.function(decode.decode_bytes, input_signature=[tf.TensorSpec([], tf.string)])
    counts, longest = {"decoded": 0, "refused": 0}, 0.0
    for contents in mutants(count):
        begun = time.monotonic()
        try:
            image = decode_one(contents)
            assert image.shape[-1] == 3
            counts["decoded"] += 1
        except tf.errors.OpError:
            counts["refused"] += 1
        longest = max(longest, time.monotonic() - begun)
    # getrusage would tell the peak of the process that started this one, if that was larger.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)
    print(json.dumps(counts | {"seconds": longest, "bytes": int(peak) * 1024}))


@pytest.mark.timeout(120)
def test_no_damage_crashes_hangs_or_takes_memory():
    here = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-c", "import test_decode; test_decode.decode_mutants(2000)"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["decoded"] > 200 and outcome["refused"] > 200
    assert outcome["seconds"] < 5 and outcome["bytes"] < 2 * 2**30


def test_the_catalogue_keeps_the_chatter_of_codecs_from_the_console(tmp_path, capfd):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    contents = file.getvalue()
    (tmp_path / "good.jpg").write_bytes(contents)
    (tmp_path / "cut.jpg").write_bytes(contents[: len(contents) // 2])
    with suppress(tf.errors.OpError):
        decode.decode(str(tmp_path / "cut.jpg"))
    assert "JPEG" in capfd.readouterr().err  # the chatter that has to be kept out
    folder.catalogue(tmp_path, seed=0)
    printed = capfd.readouterr()
    assert printed.err == "" and "skipped 1 corrupt: cut.jpg" in printed.out


class Toy(ImageFile.ImageFile):
    """A format of nobody's: a magic of three bytes, the sides, and grey pixels."""

    format = "TOY"

    def _open(self):
        magic, width, height = struct.unpack("3sBB", self.fp.read(5))
        if magic != b"TOY":
            raise SyntaxError("no TOY file")
        self._size, self._mode = (width, height), "L"
        self.tile = [ImageFile._Tile("raw", (0, 0, width, height), 5, ("L", 0, 1))]


def write_toy(path, number):
    path.write_bytes(b"TOY" + bytes([6, 4]) + bytes([number]) * 24)


def test_another_image_type_is_one_entry(tmp_path, monkeypatch):
    suffix, plugin = ".toy", "TOY"
    monkeypatch.setitem(Image.OPEN, "TOY", (Toy, lambda prefix: prefix.startswith(b"TOY")))
    for number in range(8):
        write_toy(tmp_path / f"{number}{suffix}", number)
    with pytest.raises(UserError, match=f"only 8 {suffix}"):
        folder.catalogue(tmp_path, seed=0)
    monkeypatch.setitem(IMAGE_TYPES, suffix, plugin)
    (tmp_path / f"cut{suffix}").write_bytes((tmp_path / f"0{suffix}").read_bytes()[:-9])
    IMAGE.save(tmp_path / "other.png")
    listed = catalogue(tmp_path, seed=0)
    names = [f"{number}{suffix}" for number in range(8)] + ["other.png"]
    assert sorted(name for name, _ in listed["train"] + listed["eval"]) == names
    source = datasets.load(config("folder", path=str(tmp_path)), "all", seed=0)

    def view(image, seed):
        return {"image": tf.ensure_shape(image[:4, :6], (4, 6, 3))}

    (batch,) = pipeline.eval_batches(source, image_size=4, batch_size=9, transform=view)
    for number in range(8):
        np.testing.assert_array_equal(batch["image"][number], np.full((4, 6, 3), number))
    with pytest.raises(tf.errors.OpError, match=f"no JPEG, PNG, .*, {plugin} file"):
        pixels(b"what nobody knows")
    contents = (tmp_path / f"1{suffix}").read_bytes()
    with pytest.raises(tf.errors.OpError, match="6 x 4 pixels"):
        pixels(contents, max_pixels=23)


def damaged_tag():
    """A PNG file whose tags Pillow warns of."""
    tags = exif(6).tobytes()
    contents = file(IMAGE.transpose(STORED[6]), "PNG", exif=tags[:-9] + b"\xff" * 2)
    with pytest.warns(UserWarning):
        Image.open(io.BytesIO(contents)).getexif()
    return contents


def test_warnings_of_pillow_stay_away_from_our_threads_alone():
    contents, before = damaged_tag(), list(warnings.filters)
    image = Image.open(io.BytesIO(contents))
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with decode._codec_errors():
            thread = threading.Thread(target=image.getexif)
            thread.start()
            thread.join()
            assert len(others) == 1
            Image.open(io.BytesIO(contents)).getexif()
            assert len(others) == 1
            warnings.warn("not Pillow's", stacklevel=1)
        assert len(others) == 2
    assert warnings.filters == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert decode.decode_in_python(contents).shape[-1] == 3


def test_pillow_keeps_the_limit_and_the_warnings_of_the_program():
    script = """if True:
        import io, sys, warnings
        import tensorflow as tf
        from PIL import Image
        Image.MAX_IMAGE_PIXELS = 100
        before = list(warnings.filters)
        from simclr_jax.data import augment, datasets, decode, folder, labels, pipeline, source
        from concurrent.futures import ThreadPoolExecutor
        files = []
        for kind in ("PNG", "BMP", "GIF", "JPEG"):
            file = io.BytesIO()
            Image.new("RGB", (30, 20), "red").save(file, kind)
            files.append(file.getvalue())
        with ThreadPoolExecutor(4) as pool:
            shapes = list(pool.map(lambda one: decode.decode_in_python(one).shape, files * 50))
        assert set(shapes) == {(20, 30, 3)}
        assert all(decode.decode_bytes(one).shape == (20, 30, 3) for one in files)
        assert Image.MAX_IMAGE_PIXELS == 100
        added = [entry for entry in warnings.filters if entry not in before]
        print(added)
    """
    here = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-W", "error:::PIL", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": here},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"


def test_images_outside_a_graph_are_traced_once():
    options = {"max_pixels": 12_345}
    for size in (3, 5, 7):
        contents = io.BytesIO()
        Image.new("RGB", (size, size)).save(contents, "PNG")
        assert decode.decode_bytes(contents.getvalue(), **options).shape == (size, size, 3)
    traced = decode._make_decode_any(None, options["max_pixels"], 3, "uint8")
    assert traced.experimental_get_tracing_count() == 1
