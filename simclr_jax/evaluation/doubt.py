"""Doubts about predictions: margin, entropy, and how unlike the labelled images an image is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import entr

from simclr_jax.evaluation.features import unit_rows
from simclr_jax.process import files

FILE = "labelled.npz"
MAX_LABELLED = 1000  # Labelled images whose features are kept, 8 MB at 2,048 dimensions.


class Labelled(NamedTuple):
    """Labelled images that a classifier has learnt from.

    Attributes:
      features: float32 [n, w], rows of length 1, which the classifier reads.
      distances: float32 [n], one minus the cosine similarity of each to its nearest other one, sorted.
    """

    features: np.ndarray
    distances: np.ndarray


def likeliest(
    classes: Sequence[str], probabilities: np.ndarray, several: bool = False
) -> tuple[list[str], np.ndarray]:
    """Returns the labels of images, and how probable they are, [n], from probabilities [n, classes].

    With `several` labels an image, they are those above 0.5, as in `a;b`, ';' where none is; their
    probability is that of the least certain class.
    """
    names = np.array(classes, object)
    if not several:
        return names[probabilities.argmax(axis=1)].tolist(), probabilities.max(axis=1)
    labels = [";".join(names[row]) or ";" for row in probabilities > 0.5]
    return labels, np.maximum(probabilities, 1 - probabilities).min(axis=1)


def margins(probabilities: np.ndarray, several: bool = False) -> np.ndarray:
    """Returns how much more probable the likeliest class is than the second: [n, classes] -> [n].

    With `several` labels an image, it is how far the least certain class is from as likely as not, 0 to 1.
    """
    if several:
        return np.abs(2 * probabilities - 1).min(axis=1)
    second, best = np.sort(probabilities, axis=1)[:, -2:].T
    return best - second


def entropies(probabilities: np.ndarray, several: bool = False) -> np.ndarray:
    """Returns the entropies in nats, with `several` labels the sum over classes: [n, classes] -> [n]."""
    if several:
        return entropies(np.stack([probabilities, 1 - probabilities], axis=1)).sum(axis=1)
    return entr(probabilities).sum(axis=1)


def save(workdir, rows: np.ndarray) -> None:
    """Writes `FILE` into a workdir, from the features of labelled images, [n, w]."""
    rows = unit_rows(rows.astype(np.float32))
    similarities = rows @ rows.T
    np.fill_diagonal(similarities, -1)
    with files.writing(workdir / FILE) as file:
        np.savez(file, **Labelled(rows, np.sort(1 - similarities.max(axis=1)))._asdict())


def load(workdir) -> Labelled | None:
    """Reads `FILE` in a workdir; None where there is none."""
    if not files.exists(workdir / FILE):
        return None
    with (workdir / FILE).open("rb") as file:
        return Labelled(**np.load(file))


def unlike(labelled: Labelled, similarities: np.ndarray) -> np.ndarray:
    """Returns the share of labelled images that are nearer to the others than these images are, [n].

    It is the quantile of an image's distance to the nearest labelled one among the distances of these to one
    another (nearest neighbours as in arXiv 2204.06507).

    Args:
      labelled: from `load`.
      similarities: the cosine similarity of each image to the nearest labelled one, [n].
    """
    return np.searchsorted(labelled.distances, 1 - similarities) / len(labelled.distances)
