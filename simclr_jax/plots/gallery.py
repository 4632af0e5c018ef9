"""The images of a run and where they lie, as its pictures and its page show them."""

import concurrent.futures
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from simclr_jax.evaluation import embedded, neighbours, suggest
from simclr_jax.process.console import escape

MOST = 20_000  # images that are shown, random ones of more
MAPPED = 5_000  # of them that t-SNE places; the others lie where the one nearest to them is
PIXELS = 12_000_000  # of all thumbnails together
NEAREST = 8  # neighbours of every image
SUGGESTED = 50
QUERIES, CLASSES = 8, 20  # images whose neighbours a picture shows: of every class one, as far as these reach
_LARGE = 320  # pixels of images that are shown large
_BLOCK = 2**26  # similarities that are held at a time


class Gallery(NamedTuple):
    """Images that are shown, n of them.

    Attributes:
      found: the features of all images.
      rows: of `found` that are shown, int [n], ascending.
      places: float [n, 2] in [0, 1], where each lies on the map.
      nearest, similar: the images nearest to each, int [n, k], of the n, and their cosine similarities.
      queries: some of the n, of every class one.
      suggested: rows of `found` to label, the best first.
      squares: uint8 [n, s, s, 3], thumbnails.
      large: {row of `found`: image}, of what is suggested, of the queries and of their neighbours, where the
        image can still be read.
    """

    found: embedded.Embedded
    rows: np.ndarray
    places: np.ndarray
    nearest: np.ndarray
    similar: np.ndarray
    queries: np.ndarray
    suggested: np.ndarray
    squares: np.ndarray
    large: dict[int, Image.Image]

    @property
    def labels(self) -> np.ndarray:
        """int [n], -1 where there is none."""
        return self.found.labels[self.rows]


def read(run: Path) -> Gallery:
    """Those of a workdir with a network, whose features are made where there are none."""
    found = embedded.load(run)
    rows = np.sort(np.random.default_rng(0).permutation(len(found.names))[:MOST])
    features = found.features[rows]
    print(f"{escape(run)}: a map of {len(rows):,} images", flush=True)
    nearest, similar = nearest_of(features)
    queries = _queries(found.labels[rows])
    suggested = _suggested(found)
    drawn = np.union1d(queries, nearest[queries].ravel()).astype(int)
    squares, large = _pictures(found, rows, np.union1d(suggested, rows[drawn]))
    return Gallery(found, rows, places_of(features), nearest, similar, queries, suggested, squares, large)


def nearest_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the nearest images of each, int [n, k], the nearest first, and the similarities."""
    count = len(features)
    near = min(NEAREST, count - 1)
    rows, similar = np.empty((count, near), int), np.empty((count, near), np.float32)
    block = max(1, _BLOCK // count)
    for start in range(0, count, block):
        stop = min(start + block, count)
        found = neighbours.to_others(features, np.arange(start, stop))
        best = (
            np.argpartition(-found, near - 1, axis=1)[:, :near] if near else np.empty((stop - start, 0), int)
        )
        order = np.argsort(-np.take_along_axis(found, best, axis=1), axis=1, kind="stable")
        rows[start:stop] = np.take_along_axis(best, order, axis=1)
        similar[start:stop] = np.take_along_axis(found, rows[start:stop], axis=1)
    return rows, similar


def places_of(features: np.ndarray) -> np.ndarray:
    """Where images lie on a map, float [n, 2] in [0, 1]: those with similar features together (t-SNE).

    Args:
      features: float [n, d], rows of length 1.
    """
    from sklearn.manifold import TSNE

    count = len(features)
    placed = np.sort(np.random.default_rng(0).permutation(count)[:MAPPED])
    if len(placed) < 5 or not np.ptp(features, axis=0).any():  # nothing to lay out: beside each other
        return np.stack([np.linspace(0, 1, count), np.full(count, 0.5)], axis=1)
    perplexity = min(30, (len(placed) - 1) / 3)
    found = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(features[placed])
    found = (found - found.min(axis=0)) / np.maximum(np.ptp(found, axis=0), 1e-12)
    places = np.empty((count, 2))
    places[placed] = found
    others = np.setdiff1d(np.arange(count), placed)
    rng = np.random.default_rng(0)
    for start in range(0, len(others), 4096):
        rows = others[start : start + 4096]
        best = (features[rows] @ features[placed].T).argmax(axis=1)
        places[rows] = np.clip(found[best] + 0.004 * rng.standard_normal((len(rows), 2)), 0, 1)
    return places


def _queries(labels):
    """The first image of every class, of classes apart where there are many; without labels some images."""
    known, firsts = np.unique(labels, return_index=True)
    firsts = firsts[known >= 0]
    if len(firsts) > CLASSES:
        firsts = firsts[np.linspace(0, len(firsts) - 1, CLASSES).round().astype(int)]
    rest = np.setdiff1d(np.arange(len(labels)), firsts)
    more = min(max(0, QUERIES - len(firsts)), len(rest))
    some = np.linspace(0, len(rest) - 1, more).round().astype(int)
    return np.concatenate([firsts, rest[some]]).astype(int)


def _suggested(found):
    """Rows of images to label, of what is trained on and has no label."""
    rows = suggest.candidates(found)
    known = found.labels[rows] >= 0
    known = known if not known.all() else np.zeros(len(rows), bool)  # of a set that is labelled: as if not
    count = min(SUGGESTED, int((~known).sum()))
    return rows[suggest.typical(found.features[rows], count, np.flatnonzero(known), 0)]


def _pictures(found, rows, large):
    """Squares of the images in `rows`, and {row: image} of those in `large`."""
    size = int(np.clip(np.sqrt(PIXELS / len(rows)), 16, 64))
    squares = np.full((len(rows), size, size, 3), 255, np.uint8)
    places = {row: place for place, row in enumerate(rows.tolist())}
    wanted, pictures = set(large.tolist()), {}
    numbers = {split: {} for split in dict.fromkeys(found.split)}
    for row in np.union1d(rows, large).tolist():
        numbers[found.split[row]][int(found.index[row])] = row
    for split, by_index in numbers.items():
        for index, image in images(found.config, found.files, split, list(by_index)):
            row = by_index[index]
            if row in places:
                squares[places[row]] = np.asarray(_square(image, size))
            if row in wanted:
                pictures[row] = within(image, _LARGE)
    return squares, pictures


def images(config, workdir, split: str, indices: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yields index and image of some examples of a split, those that can still be read."""
    from simclr_jax.data import datasets

    source = datasets.load(config.dataset, split, seed=config.seed, workdir=workdir)

    def decoded(index, record):
        try:
            return index, Image.fromarray(np.asarray(source.decode(record)))
        except Exception:  # lost since: TensorFlow's and Pillow's errors
            return index, None

    if not source.random_access:
        wanted = set(indices)
        records = enumerate(record for record, _ in source.read([(0, max(wanted, default=-1) + 1)]))
        pairs = ((index, record) for index, record in records if index in wanted)
    else:
        pairs = ((index, source.records[index]) for index in indices)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        while some := list(itertools.islice(pairs, 64)):  # images of any size: few are held at a time
            for index, image in pool.map(lambda pair: decoded(*pair), some):
                if image is not None:
                    yield index, image


def _square(image, size):
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def within(image: Image.Image, size: int) -> Image.Image:
    """An image of which neither side is above `size`; small ones are enlarged by whole factors."""
    if max(image.size) * 2 <= size:
        factor = size // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((size, size))
    return image
