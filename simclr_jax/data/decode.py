"""Image files -> pixels as photo programs show them: JPEG, PNG, WebP, BMP and GIF, told by their contents.

TensorFlow decodes what it decodes rightly, which `is_plain` tells inside the graph. Pillow decodes the rest:
turned by its orientation tag, transparency laid on white, the first frame of an animation on its canvas, 16
bits scaled by a range. Other types (TIFF, DICOM, ...) would be one more branch of `decode_with_pillow`.
"""

import functools
import io
import warnings

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # Pillow's limit too, and TensorFlow's: its pixels are 2**29 bytes
FULL_RANGE = (0, 65535)  # of 16 bits

Image.MAX_IMAGE_PIXELS = None  # the limit is our own: a config key raises it
# A damaged palette or tag is no reason to talk in the middle of an epoch: what matters is raised.
warnings.filterwarnings("ignore", module="PIL")

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# An orientation tag in either byte order, whose value is not 1, and the one of XMP. They are searched as
# literals, which is what makes it cheap: a regular expression with alternatives takes ten times as long.
_EXIF_TAGS = (
    r"\x01\x12\x00[\x01\x03\x04\x09]\x00\x00\x00\x01\x00{0,3}[\x02-\x08]",
    r"\x12\x01[\x01\x03\x04\x09]\x00\x01\x00\x00\x00[\x02-\x08]",
)
_EXIF = r"Exif\x00\x00"
_XMP_TAG = "tiff:Orientation"
_NOT_PLAIN_PNG = ("tRNS", "eXIf", "Raw profile type", "XML:com.adobe.xmp")
_SEARCHED = 2**17  # bytes of a JPEG file's begin; half of them of a PNG file's begin and of its end


def decode(path: tf.Tensor, **options) -> tf.Tensor:
    """Path of an image file, string [] -> uint8 [h, w, 3]; `options` are those of `decode_bytes`."""
    return decode_bytes(tf.io.read_file(path), **options)


def decode_bytes(
    contents: tf.Tensor, *, value_range: tuple[int, int] = FULL_RANGE, max_pixels: int = MAX_PIXELS
) -> tf.Tensor:
    """Contents of an image file -> its pixels, inside a graph or outside.

    Args:
        contents: string [].
        value_range: what becomes black and white, of images of 16 bits.
        max_pixels: of larger images nothing but the header is read.

    Returns:
        uint8 [h, w, 3].

    Raises:
        tf.errors.OpError: no image, damaged or too large.
    """
    by_type = _make_by_type(value_range, max_pixels)
    # Nearly all files are JPEG without tags: one branch for them, since a branch costs more than the search.
    # Of their size TensorFlow has the same limit.
    at_once = _is_jpeg(contents) & ~_is_tagged(contents)
    if max_pixels != MAX_PIXELS:
        at_once = tf.constant(False)
    image = tf.cond(at_once, lambda: decode_plain(contents), lambda: by_type(contents))
    return tf.ensure_shape(image, [None, None, 3])


@functools.cache  # or every image that is decoded outside a graph would trace it
def _make_by_type(value_range, max_pixels):
    @tf.autograph.experimental.do_not_convert
    def show(contents):
        contents = np.asarray(contents, object).item()  # outside a graph it comes as an array
        return decode_with_pillow(contents, value_range=value_range, max_pixels=max_pixels)

    def rest(contents):
        return tf.numpy_function(show, [contents], tf.uint8, stateful=False)

    one_node = {"_noinline": True}  # which costs nothing where it is not taken

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], experimental_attributes=one_node)
    def by_type(contents):
        return tf.cond(is_plain(contents, max_pixels), lambda: decode_plain(contents), lambda: rest(contents))

    return by_type


def decode_plain(contents: tf.Tensor) -> tf.Tensor:
    """Contents that are plain -> uint8 [h, w, 3], by TensorFlow."""
    return tf.io.decode_image(contents, channels=3, expand_animations=False)


