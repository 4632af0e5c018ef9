"""Decodes image files to the pixels that photo programs show; contents tell the type of a file, not its name.

TensorFlow decodes plain JPEG and PNG files inside the graph, see `is_plain`. Pillow decodes all others: it
turns an image by its orientation tag, lays transparency on white, takes the first frame of an animation and
scales 16 bits by a range.
"""

import functools
import io
import struct
import threading
import types
import warnings
from contextlib import contextmanager

import numpy as np
import tensorflow as tf
from PIL import Image

# Image types: the suffix of a file, and the name of the Pillow plugin that opens such files. Another type is
# one more entry, as IMAGE_TYPES[".tif"] = "TIFF".
IMAGE_TYPES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
}
# Traits that change how an image is displayed, in the words of the notes on a folder.
TRAITS = ("rotated by their tag", "transparent, on white", "animations, first frame", "with 16 bits")
MAX_PIXELS = 178_956_970  # The limit of Pillow and TensorFlow: 2**29 bytes of pixels.
FULL_RANGE = (0, 65535)  # Values of 16 bits.

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Exif's orientation tag in either byte order, with another value than 1, and the tag of XMP. Literals are
# searched one after the other: a regular expression with alternatives takes ten times as long.
_EXIF_TAGS = (
    r"\x01\x12\x00[\x01\x03\x04\x09]\x00\x00\x00\x01\x00{0,3}[\x02-\x08]",
    r"\x12\x01[\x01\x03\x04\x09]\x00\x01\x00\x00\x00[\x02-\x08]",
)
_EXIF = r"Exif\x00\x00"
_XMP_TAG = "tiff:Orientation"
_NOT_PLAIN_PNG = ("tRNS", "eXIf", "Raw profile type", "XML:com.adobe.xmp")
_SEARCHED = 2**17  # Bytes searched at the begin of a JPEG file; half as many at both ends of a PNG file.


class TooLarge(ValueError):
    """An image that has more pixels than the limit, by its header."""


def decode(path: tf.Tensor, **options) -> tf.Tensor:
    """Decodes a file, path string [] -> uint8 [h, w, 3]; `options` are those of `decode_bytes`."""
    return decode_bytes(tf.io.read_file(path), **options)


def decode_bytes(
    contents: tf.Tensor, *, value_range: tuple[int, int] = FULL_RANGE, max_pixels: int = MAX_PIXELS
) -> tf.Tensor:
    """Decodes the contents of an image file, inside a graph or outside.

    Args:
      contents: string [].
      value_range: values that become black and white in an image of 16 bits.
      max_pixels: a larger image is refused by its header.

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.OpError: the file is no image, damaged or too large.
    """
    decode_any = _make_decode_any(value_range, max_pixels)
    # Nearly all files are JPEG without tags. They take one branch only, since a branch costs more than the
    # search for tags; TensorFlow itself refuses those of more than MAX_PIXELS.
    begin = tf.strings.substr(contents, 0, _SEARCHED)
    is_simple = _is_jpeg(contents) & ~_holds(begin, [_EXIF, _XMP_TAG])
    if max_pixels != MAX_PIXELS:
        is_simple = tf.constant(False)
    image = tf.cond(is_simple, lambda: decode_plain(contents), lambda: decode_any(contents))
    return tf.ensure_shape(image, [None, None, 3])


@functools.cache  # Without it, every image that is decoded outside a graph would trace the function again.
def _make_decode_any(value_range, max_pixels):
    @tf.autograph.experimental.do_not_convert
    def with_pillow(contents):
        contents = np.asarray(contents, object).item()  # Outside a graph, it is an array.
        return decode_with_pillow(contents, value_range=value_range, max_pixels=max_pixels)

    one_node = {"_noinline": True}  # A node costs nothing where its branch is not taken.

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], experimental_attributes=one_node)
    def decode_any(contents):
        return tf.cond(
            is_plain(contents, max_pixels),
            lambda: decode_plain(contents),
            lambda: tf.numpy_function(with_pillow, [contents], tf.uint8, stateful=False),
        )

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
    begin = tf.strings.substr(contents, 0, _SEARCHED)
    turned = tf.cond(_holds(begin, [_EXIF]), lambda: _holds(begin, _EXIF_TAGS), lambda: tf.constant(False))
    return (height * width <= limit) & ~turned & ~_holds(begin, [_XMP_TAG])


