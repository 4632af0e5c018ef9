"""Tiles of large images: where they lie, what they are called, and regions of TIFF without the rest.

A tile is called by its file and the place of its upper left pixel, as `slide.tif#512,256`, x first, in the
image as it is displayed. No image file has such a name, since those end with their type.
"""

import itertools
import math
import os
import re

import numpy as np

_PLACE = re.compile(r"#\d+,\d+$")
# A tile is background where the deviation of every channel is less than this share of black to white.
BACKGROUND = 0.02
SIDE = 16  # Pixels of a tile's side that are enough to tell background.


def name_of(file: str, x: int, y: int) -> str:
    return f"{file}#{x},{y}"


def file_of(name: str) -> str:
    """Returns the file of a tile; other names are their own."""
    return _PLACE.sub("", name) if "#" in name else name


def place_of(name: str) -> tuple[int, int]:
    """Returns x and y of a tile."""
    x, y = name.rpartition("#")[2].split(",")
    return int(x), int(y)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Returns where the tiles of one axis begin: whole tiles only, the last one shifted inwards.

    An axis that is shorter than a tile has one, at 0.
    """
    last = max(0, length - tile)
    return [min(start, last) for start in range(0, last + tile - overlap, tile - overlap)]


def displayed_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Returns width and height as an image is displayed, of those in its file and its orientation tag."""
    return size[::-1] if orientation in range(5, 9) else size


def stored_region(region: tuple, size: tuple[int, int], orientation: int) -> tuple:
    """Returns where a region (x, y, w, h) of a displayed image, or what there is of it, is in its file."""
    (x, y, w, h), (width, height) = region, displayed_size(size, orientation)
    w, h = min(w, width), min(h, height)
    if x + w > width or y + h > height:
        raise ValueError(f"{width} x {height} pixels, less than at the start")
    x = width - x - w if orientation in (2, 3, 6, 7) else x
    y = height - y - h if orientation in (3, 4, 7, 8) else y
    return (y, x, h, w) if orientation in range(5, 9) else (x, y, w, h)


def crop_tiff(part, region: tuple, check_size) -> np.ndarray:
    """Reads a region of a page or series of tifffile: only the tiles and strips of the file that it touches.

    Args:
      part: a `TiffPage`, or a series with axes that end with YX.
      region: x, y, width and height.
      check_size: (width, height, channels) of a tile or strip -> None, raises an error if it is too large.

    Returns:
      Pixels in the axes of `part`; of a volume the first plane, of other axes of a series than C the first.
    """
    x, y, width, height = region
    if not hasattr(part, "dataoffsets"):
        counts = [count if axis == "C" else 1 for axis, count in zip(part.axes[:-2], part.shape)]
        planes = np.arange(math.prod(part.shape[:-2])).reshape(part.shape[:-2])[tuple(map(slice, counts))]
        pixels = [crop_tiff(part[plane], region, check_size) for plane in planes.ravel()]
        return np.reshape(pixels, (*counts, height, width))
    key, file = part.keyframe, part.parent.filehandle
    planes, depth, length, across, samples = key.shaped
    if file.is_file and part.is_contiguous and key.predictor == key.fillorder == 1 and not key.is_subsampled:
        dtype, path = key.dtype.newbyteorder(part.parent.byteorder), os.path.join(file.dirname, file.name)
        pixels = np.memmap(path, dtype, "r", part.dataoffsets[0], key.shaped)
        pixels = np.array(pixels[:, 0, y : y + height, x : x + width])
    else:
        h, w = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, across)
        check_size(w, h, samples)
        depth = math.ceil(depth / key.tiledepth) if key.is_tiled else depth
        rows, columns = range(y // h, -(-(y + height) // h)), range(x // w, -(-(x + width) // w))
        touched = np.full((planes, h * len(rows), w * len(columns), samples), key.nodata, key.dtype)
        for plane, row, column in itertools.product(range(planes), rows, columns):
            index = (plane * depth * math.ceil(length / h) + row) * math.ceil(across / w) + column
            if (segment := _segment(part, index)) is not None:
                top, left = h * (row - rows[0]), w * (column - columns[0])
                touched[plane, top : top + segment.shape[1], left : left + segment.shape[2]] = segment[0]
        pixels = touched[:, y - h * rows[0] :, x - w * columns[0] :][:, :height, :width]
    pixels = pixels[0] if planes == 1 else pixels
    return pixels[..., 0] if samples == 1 else pixels


def _segment(page, index):
    """Decodes one tile or strip, [depth, h, w, samples]; None of an empty one."""
    file, count = page.parent.filehandle, page.databytecounts[index]
    decode = page.keyframe.decode  # Making it may read the file, too.
    file.seek(page.dataoffsets[index])
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.keyframe.jpegheader}
    return decode(file.read(count) if count else None, index, **tables)[0]