def is_plain(contents: tf.Tensor, max_pixels: int = MAX_PIXELS) -> tf.Tensor:
    """Whether TensorFlow decodes what photo programs show, bool []; False for larger images than that."""
    limit = min(max_pixels, MAX_PIXELS)

    def jpeg():
        size = tf.cast(tf.image.extract_jpeg_shape(contents)[:2], tf.int64)
        return (size[0] * size[1] <= limit) & ~_is_turned(contents)

    return tf.cond(_is_jpeg(contents), jpeg, lambda: _is_plain_beside_jpeg(contents, limit))


def _end(contents, size):
    return tf.strings.substr(contents, tf.maximum(tf.strings.length(contents) - size, 0), size)


def _is_jpeg(contents):
    return tf.strings.substr(contents, 0, 3) == b"\xff\xd8\xff"


def _is_tagged(contents):
    """Whether a JPEG file has tags of Exif, or XMP's orientation."""
    return _holds(tf.strings.substr(contents, 0, _SEARCHED), [_EXIF, _XMP_TAG])


def _is_turned(contents):
    begin = tf.strings.substr(contents, 0, _SEARCHED)
    tagged = tf.cond(_holds(begin, [_EXIF]), lambda: _holds(begin, _EXIF_TAGS), lambda: tf.constant(False))
    return tagged | _holds(begin, [_XMP_TAG])