def _is_plain_png(contents, limit):
    header = tf.cast(tf.io.decode_raw(contents, tf.uint8, fixed_length=26), tf.int64)
    width, height = (tf.reduce_sum(header[at : at + 4] * [2**24, 2**16, 2**8, 1]) for at in (16, 20))
    bits, colour_type = header[24], header[25]
    is_opaque = tf.reduce_any(colour_type == [0, 2, 3])  # greys, colours, palette
    half = _SEARCHED // 2
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
def _ignore_pillow_warnings():
    """Ignores the warnings of Pillow in this thread, as of damaged tags; damage that matters is an error.

    `warnings.catch_warnings` would change, and restore, the filters of all threads of the program.
    """
    thread = threading.get_ident()
    in_thread = types.SimpleNamespace(
        match=lambda module: module.startswith("PIL") and threading.get_ident() == thread
    )
    filters, ignore = warnings.filters, ("ignore", None, Warning, in_thread, 0)
    filters.insert(0, ignore)
    try:
        yield
    finally:
        filters.remove(ignore)


@_ignore_pillow_warnings()
def decode_with_pillow(contents: bytes, *, value_range=FULL_RANGE, max_pixels=MAX_PIXELS) -> np.ndarray:
    """Decodes an image file by Pillow, in Python; returns uint8 [h, w, 3].

    Raises:
      ValueError: the file is of none of `IMAGE_TYPES`, damaged or too large.
    """
    try:
        image = _open(contents, max_pixels)
        orientation = _orientation(image)
        if _is_16_bits(contents):
            image = Image.fromarray(_scale(_pixels_16(contents), value_range))
        image.load()
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=image)
            image = white
        image = image.convert("RGB")
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
        return np.asarray(image)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises any exception on a damaged file, even StopIteration.
        raise ValueError(f"{type(error).__name__}: {error}") from None


@_ignore_pillow_warnings()
def display_traits(contents: bytes, max_pixels=MAX_PIXELS) -> tuple[tuple[bool, ...], int]:
    """Returns whether each of `TRAITS` holds for a file, and its highest value, or 0 without 16 bits."""
    image = _open(contents, max_pixels)
    is_16_bits = _is_16_bits(contents)
    is_rotated = _orientation(image) in _TURNS
    is_transparent = image.has_transparency_data or (is_16_bits and contents[25] in (4, 6))
    is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
    highest = int(_pixels_16(contents)[..., :3].max()) if is_16_bits else 0
    return (is_rotated, is_transparent, is_animated, is_16_bits), highest


def _open(contents, max_pixels):
    """Opens a file as `Image.open` does, without its limit of pixels, which is the whole program's."""
    if contents[8:16] == b"WEBPVP8X":  # Pillow allocates the canvas of an animation when it opens it.
        width, height = (int.from_bytes(contents[at : at + 3], "little") + 1 for at in (24, 27))
        _check_size(width, height, max_pixels)
        if max(width, height) > 16383:
            raise ValueError(f"{width} x {height} pixels, more than WebP has")
    plugins = tuple(dict.fromkeys(IMAGE_TYPES.values()))
    for plugin in plugins:
        if plugin not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[plugin]
        accepted = accept is None or accept(contents[:16])
        if accepted and not isinstance(accepted, str):  # A string names a library that Pillow lacks.
            try:
                image = factory(io.BytesIO(contents), "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # The plugin refuses the file.
                continue
            _check_size(*image.size, max_pixels)
            return image
    raise ValueError(f"no {', '.join(plugins)} file")


def _check_size(width, height, max_pixels):
    if width * height > max_pixels:
        raise TooLarge(f"{width} x {height} pixels")


def _orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # A tag that cannot be read turns nothing.
        return 1


def _is_16_bits(contents):
    return contents[:4] == b"\x89PNG" and contents[24] == 16


def _pixels_16(contents):
    """Decodes a PNG file of 16 bits to uint16 [h, w, 4]; Pillow would cut it to 8 bits."""
    return tf.io.decode_png(contents, channels=4, dtype=tf.uint16).numpy()


def _scale(pixels, value_range):
    """Scales uint16 [h, w, 4] to uint8 by equal steps of the range; of 0 to 65535, that is the upper byte."""
    low, high = value_range
    colours = (pixels[..., :3].astype(np.float32) - low) * np.float32(256 / (high - low + 1))
    return np.dstack([np.clip(colours, 0, 255).astype(np.uint8), (pixels[..., 3:] >> 8).astype(np.uint8)])
