"""Methods that choose the images whose labels are worth most.

Each is a function (features, count, labels, seed) -> rows, int [count], the best first:

  features: float32 [n, d], rows of length 1.
  count: number of images to choose; a larger choice begins with the smaller one.
  labels: int [n], -1 for the images to choose from; several labels an image are a class by themselves.
  seed: decides samples and random orders.
"""

import numpy as np

from simclr_jax.evaluation import doubt, probes
from simclr_jax.evaluation.features import Features, unit_rows
from simclr_jax.evaluation.stored import DIMENSIONS, StoredFeatures

_SAMPLE = 10_000  # Images that `typical` considers.
# Width of the similarity exp((cosine - 1) / width); 0.35 to 0.45 did equally well on three datasets.
_WIDTH = 0.45


def candidates(stored: StoredFeatures) -> np.ndarray:
    """Returns the rows of the images that may be labelled; held-out images have to stay unseen."""
    if "all" in stored.split:
        return np.arange(len(stored.names))
    return np.flatnonzero(np.array(stored.split) == "train")


def default(labels: np.ndarray) -> str:
    """Returns the name of the method for these labels: `doubtful` where they are of two classes or more."""
    return "doubtful" if len(np.unique(labels[labels >= 0])) > 1 else "typical"


def typical(features: np.ndarray, count: int, labels: np.ndarray, seed: int) -> np.ndarray:
    """Chooses always the image that brings most images near to one with a label.

    MaxHerding (arXiv 2407.12212): greedily maximises the mean over all images of the largest similarity to
    an image with a label. It chooses from a random sample of `_SAMPLE` images at most; what `count` takes
    beyond them is random.
    """
    order = random(features, len(labels), labels, seed)
    chosen = _herd(features, count, labels, order[:_SAMPLE], order)
    return np.concatenate([chosen, order[_SAMPLE:]])[:count]


def doubtful(features: np.ndarray, count: int, labels: np.ndarray, seed: int) -> np.ndarray:
    """Chooses as `typical`, but among the half of the images of which a classifier is less sure.

    The classifier is a logistic regression on the labels. Half of the images have a smaller margin between
    the two likeliest classes; the nearness of all counts. Others follow by their margins, where `count` is
    larger. Labels of fewer than two classes tell no doubts: then it is `typical`.
    """
    if default(labels) == "typical":
        return typical(features, count, labels, seed)
    order, known = random(features, len(labels), labels, seed), labels >= 0
    train = Features(features[known], labels[known])
    margins = doubt.margins(probes.probabilities(train, features))
    by_doubt = order[margins[order].argsort(kind="stable")]
    half = by_doubt[: (len(order) + 1) // 2]
    chosen = _herd(features, count, labels, order[:_SAMPLE], half)
    return np.concatenate([chosen, by_doubt[~np.isin(by_doubt, chosen)]])[:count]


def _herd(features, count, labels, sample, allowed):
    """At most `count` rows in both `sample` and `allowed` that bring most of the sample near to a label."""
    sample = np.sort(sample)
    points = _balance(features[np.concatenate([sample, np.flatnonzero(labels >= 0)])])
    points, labelled_points = points[: len(sample)], points[len(sample) :]
    similarity = np.exp((points @ points.T - 1) / _WIDTH)
    nearest = np.zeros(len(sample), np.float32)  # Every image's similarity to the nearest label.
    for point in labelled_points:
        nearest = np.maximum(nearest, np.exp((points @ point - 1) / _WIDTH))
    # The gain of an image only falls as others are chosen: it is computed again where it could be the most.
    is_allowed = np.isin(sample, allowed)
    gains = np.where(is_allowed, np.float32(np.inf), np.float32(-1))
    chosen = []
    while len(chosen) < min(count, is_allowed.sum()):
        best = int(gains.argmax())
        gain = np.maximum(similarity[best] - nearest, 0).sum()
        if gain < gains[best]:
            gains[best] = gain
        else:
            chosen.append(best)
            nearest, gains[best] = np.maximum(nearest, similarity[best]), -1
    return sample[chosen]


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


def coverage(features: np.ndarray, count: int, labels: np.ndarray, seed: int) -> np.ndarray:
    """Chooses always the image that is farthest from all before; the first is the nearest to the mean."""
    labelled, chosen = np.flatnonzero(labels >= 0), []
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


def random(features: np.ndarray, count: int, labels: np.ndarray, seed: int) -> np.ndarray:
    """Chooses random images."""
    return np.random.default_rng(seed).permutation(np.flatnonzero(labels < 0))[:count]


METHODS = {"typical": typical, "doubtful": doubtful, "coverage": coverage, "random": random}
