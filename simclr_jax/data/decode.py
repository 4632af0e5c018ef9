"""Decodes image files to the pixels that photo programs show; contents tell the type of a file, not its name.

TensorFlow decodes plain JPEG and PNG files inside the graph, see `is_plain`. Pillow decodes other
photographs, and `data.readers` what has more bits or channels. An image is turned by its orientation tag,
transparency laid on white, the first frame of an animation taken, and what has more than 8 bits is scaled by
a range.
"""

import functools
import importlib.util
import io
import os
import re
import struct
import threading
import types
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from simclr_jax.data import tiles
from simclr_jax.data.readers import READERS, Raw, open_tiff, read_open_tiff
from simclr_jax.views.recipe import LUMA

# Types by the name of what reads such files, one of `readers.READERS` or a plugin of Pillow.
_SUFFIXES = {"JPEG": ".jpg .jpeg .jpe .jfif", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif"}
_SUFFIXES |= {"TIFF": ".tif .tiff", "JPEG2000": ".jp2 .j2k", "AVIF": ".avif", "PPM": ".pbm .pgm .ppm .pnm"}
_SUFFIXES |= {"NPY": ".npy", "DICOM": ".dcm"}
# The name by the suffix of a file. Another type is one more entry, as IMAGE_TYPES[".ico"] = "ICO".
IMAGE_TYPES = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# Traits that change how an image is displayed, in the words of the notes on a folder.
TRAITS = ("rotated by their tag", "transparent, on white", "animations, first frame")
MAX_PIXELS = 178_956_970  # The limit of Pillow and TensorFlow: 2**29 bytes of pixels.
# The values that become black and white where no range is given, by the type of the pixels.
FULL_RANGE = {np.dtype(np.uint8): (0, 255), np.dtype(np.uint16): (0, 65535), np.dtype(np.float32): (0, 1)}

# Exif's orientation tag in either byte order, with another value than 1, and the tag of XMP. Literals are
# searched one after the other: a regular expression with alternatives takes ten times as long.
_EXIF_TAGS = (
    r"\x01\x12\x00[\x01\x03\x04\x09]\x00\x00\x00\x01\x00{0,3}[\x02-\x08]",
    r"\x12\x01[\x01\x03\x04\x09]\x00\x01\x00\x00\x00[\x02-\x08]",
)
_EXIF = r"Exif\x00\x00"
_XMP_TAG = "tiff:Orientation"
_TURNED = [re.compile(pattern.encode(), re.DOTALL) for pattern in (*_EXIF_TAGS, _XMP_TAG)]
_NOT_PLAIN_PNG = ("tRNS", "eXIf", "Raw profile type", "XML:com.adobe.xmp")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # Modes of Pillow with more than 8 bits.
SEARCHED = 2**17  # Bytes searched at the begin of a JPEG file; half as many at both ends of a PNG file.


class TooLarge(ValueError):
    """An image that has more pixels than the limit, by its header."""


def decode(path: tf.Tensor, *, tile: int | None = None, **options) -> tf.Tensor:
    """Decodes a file, path string [] -> [h, w, c]; `options` are those of `decode_bytes`.

    With the side of tiles, `path` is the name of a tile, see `data.tiles`.
    """
    if not tile:
        return decode_bytes(tf.io.read_file(path), **options)

    def in_python(name):
        name = os.fsdecode(np.asarray(name, object).item())
        _, raw = read_file(name, options["max_pixels"], options["channels"], tile)
        return _finish(raw, options["value_range"], options["channels"], options["dtype"])

    image = tf.numpy_function(in_python, [path], options["dtype"], stateful=False)
    return tf.ensure_shape(image, [None, None, options["channels"]])


def decode_bytes(
    contents: tf.Tensor,
    *,
    value_range: tuple | None = None,
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
    dtype: str = "uint8",
) -> tf.Tensor:
    """Decodes the contents of an image file, inside a graph or outside.

    Args:
      contents: string [].
      value_range: values that become black and white in an image of more than 8 bits, each a number or one
        for each channel; None: those of `FULL_RANGE`.
      max_pixels: a larger image is refused by its header.
      channels: c. Greys are repeated for 3, colours become their luma for 1, and of more channels the first
        are taken.
      dtype: 'uint8', or 'float32', which keeps more than 8 bits.

    Returns:
      uint8, or float32 in [0, 1], [h, w, c].

    Raises:
      tf.errors.OpError: the file is no image, damaged, too large or has too few channels.
    """
    bounds = value_range and tuple(tuple(np.ravel(bound).tolist()) for bound in value_range)
    decode_any = _make_decode_any(bounds, max_pixels, channels, dtype)
    if (channels, dtype, max_pixels) != (3, "uint8", MAX_PIXELS):
        return tf.ensure_shape(decode_any(contents), [None, None, channels])
    # Nearly all files are JPEG without tags. They take one branch only, since a branch costs more than the
    # search for tags; TensorFlow itself refuses those of more than MAX_PIXELS.
    begin = tf.strings.substr(contents, 0, SEARCHED)
    is_simple = _is_jpeg(contents) & ~_holds(begin, [_EXIF, _XMP_TAG])
    image = tf.cond(is_simple, lambda: decode_plain(contents), lambda: decode_any(contents))
    return tf.ensure_shape(image, [None, None, 3])


@functools.cache  # Without it, every image that is decoded outside a graph would trace the function again.
def _make_decode_any(value_range, max_pixels, channels, dtype):
    @tf.autograph.experimental.do_not_convert
    def in_python(contents):
        contents = np.asarray(contents, object).item()  # Outside a graph, it is an array.
        options = {"value_range": value_range, "max_pixels": max_pixels, "channels": channels}
        return decode_in_python(contents, dtype=dtype, **options)

    one_node = {"_noinline": True}  # A node costs nothing where its branch is not taken.

    @tf.function(
        input_signature=[tf.TensorSpec([], tf.string)], autograph=False, experimental_attributes=one_node
    )
    def decode_any(contents):
        def others():
            return tf.numpy_function(in_python, [contents], dtype, stateful=False)

        if (channels, dtype) != (3, "uint8"):
            return others()
        return tf.cond(is_plain(contents, max_pixels), lambda: decode_plain(contents), others)

    return decode_any


def decode_plain(contents: tf.Tensor) -> tf.Tensor:
    """Decodes plain contents, string [] -> uint8 [h, w, 3], by TensorFlow."""
    return tf.io.decode_image(contents, channels=3, expand_animations=False)


def is_plain(contents: tf.Tensor, max_pixels: int = MAX_PIXELS) -> tf.Tensor:
    """Returns whether TensorFlow decodes a file as photo programs show it, bool [].

    It does so for JPEG files that no tag turns, and for opaque PNG files of up to 8 bits without tags, of at
    most `max_pixels` pixels.
    """
    limit = min(max_pixels, MAX_PIXELS)
    is_png = tf.strings.substr(contents, 0, 8) == b"\x89PNG\r\n\x1a\n"
    return tf.case(
        [
            (_is_jpeg(contents), lambda: _is_plain_jpeg(contents, limit)),
            (is_png, lambda: _is_plain_png(contents, limit)),
        ],
        default=lambda: tf.constant(False),
    )


def _is_jpeg(contents):
    return tf.strings.substr(contents, 0, 3) == b"\xff\xd8\xff"


def _is_plain_jpeg(contents, limit):
    height, width = tf.unstack(tf.cast(tf.image.extract_jpeg_shape(contents)[:2], tf.int64))
    begin = tf.strings.substr(contents, 0, SEARCHED)
    turned = tf.cond(_holds(begin, [_EXIF]), lambda: _holds(begin, _EXIF_TAGS), lambda: tf.constant(False))
    return (height * width <= limit) & ~turned & ~_holds(begin, [_XMP_TAG])


def _is_plain_png(contents, limit):
    header = tf.cast(tf.io.decode_raw(contents, tf.uint8, fixed_length=26), tf.int64)
    width, height = (tf.reduce_sum(header[at : at + 4] * [2**24, 2**16, 2**8, 1]) for at in (16, 20))
    bits, colour_type = header[24], header[25]
    is_opaque = tf.reduce_any(colour_type == [0, 2, 3])  # greys, colours, palette
    half = SEARCHED // 2
    begin = tf.strings.substr(contents, 0, half)
    end = tf.strings.substr(contents, tf.maximum(tf.strings.length(contents) - half, 0), half)
    is_tagged = _holds(begin, _NOT_PLAIN_PNG) | _holds(end, _NOT_PLAIN_PNG[1:])
    return (bits <= 8) & is_opaque & (width * height <= limit) & ~is_tagged


def _holds(text, patterns):
    """Returns whether one of the patterns is in a string []."""
    remaining = text
    for pattern in patterns:  # All but the first work in place, without a copy.
        remaining = tf.strings.regex_replace(remaining, pattern, "", replace_global=False)
    return tf.strings.length(remaining) != tf.strings.length(text)


@contextmanager
def _codec_errors():
    """Ignores the warnings of codecs in this thread, as of damaged tags; damage that matters is a ValueError.

    `warnings.catch_warnings` would change, and restore, the filters of all threads of the program.
    """
    thread = threading.get_ident()
    in_thread = types.SimpleNamespace(
        match=lambda module: (
            module.startswith(("PIL", "pydicom", "tifffile")) and threading.get_ident() == thread
        )
    )
    filters, ignore = warnings.filters, ("ignore", None, Warning, in_thread, 0)
    filters.insert(0, ignore)
    try:
        yield
    except (ValueError, tf.errors.NotFoundError):
        raise
    except Exception as error:  # Codecs raise any exception on a damaged file, even StopIteration.
        raise ValueError(f"{type(error).__name__}: {error}") from None
    finally:
        filters.remove(ignore)


class Facts(NamedTuple):
    """The facts of a file that are told at the start: its type, c, the type of its pixels, and each trait."""

    kind: str
    channels: int
    dtype: str
    traits: tuple[bool, bool, bool]

    @property
    def is_deep(self) -> bool:
        """Whether it has more than 8 bits."""
        return self.dtype != "uint8"

    def __str__(self):
        bits = {"uint8": "8 bits", "uint16": "16 bits", "float32": "floats"}[self.dtype]
        return f"{self.kind}, {bits}, {self.channels} channel{'s' if self.channels > 1 else ''}"


PLAIN = Facts("JPEG", 3, "uint8", (False, False, False))


def inspect(contents: bytes, max_pixels: int = MAX_PIXELS, channels: int | None = None) -> Facts:
    """Returns the facts of a file, which is decoded; see `read`."""
    kind, raw = read(contents, max_pixels, channels)
    return _facts(kind, raw, channels)


def _facts(kind, raw, channels):
    with_channels(raw.pixels, channels or raw.pixels.shape[-1])  # It raises an error where they are too few.
    traits = raw.orientation in range(2, 9), raw.is_transparent, raw.is_animated
    return Facts(kind, raw.pixels.shape[-1], raw.pixels.dtype.name, traits)


def inspect_ends(begin: bytes, end: bytes, max_pixels: int) -> Facts | None:
    """Returns the facts of a JPEG or PNG file by both its ends; None where it may not be whole."""
    is_jpeg = begin[:3] == b"\xff\xd8\xff" and end[-2:] == b"\xff\xd9"
    if not is_jpeg and not (begin[:4] == b"\x89PNG" and end[-8:] == b"IEND\xaeB`\x82"):
        return None
    if is_jpeg and (size := _jpeg_size(begin)) and not any(tag.search(begin, 0, size[2]) for tag in _TURNED):
        _check_size(max_pixels, *size[:2])
        return PLAIN
    try:
        with _codec_errors():
            image = _open(begin, max_pixels)
    except TooLarge:
        raise
    except Exception:  # The header is longer.
        return None
    dtype = "uint16" if _is_16_bits(begin) else "uint8"
    is_transparent = image.has_transparency_data or (dtype == "uint16" and begin[25] in (4, 6))
    is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
    traits = _orientation(image) in range(2, 9), is_transparent, is_animated
    return Facts(image.format, 1 if image.mode in ("1", "L", *_DEEP) else 3, dtype, traits)


def _jpeg_size(begin):
    """Returns width, height and their place in the header of a JPEG file; None if it is longer."""
    place = 2
    while place + 9 <= len(begin) and begin[place] == 0xFF:
        if 0xC0 <= begin[place + 1] <= 0xCF and begin[place + 1] not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", begin[place + 5 : place + 9])
            return width, height, place
        place += 2 + int.from_bytes(begin[place + 2 : place + 4], "big")
    return None


def decode_in_python(
    contents: bytes, *, value_range=None, max_pixels=MAX_PIXELS, channels=3, dtype="uint8"
) -> np.ndarray:
    """Decodes an image file without a graph; the arguments are those of `decode_bytes`.

    Raises:
      ValueError: the file is of none of `IMAGE_TYPES`, damaged, too large or has too few channels.
    """
    _, raw = read(contents, max_pixels, channels)
    return _finish(raw, value_range, channels, dtype)


def _finish(raw, value_range, channels, dtype):
    pixels = with_channels(raw.pixels, channels)
    if pixels.dtype != dtype or raw.alpha is not None:
        white = 255 if dtype == "uint8" else 1
        pixels = to_unit(pixels, value_range, levels=256 if dtype == "uint8" else None)
        if raw.alpha is not None:
            pixels = pixels * raw.alpha + white * (1 - raw.alpha)
        pixels = pixels.round().astype(np.uint8) if dtype == "uint8" else pixels
    return turn(pixels, raw.orientation)


def to_unit(pixels: np.ndarray, value_range: tuple | None, levels: int | None = None) -> np.ndarray:
    """Scales pixels [h, w, c] to [0, 1] by a range, or to levels: of 0 to 65535 to the upper byte."""
    bounds = FULL_RANGE[pixels.dtype] if pixels.dtype == np.uint8 or value_range is None else value_range
    low, high = (np.asarray(bound, np.float64) for bound in bounds)
    scaled = pixels.astype(np.float32)  # All that follows is in place, since memory takes most of the time.
    scaled -= np.float32(low)
    if levels and pixels.dtype != np.float32:
        return np.clip(scaled * np.float32(levels / (high - low + 1)), 0, levels - 1).astype(np.uint8)
    scaled /= np.float32(high - low)
    np.clip(scaled, 0, 1, out=scaled)
    return scaled * (levels - 1) if levels else scaled


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Returns pixels [h, w, c] with so many channels; see `decode_bytes`."""
    count = pixels.shape[-1]
    if count == channels:
        return pixels
    if count == 1 and channels == 3:
        return np.repeat(pixels, 3, -1)
    if count == 3 and channels == 1:
        return (pixels @ np.float32(LUMA))[..., None].round().astype(pixels.dtype)
    if count < channels:
        raise ValueError(f"{count} channels, not {channels}")
    return pixels[..., :channels]


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels as the orientation tag says; other values than 2 to 8 turn nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows, columns = (
        slice(None, None, -1 if orientation in turned else 1) for turned in ((3, 4, 7, 8), (2, 3, 6, 7))
    )
    return pixels[rows, columns]


@_codec_errors()
def read(contents: bytes, max_pixels: int = MAX_PIXELS, channels: int | None = None) -> tuple[str, Raw]:
    """Reads an image file in the values that it stores; returns the name of its type, too.

    Args:
      contents: those of the file.
      max_pixels: a larger image is refused by its header.
      channels: those that are wanted; None: those that the file has.

    Raises:
      ValueError: see `decode_in_python`.
    """
    reader = next((name for name, (accepts, _) in READERS.items() if accepts(contents)), None)
    if image := _open_photograph(contents, max_pixels, channels) if reader in (None, "TIFF") else None:
        try:
            return _read_with_pillow(image, contents)
        except Exception:  # Pillow lacks some codecs of TIFF.
            if not reader or not importlib.util.find_spec("tifffile"):
                raise
    return reader, READERS[reader][1](contents, functools.partial(_check_size, max_pixels), channels)


def read_file(path: str, max_pixels: int, channels: int | None, tile: int | None) -> tuple[str, Raw]:
    """Reads a file as `read` does, or with the side of tiles one tile, whose name `path` is then."""
    if not tile:
        return read(tf.io.read_file(os.fsencode(path)).numpy(), max_pixels, channels)
    with _opened(tiles.file_of(path), max_pixels, channels) as (kind, size, orientation, crop, _):
        region = tiles.stored_region((*tiles.place_of(path), tile, tile), size, orientation)
        return kind, crop(region)._replace(orientation=orientation)


def survey(path: str, tile: int, overlap: int, max_pixels: int, channels: int | None) -> tuple[Facts, dict]:
    """Cuts a file into tiles, and reads it once, a row of tiles at a time, or a smaller copy of it.

    Returns:
      Its facts; and {(x, y): the standard deviation of each channel} of every tile.
    """
    deviations, reduction = {}, max(1, tile // tiles.SIDE)
    with _opened(path, max_pixels, channels, reduction) as (kind, size, orientation, crop, small):
        width, height = tiles.displayed_size(size, orientation)
        for y in tiles.starts(height, tile, overlap):
            region = tiles.stored_region((0, y, width, tile), size, orientation)
            raw = crop([at * here // there for at, here, there in zip(region, 2 * small, 2 * size)])
            facts = _facts(kind, raw._replace(orientation=orientation), channels)
            row = turn(raw.pixels, orientation)[..., :channels]
            step = max(1, reduction * row.shape[1] // width)
            for x in tiles.starts(width, tile, overlap):
                first, last = (at * row.shape[1] // width for at in (x, x + tile))
                pixels = row[::step, first : max(last, first + 1) : step]
                deviations[x, y] = pixels.std(axis=(0, 1), dtype=np.float32)
    return facts, deviations


@contextmanager
def _opened(path, max_pixels, channels, reduction=1):
    """Opens a file to read regions of it, or of a copy that is at most `reduction` times smaller.

    Yields its type, its width and height, its orientation, a function from a region (x, y, w, h) of the file,
    or of the copy, to a `Raw`, and width and height of the copy.
    """
    with _codec_errors(), tf.io.gfile.GFile(path, "rb") as stream:
        if READERS["TIFF"][0](stream.read(4)):
            with open_tiff(stream if "://" in path else path) as file:
                page = file.pages.first
                colours = (0, 1, 2, 3, 5, 6 if page.compression == 7 else 0)
                # Pillow decodes others, all of the image.
                if page.photometric in colours and not 1 < page.bitspersample < 8:
                    levels = [level.keyframe for level in file.series[0].levels] if reduction > 1 else [page]
                    level = sum(part.imagewidth * reduction >= page.imagewidth for part in levels) - 1
                    sizes = [(part.imagewidth, part.imagelength) for part in (page, levels[level])]
                    check_size = functools.partial(_check_size, max_pixels)
                    crop = functools.partial(_crop_tiff, file, check_size, channels, level)
                    yield "TIFF", sizes[0], page.tags.valueof(274, 1), crop, sizes[1]
                    return
        stream.seek(0)
        contents = stream.read()
        if contents[:3] == b"\xff\xd8\xff":
            image = _open(contents, max_pixels)
            size, crop = image.size, functools.partial(_crop_jpeg, contents, image.size[0])
            if reduction > 1:
                image.draft(None, [side // reduction for side in size])
                crop = functools.partial(_crop, Raw(np.asarray(image.convert("RGB"))))
            yield "JPEG", size, _orientation(image), crop, image.size
        else:
            kind, raw = read(contents, max_pixels, channels)
            size = raw.pixels.shape[1::-1]
            yield kind, size, raw.orientation, functools.partial(_crop, raw), size


def _crop_tiff(file, check_size, channels, level, region):
    crop = functools.partial(tiles.crop_tiff, region=region, check_size=check_size)
    return read_open_tiff(file, lambda *_: None, channels, crop, level)


def _crop_jpeg(contents, full_width, region):
    x, y, width, height = region
    first, last = max(0, x - 16), min(full_width, x + width + 16)  # Colours are smoothed over two blocks.
    pixels = tf.io.decode_and_crop_jpeg(contents, [y, first, height, last - first], channels=3).numpy()
    return Raw(pixels[:, x - first :][:, :width])


def _crop(raw, region):
    x, y, width, height = region
    place = slice(y, y + height), slice(x, x + width)
    return raw._replace(pixels=raw.pixels[place], alpha=None if raw.alpha is None else raw.alpha[place])


def _open_photograph(contents, max_pixels, channels):
    """Opens a file by Pillow; returns None for TIFF of which Pillow reads a part, as 8 of 16 bits."""
    if contents[:2] not in (b"II", b"MM"):
        return _open(contents, max_pixels)
    try:
        image = _open(contents, max_pixels)
    except TooLarge:
        raise
    except Exception:  # Pillow knows fewer kinds than tifffile.
        return None
    is_whole = max(image.tag_v2.get(258, (1,))) <= 8 and image.mode not in _DEEP
    return image if is_whole and (channels or 0) <= 3 else None


def _read_with_pillow(image, contents):
    if image.format == "TIFF":
        image.load()  # It is turned by its tag then.
    orientation, alpha = _orientation(image), None
    is_animated = getattr(image, "is_animated", False) and image.format not in ("MPO", "TIFF")
    if _is_16_bits(contents):
        # Pillow would cut it to 8 bits.
        pixels = tf.io.decode_png(contents, channels=4, dtype=tf.uint16).numpy()
        alpha = pixels[..., 3:] / np.float32(65535)
        alpha = alpha if (alpha < 1).any() else None
        pixels = pixels[..., : 1 if contents[25] in (0, 4) else 3]
    elif image.mode in _DEEP:
        pixels = np.asarray(image)[..., None]
        is_16_bits = pixels.dtype.kind in "iu" and 0 <= pixels.min() <= pixels.max() < 2**16
        pixels = pixels.astype(np.uint16 if is_16_bits else np.float32)
    elif image.mode in ("1", "L") and not image.has_transparency_data:
        pixels = np.asarray(image.convert("L"))[..., None]
    else:
        image.load()
        if is_transparent := image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=image)
            image = white
        pixels = np.asarray(image.convert("RGB"))
        return image.format, Raw(pixels, None, orientation, is_transparent, is_animated)
    return image.format, Raw(pixels, alpha, orientation, alpha is not None, is_animated)


def _open(contents, max_pixels):
    """Opens a file as `Image.open` does, without its limit of pixels, which is the whole program's."""
    if contents[8:16] == b"WEBPVP8X":  # Pillow allocates the canvas of an animation when it opens it.
        width, height = (int.from_bytes(contents[at : at + 3], "little") + 1 for at in (24, 27))
        _check_size(max_pixels, width, height)
        if max(width, height) > 16383:
            raise ValueError(f"{width} x {height} pixels, more than WebP has")
    names = tuple(dict.fromkeys(IMAGE_TYPES.values()))
    for plugin in names:
        if plugin not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN.get(plugin, (None, None))
        accepted = factory and (accept is None or accept(contents[:16]))
        if accepted and not isinstance(accepted, str):  # A string names a library that Pillow lacks.
            try:
                image = factory(io.BytesIO(contents), "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # The plugin refuses the file.
                continue
            _check_size(max_pixels, *image.size)
            return image
    raise ValueError(f"no {', '.join(names)} file")


def _check_size(max_pixels, width, height, channels=1):
    if width * height * max(channels, 4) > 4 * max_pixels:
        raise TooLarge(f"{width} x {height} pixels")


def _orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # A tag that cannot be read turns nothing.
        return 1


def _is_16_bits(contents):
    return contents[:4] == b"\x89PNG" and contents[24] == 16
