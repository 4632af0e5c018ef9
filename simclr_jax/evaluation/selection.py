"""Methods that choose the images whose labels are worth most.

Each is a function (features, count, labelled, seed) -> rows, int [count], the best first:

  features: float32 [n, d], rows of length 1.
  count: number of images to choose; a larger choice begins with the smaller one.
  labelled: rows that have a label already.
  seed: decides samples and random orders.
"""

import numpy as np

from simclr_jax.evaluation.features import unit_rows
from simclr_jax.evaluation.stored import DIMENSIONS, StoredFeatures

_SAMPLE = 10_000  # Images that `typical` considers.
# Width of the similarity exp((cosine - 1) / width); 0.35 to 0.45 did equally well on three datasets.
_WIDTH = 0.45


def candidates(stored: StoredFeatures) -> np.ndarray:
    """Returns the rows of the images that may be labelled; held-out images have to stay unseen."""
    if "all" in stored.split:
        return np.arange(len(stored.names))
    return np.flatnonzero(np.array(stored.split) == "train")


def typical(features: np.ndarray, count: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Chooses always the image that brings most images near to one with a label.

    MaxHerding (arXiv 2407.12212): greedily maximises the mean over all images of the largest similarity to
    an image with a label. It chooses from a random sample of `_SAMPLE` images at most; what `count` takes
    beyond them is random.
    """
    unlabelled = np.setdiff1d(np.arange(len(features)), labelled)
    order = np.random.default_rng(seed).permutation(unlabelled)
    sample = np.sort(order[:_SAMPLE])
    points = _balance(features[np.concatenate([sample, labelled])])
    points, labelled_points = points[: len(sample)], points[len(sample) :]
    similarity = np.exp((points @ points.T - 1) / _WIDTH)
    nearest = np.zeros(len(sample), np.float32)  # Every image's similarity to the nearest label.
    for point in labelled_points:
        nearest = np.maximum(nearest, np.exp((points @ point - 1) / _WIDTH))
    # The gain of an image only falls as others are chosen: it is computed again where it could be the most.
    gains = np.full(len(sample), np.inf, np.float32)
    chosen = []
    while len(chosen) < min(count, len(sample)):
        best = int(gains.argmax())
        gain = np.maximum(similarity[best] - nearest, 0).sum()
        if gain < gains[best]:
            gains[best] = gain
        else:
            chosen.append(best)
            nearest, gains[best] = np.maximum(nearest, similarity[best]), -1
    return np.concatenate([sample[chosen], order[_SAMPLE:][: count - len(chosen)]])


def _balance(features):
    """Unit vectors [n, c] about the mean, in which a few strong principal components do not dominate.

    Each principal component is divided by the root of its deviation, which is half of whitening.
    """
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # Images may be identical.
        pca = PCA(min(DIMENSIONS, *features.shape), random_state=0).fit(features)
    deviation = np.sqrt(pca.explained_variance_)
    scale = np.sqrt(np.maximum(deviation, 1e-3 * deviation[0] + 1e-9))
    return unit_rows(pca.transform(features) / scale)


def coverage(features: np.ndarray, count: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Chooses always the image that is farthest from all before; the first is the nearest to the mean."""
    chosen = []
    if len(labelled):
        nearest = np.max([features @ features[row] for row in labelled], axis=0)
    else:
        chosen = [int((features @ features.mean(axis=0)).argmax())]
        nearest = features @ features[chosen[0]]
    while len(chosen) < count:
        nearest[labelled], nearest[chosen] = np.inf, np.inf
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, features @ features[chosen[-1]])
    return np.array(chosen)


def random(features: np.ndarray, count: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Chooses random images."""
    rows = np.setdiff1d(np.arange(len(features)), labelled)
    return np.random.default_rng(seed).permutation(rows)[:count]


METHODS = {"typical": typical, "coverage": coverage, "random": random}
