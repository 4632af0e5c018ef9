"""Readers of what Pillow does not read as it is stored: TIFF of any depth and channels, .npy and DICOM.

Each takes the contents of a file, `check_size(width, height, channels)`, which raises an error where a header
tells of too many pixels, and the number of channels that is wanted, None for those that the file has. It
returns a `Raw`.
"""

import importlib
import io
import logging
import math
from typing import NamedTuple

import numpy as np

PACKAGES = (
    "pip install 'simclr-jax[images]', in a clone .venv/bin/pip install -r launch/requirements-images.txt"
)


class Raw(NamedTuple):
    """An image in the values of its file.

    Attributes:
      pixels: uint8, uint16 or float32 [h, w, c].
      alpha: opacity, float32 [h, w, 1] in [0, 1]; None of an opaque image.
      orientation: the value of its tag, from 1 to 8; the pixels are as they lie in the file.
      is_transparent: whether it has transparent places, which may be white already.
      is_animated: whether further frames were left.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    orientation: int = 1
    is_transparent: bool = False
    is_animated: bool = False


class PackageMissing(ValueError):
    """A file needs a package that is not installed."""


def read_tiff(contents: bytes, check_size, channels: int | None) -> Raw:
    """Reads the first page; of OME-TIFF and ImageJ all channels of the first plane.

    A file of as many grey pages as `channels` has a channel on each.
    """
    with open_tiff(io.BytesIO(contents)) as file:
        return read_open_tiff(file, check_size, channels, lambda part: part.asarray(maxworkers=1))


def open_tiff(file):
    """Opens a path or a stream, as a context."""
    return _package("tifffile").TiffFile(file)


def read_open_tiff(file, check_size, channels: int | None, read_part, level: int = 0) -> Raw:
    """Reads an opened file as `read_tiff`; `read_part` reads a page or series, or the same region of each.

    `level` is that of a pyramid, 0 the largest.
    """
    page = file.series[0].levels[level].keyframe if level else file.pages.first
    check_size(page.imagewidth, page.imagelength, page.samplesperpixel)
    series = file.series[0].levels[level] if file.is_ome or file.is_imagej else page
    if "C" in series.axes and "S" not in series.axes:
        check_size(1, 1, math.prod(series.shape))
        pixels = read_part(series)
        pixels = pixels[tuple(slice(None) if axis in "CYX" else 0 for axis in series.axes)]
        place = [axis for axis in series.axes if axis in "CYX"].index("C")
        return Raw(_values(np.moveaxis(pixels, place, -1)))
    # Tifffile writes [c, h, w] so.
    if channels and page.samplesperpixel == 1 < channels == len(file.pages):
        return Raw(_values(np.stack([read_part(page) for page in file.pages], -1)))
    pixels = read_part(page)
    if page.samplesperpixel > 1 and page.axes[0] == "S":
        pixels = np.moveaxis(pixels, 0, -1)
    elif page.samplesperpixel == 1:
        pixels = pixels[..., None]
    while pixels.ndim > 3:  # a volume
        pixels = pixels[0]
    kind, highest = getattr(page.photometric, "name", ""), 2**page.bitspersample - 1
    if kind == "MINISWHITE" and pixels.dtype.kind in "bu":
        pixels = (highest - pixels).astype(pixels.dtype)
    elif kind == "PALETTE":
        pixels = (np.moveaxis(page.colormap, 0, -1)[pixels[..., 0]] >> 8).astype(np.uint8)
    elif kind == "SEPARATED":
        pixels = (highest - pixels[..., :3]) * ((highest - pixels[..., 3:4]) / highest)
        pixels = pixels.round().astype(np.uint8 if highest == 255 else np.uint16)
    elif kind in ("CIELAB", "ICCLAB", "ITULAB", "LOGLUV"):
        raise ValueError(f"TIFF of {kind} colours")
    pixels, alpha, orientation = _values(pixels), None, page.tags.get(274)
    opacity = [
        place for place, extra in enumerate(page.extrasamples, -len(page.extrasamples)) if extra in (1, 2)
    ]
    if opacity and channels != pixels.shape[-1]:
        alpha = pixels[..., opacity[0], None] / np.float32(highest if pixels.dtype != np.float32 else 1)
        pixels = np.delete(pixels, opacity[0], -1)
        if 1 in page.extrasamples:  # the colours are multiplied by it
            pixels = np.where(alpha > 0, pixels / np.maximum(alpha, 1e-6), 0).astype(pixels.dtype)
    return Raw(pixels, alpha, orientation.value if orientation else 1, alpha is not None)


def read_npy(contents: bytes, check_size, channels: int | None) -> Raw:
    """Reads an array [h, w] or [h, w, c]."""
    file = io.BytesIO(contents)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if len(shape) not in (2, 3) or 0 in shape or dtype.kind not in "buif":
        raise ValueError(f"{dtype} of shape {shape}: expected numbers [h, w, c]")
    if len(shape) == 3 and shape[0] < 16 < shape[2]:
        raise ValueError(f"shape {shape}: expected [h, w, c], with the channels last")
    check_size(shape[1], shape[0], math.prod(shape[2:]))
    pixels = np.load(io.BytesIO(contents), allow_pickle=False)
    return Raw(_values(pixels.reshape(*shape[:2], -1)))


def read_dicom(contents: bytes, check_size, channels: int | None) -> Raw:
    """Reads the first frame, in the units of its rescale slope and intercept; MONOCHROME1 is inverted."""
    pydicom = _package("pydicom")
    from pydicom import pixels as dicom_pixels

    dataset = pydicom.dcmread(io.BytesIO(contents))
    check_size(dataset.Columns, dataset.Rows, dataset.SamplesPerPixel)
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    pixels = dicom_pixels.pixel_array(dataset, index=0)
    if dataset.SamplesPerPixel == 1:
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            pixels = (-1 if dataset.PixelRepresentation else 2**dataset.BitsStored - 1) - pixels
        if (dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)) != (1, 0):
            pixels = dicom_pixels.apply_modality_lut(pixels, dataset)
        pixels = pixels[..., None]
    return Raw(_values(pixels), is_animated=frames > 1)


def _package(name):
    logging.getLogger(name).setLevel(logging.CRITICAL)  # What matters is an error, too.
    try:
        return importlib.import_module(name)
    except ImportError:
        raise PackageMissing(f"needs {name}: {PACKAGES}") from None


def _values(pixels):
    """Returns pixels as uint8, uint16 or float32; what is no number becomes 0."""
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        return pixels.astype(pixels.dtype.newbyteorder("="))
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"pixels of {pixels.dtype}")
    return np.nan_to_num(pixels.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)


# {name of a type: (whether contents are of it, reader)}
READERS = {
    "TIFF": (lambda head: head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), read_tiff),
    "NPY": (lambda head: head[:6] == b"\x93NUMPY", read_npy),
    "DICOM": (lambda head: head[128:132] == b"DICM", read_dicom),
}
