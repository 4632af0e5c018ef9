"""The images of a run and their places on the map, as its pictures and its page show them."""

import concurrent.futures
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from simclr_jax.evaluation import parts, selection
from simclr_jax.evaluation.similarity import nearest
from simclr_jax.evaluation.stored import StoredFeatures
from simclr_jax.plots.figures import composite
from simclr_jax.plots.tsne import places_of

MAX_IMAGES = 20_000  # Images that are shown; random ones where there are more.
PIXELS = 12_000_000  # Pixels of all thumbnails together.
NEAREST = 8  # Neighbours of every image.
SUGGESTED = 50  # Images that are suggested to label.
QUERIES, CLASSES = 8, 20  # Least number of queries, and largest number of classes with a query.
_LARGE = 320  # Pixels of the longer side of large images.


class Gallery(NamedTuple):
    """The n images that are shown.

    Attributes:
      stored: the features of all images of the run.
      rows: the rows of `stored` that are shown, int [n], ascending.
      places: float [n, 2] in [0, 1], on the map.
      nearest, similarities: the images most similar to each, int [n, k] below n, and their cosine
        similarities.
      queries: the images whose neighbours a picture shows, int [q] below n.
      suggested: rows of `stored` to label, the best first.
      thumbnails: uint8 [n, s, s, 3].
      large: {row of `stored`: image} of the suggested images, the queries and their neighbours that can still
        be read.
    """

    stored: StoredFeatures
    rows: np.ndarray
    places: np.ndarray
    nearest: np.ndarray
    similarities: np.ndarray
    queries: np.ndarray
    suggested: np.ndarray
    thumbnails: np.ndarray
    large: dict[int, Image.Image]

    @property
    def labels(self) -> np.ndarray:
        """int [n], -1 where there is none."""
        return self.stored.labels[self.rows]

    @property
    def names(self) -> list[str]:
        """The names of the n images."""
        return [self.stored.names[row] for row in self.rows]


def make(stored: StoredFeatures) -> Gallery:
    """Chooses the images to show, places them, and reads them."""
    rows = np.sort(np.random.default_rng(0).permutation(len(stored.names))[:MAX_IMAGES])
    features = stored.features[rows]
    neighbours, similarities = nearest(features, NEAREST)
    queries, suggested = _queries(stored.labels[rows]), _suggested(stored)
    large = np.concatenate([suggested, rows[queries], rows[neighbours[queries].ravel()]])
    thumbnails, large = _read_images(stored, rows, set(large.tolist()))
    places = places_of(features)
    return Gallery(stored, rows, places, neighbours, similarities, queries, suggested, thumbnails, large)


def _queries(labels):
    """The first image of every class, or of `CLASSES` of them, and other images up to `QUERIES`."""
    classes, firsts = np.unique(labels, return_index=True)
    firsts = _evenly(firsts[classes >= 0], CLASSES)
    others = np.setdiff1d(np.arange(len(labels)), firsts)
    return np.concatenate([firsts, _evenly(others, max(0, QUERIES - len(firsts)))]).astype(int)


def _evenly(values, count):
    """At most `count` of the values, at even distances."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)]


def _suggested(stored):
    """Rows of images to label, from the training images without a label, or from all if each has one."""
    rows = selection.candidates(stored)
    labels = stored.labels[rows]
    labels = labels if (labels < 0).any() else np.full(len(rows), -1)
    count = min(SUGGESTED, int((labels < 0).sum()))
    choose = selection.METHODS[selection.default(labels)]
    return rows[choose(stored.features[rows], count, labels, 0)]


def _read_images(stored, rows, large_rows):
    """Thumbnails of the images in `rows`, and {row: image} of those in `large_rows`."""
    size = int(np.clip(np.sqrt(PIXELS / len(rows)), 16, 64))
    thumbnails = np.full((len(rows), size, size, 3), 255, np.uint8)
    positions = {row: position for position, row in enumerate(rows.tolist())}
    large, rows_of_splits = {}, {split: {} for split in dict.fromkeys(stored.split)}
    for row in sorted(positions.keys() | large_rows):
        rows_of_splits[stored.split[row]][int(stored.index[row])] = row
    for split, row_by_index in rows_of_splits.items():
        for index, image in images(parts.load(stored.config, stored.folder, split), list(row_by_index)):
            row = row_by_index[index]
            if row in positions:
                thumbnail = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
                thumbnails[positions[row]] = np.asarray(thumbnail)
            if row in large_rows:
                large[row] = fit(image, _LARGE)
    return thumbnails, large


def images(source, indices: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yields the index and the image of examples, without those that can no longer be read."""

    def decode(pair):
        index, record = pair
        try:
            return index, Image.fromarray(composite(np.asarray(source.decode(record))))
        except Exception:  # The file was lost: TensorFlow and Pillow raise errors of many types.
            return index, None

    if not source.random_access:
        chosen = set(indices)
        records = enumerate(record for record, _ in source.read([(0, max(chosen, default=-1) + 1)]))
        pairs = ((index, record) for index, record in records if index in chosen)
    else:
        pairs = ((index, source.records[index]) for index in indices)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        while batch := list(itertools.islice(pairs, 64)):  # Images of any size: few are held at a time.
            yield from ((index, image) for index, image in pool.map(decode, batch) if image is not None)


def fit(image: Image.Image, size: int) -> Image.Image:
    """Scales an image so that its longer side fits into `size`; small ones grow by whole factors."""
    if max(image.size) * 2 <= size:
        return ImageOps.scale(image, size // max(image.size), Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((size, size))
    return image
