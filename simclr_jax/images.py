"""Turns images as programs have them into arrays: files, Pillow's images, arrays and tensors."""

import io
import os
import sys

import numpy as np

from simclr_jax.process import UserError, escape, files, reason_of

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")  # The modes of Pillow that PNG files have.


def as_sequence(images):
    """Returns images that can be counted and sliced; raises a UserError for what may be one image alone."""
    if isinstance(images, str | os.PathLike) or _is_pillow(images):
        raise UserError("expected several images, not one alone: write a list, as in encoder([image])")
    shape = getattr(images, "shape", ())
    if len(shape) == 2 or (len(shape) == 3 and (shape[-1] in (1, 3, 4) or shape[0] in (1, 3, 4))):
        raise UserError(
            f"images of shape {tuple(shape)} may be one image: write encoder(images[None]) for one, or "
            "encoder(images[..., None]) for several that are grey"
        )
    return images if hasattr(images, "__len__") else list(images)


def to_array(
    image, name: str, *, value_range=None, max_pixels=None, channels: int = 3, dtype: str = "uint8"
) -> np.ndarray:
    """Converts an image to uint8 or float32 [h, w, channels].

    Args:
      image: the path of a file; an image of Pillow; or an array or a tensor, uint8, floats in [0, 1] or, with
        a value_range, other whole numbers, of shape [h, w], [h, w, c] or [c, h, w], where c is `channels`, or
        for 3 also 1, or 4 with alpha, which is laid on white.
      name: the image's name in messages.
      value_range, max_pixels, channels: as in `decode.decode_bytes`.
      dtype: 'uint8', or 'float16' where files are read as float32.

    Raises:
      UserError: it is another kind of image, or cannot be decoded.
    """
    options = {"value_range": value_range, "channels": channels}
    options |= {"max_pixels": max_pixels} if max_pixels else {}
    options["dtype"] = "uint8" if dtype == "uint8" else "float32"
    if isinstance(image, str | os.PathLike):
        if files.is_local(image) and not os.path.isfile(image):
            raise UserError(f"{escape(image)} cannot be decoded: it is no file")
        return _decode(image, escape(image), options)
    if _is_pillow(image):
        if image.mode in ("F", "I;16B", "I;16L"):
            raise UserError(f"{name} has Pillow's mode {image.mode}: give an array of floats in [0, 1]")
        return _decode(image, name, options)
    is_torch = hasattr(image, "detach")
    image = np.asarray(image.detach().cpu() if is_torch else image)
    image = _channels_last(image, name, is_torch, (1, 3, 4) if channels == 3 else (channels,))
    if value_range and image.dtype.kind in "iu" and image.dtype != np.uint8:
        from simclr_jax.data import decode

        image = decode.to_unit(image, value_range)
    elif image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            raise UserError(f"{name} is of {image.dtype}: expected uint8, or floats in [0, 1]: scale it")
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 1):  # NaN fails too.
            raise UserError(f"{name} has values from {low:g} to {high:g}: scale it to [0, 1]")
        image = image.astype(np.float32)
    if image.shape[-1] == 4 and channels == 3:
        white = 255 if image.dtype == np.uint8 else 1
        alpha = image[..., 3:] / np.float32(white)
        on_white = image[..., :3] * alpha + white * (1 - alpha)
        image = np.round(on_white).astype(np.uint8) if white == 255 else on_white
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 and channels == 3 else image


def _channels_last(image, name, is_torch, counts):
    """Returns an image [h, w, c]; tells channels by their number."""
    if image.ndim == 2:
        image = image[..., None]
    last, first = ((image.ndim == 3 and image.shape[place] in counts) for place in (-1, 0))
    if 0 in image.shape or not (last or first):
        words = "1, 3 or 4" if len(counts) > 1 else counts[0]
        raise UserError(f"{name} has the shape {image.shape}: expected [h, w, c], where c is {words}")
    if is_torch and last and first:
        raise UserError(
            f"{name} has the shape {image.shape}, whose channels may come first or last: write "
            "images.permute(0, 2, 3, 1).numpy() where they come first, images.numpy() where they come last"
        )
    return image if last else np.moveaxis(image, 0, -1)


def _is_pillow(image):
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def _decode(image, name, options):
    """Decodes a file, or an image of Pillow as its file would be decoded."""
    from simclr_jax.data import decode, eager_execution

    try:
        with eager_execution():
            if _is_pillow(image):
                return decode.decode_in_python(_to_png(image), **options)
            return decode.decode(os.fsencode(image), **options).numpy()
    except Exception as error:  # TensorFlow and Pillow raise errors of many types.
        raise UserError(f"{name} cannot be decoded: {reason_of(error, 100)}") from None


def _to_png(image):
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    file = io.BytesIO()
    (image if image.mode in _MODES else image.convert("RGB")).save(file, "PNG", compress_level=0)
    return file.getvalue()