def _is_plain_beside_jpeg(contents, limit):
    head = tf.io.decode_raw(contents, tf.uint8, fixed_length=34)

    def starts(magic, at=0):
        return tf.reduce_all(head[at : at + len(magic)] == np.frombuffer(magic, np.uint8))

    def number(at, size, order=1):
        parts = tf.cast(head[at : at + size][::order], tf.int64)
        return tf.reduce_sum(parts * np.array([256**i for i in range(size)], np.int64))

    def png():
        half = _SEARCHED // 2
        begin, end = tf.strings.substr(contents, 0, half), _end(contents, half)
        eight_bits, opaque = head[24] <= 8, (head[25] == 0) | (head[25] == 2) | (head[25] == 3)
        small = number(16, 4, -1) * number(20, 4, -1) <= limit
        return eight_bits & opaque & small & ~_holds(begin, _NOT_PLAIN_PNG) & ~_holds(end, _NOT_PLAIN_PNG[1:])

    def webp():
        lossy, lossless, extended = (starts(kind, 12) for kind in (b"VP8 ", b"VP8L", b"VP8X"))
        packed = number(21, 4)

        def size(long, bits, short):
            return tf.case(
                [(extended, lambda: number(long, 3) + 1), (lossless, lambda: bits % 2**14 + 1)], short
            )

        width = size(24, packed, lambda: number(26, 2) % 2**14)
        height = size(27, packed // 2**14, lambda: number(28, 2) % 2**14)
        # The flags of an extended file: animation, XMP, Exif, alpha; of a lossless one alpha.
        flagged = (extended & ((head[20] & 0b00011110) > 0)) | (lossless & ((head[24] & 0b00010000) > 0))
        return (lossy | lossless | extended) & ~flagged & (width * height <= limit)

    def bmp():
        # 24 bits, not compressed, under the commonest header, and nothing behind the pixels.
        width, height = number(18, 4), number(22, 4)
        size = tf.cast(tf.strings.length(contents), tf.int64)
        whole = (54 + (3 * width + 3) // 4 * 4 * height == size) & (width * height <= limit)
        return starts(b"\x36\0\0\0\x28\0\0\0", 10) & starts(b"\x18\0\0\0\0\0", 28) & whole

    return tf.case(
        [
            (starts(b"\x89PNG\r\n\x1a\n"), png),
            (starts(b"RIFF") & starts(b"WEBP", 8), webp),
            (starts(b"BM"), bmp),
        ],
        default=lambda: tf.constant(False),  # GIF too: TensorFlow neither lays it on its canvas nor on white
    )


def decode_with_pillow(contents: bytes, *, value_range=FULL_RANGE, max_pixels=MAX_PIXELS) -> np.ndarray:
    """What a photo program shows of an image file, uint8 [h, w, 3]; in Python, by Pillow.

    Raises:
        ValueError: no image of these types, damaged or too large.
    """
    try:
        image = _open(contents, max_pixels)
        orientation = _orientation(image)
        if _is_16_bits(contents):
            image = Image.fromarray(_scaled(_pixels_16(contents), value_range))
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
    except TooLarge:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file leads to, StopIteration too
        raise ValueError(_reason(error)) from None


def display_traits(contents: bytes, max_pixels=MAX_PIXELS) -> tuple[set[str], int]:
    """The names in `TRAITS` that hold for a file; and the highest value of 16 bits, or 0."""
    image = _open(contents, max_pixels)
    is_16_bits = _is_16_bits(contents)
    found = {
        "rotated": _orientation(image) in _TURNS,
        "transparent": image.has_transparency_data or (is_16_bits and contents[25] in (4, 6)),
        "animated": getattr(image, "is_animated", False) and image.format != "MPO",
        "16 bits": is_16_bits,
    }
    highest = int(_pixels_16(contents)[..., :3].max()) if is_16_bits else 0
    return {name for name, is_so in found.items() if is_so}, highest


TRAITS = {
    "rotated": "rotated by their tag",
    "transparent": "transparent, on white",
    "animated": "animations, first frame",
    "16 bits": "with 16 bits",
}


def _holds(text, patterns):
    """Whether one of the patterns is in a string []."""
    rest = text
    for pattern in patterns:  # one after the other: all but the first work in place, without a copy
        rest = tf.strings.regex_replace(rest, pattern, "", replace_global=False)
    return tf.strings.length(rest) != tf.strings.length(text)


def _open(contents, max_pixels):
    if contents[:4] == b"RIFF":  # Pillow allocates the canvas of an animation when it opens it
        size = _webp_size(contents)
        _check_size(*size, max_pixels)
        if max(size) > 16383:
            raise ValueError(f"{size[0]} x {size[1]} pixels, more than WebP has")
    image = Image.open(io.BytesIO(contents), formats=_FORMATS)
    _check_size(*image.size, max_pixels)
    return image


def _check_size(width, height, max_pixels):
    if width * height > max_pixels:
        raise TooLarge(f"{width} x {height} pixels")


class TooLarge(ValueError):
    """By its header, an image has more pixels than the limit."""


def _webp_size(contents):
    kind, head = contents[12:16], contents[:30].ljust(30, b"\0")
    if kind == b"VP8X":
        return tuple(int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return bits % 2**14 + 1, bits // 2**14 % 2**14 + 1
    return tuple(int.from_bytes(head[at : at + 2], "little") % 2**14 for at in (26, 28))


def _orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a tag that cannot be read turns nothing
        return 1


def _is_16_bits(contents):
    return contents[:4] == b"\x89PNG" and contents[24] == 16


def _pixels_16(contents):
    """A PNG file of 16 bits -> uint16 [h, w, 4], which Pillow would cut to 8 bits."""
    return tf.io.decode_png(contents, channels=4, dtype=tf.uint16).numpy()


def _scaled(pixels, value_range):
    """uint16 [h, w, 4] -> uint8: equal steps of the range, so that 0 to 65535 is the upper byte."""
    low, high = value_range
    colours = (pixels[..., :3].astype(np.float32) - low) * np.float32(256 / (high - low + 1))
    return np.dstack([np.clip(colours, 0, 255).astype(np.uint8), (pixels[..., 3:] >> 8).astype(np.uint8)])


def _reason(error):
    if isinstance(error, UnidentifiedImageError):
        return f"no {', '.join(_FORMATS)} file"  # and not the address of a buffer
    return f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
