"""Nearest neighbours and near-duplicates by the cosine similarity of features."""

import numpy as np

SHARE = 0.3  # Default share of the median distance to the nearest neighbour: see `duplicates`.
_SAMPLE = 2_000  # Largest number of images that the median is estimated from.
_BLOCK = 2**23  # Similarities that `duplicates` holds at a time; all of them may be pairs of one group.
_MEBIBYTES = 256  # Memory that scikit-learn takes for similarities in `nearest`.


def nearest(
    features: np.ndarray, count: int, queries: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the images that are most similar to each query.

    Args:
      features: float32 [n, d], rows of length 1.
      count: number of neighbours of each query; fewer where there are not so many images.
      queries: float32 [m, d], rows of length 1; by default the images themselves, none of which is its own
        neighbour.

    Returns:
      Rows of `features`, int [m, count], the most similar first, and their cosine similarities.
    """
    from sklearn import config_context
    from sklearn.neighbors import NearestNeighbors

    count = min(count, len(features) - (queries is None))
    if not count:
        return np.empty((len(features), 0), int), np.empty((len(features), 0), np.float32)
    with config_context(working_memory=_MEBIBYTES):
        index = NearestNeighbors(n_neighbors=count, metric="cosine").fit(features)
        distances, rows = index.kneighbors(queries)
    return rows, 1 - distances


def duplicates(features: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Groups images that are nearer than `share` of the median distance to the nearest neighbour.

    An image is in a group when it is that near to any image of the group. Memory is linear in the number of
    images.

    Args:
      features: float32 [n, d], rows of length 1.
      share: above 0, up to 1.

    Returns:
      The number of every image's group, int [n], -1 where it is in none; the similarity to its nearest
      neighbour, [n]; and the smallest similarity that puts two images into one group.
    """
    count = len(features)
    sample = np.random.default_rng(0).permutation(count)[:_SAMPLE]
    _, similar = nearest(features, 2, features[sample])  # The first is the image itself or its copy.
    distance = share * np.median(np.sqrt(np.maximum(2 - 2 * similar[:, -1], 0)))
    threshold = 1 - max(distance, 1e-3) ** 2 / 2  # Identical images differ by the rounding of 32 bits.
    best, groups = np.empty(count, np.float32), np.arange(count)
    rows = max(1, _BLOCK // count)
    for start in range(0, count, rows):
        similar = features[start : start + rows] @ features.T
        np.fill_diagonal(similar[:, start:], -2)  # An image is not its own neighbour.
        best[start : start + rows] = similar.max(axis=1)
        row, column = np.nonzero(similar >= threshold)
        apart = groups[row + start] != groups[column]
        if apart.any():
            groups = _merge(groups, row[apart] + start, column[apart])
    sizes = np.bincount(groups)
    numbers = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)
    return numbers[groups], best, float(threshold)


def copies(train: np.ndarray, held_out: np.ndarray) -> tuple[int, int]:
    """Counts held-out images that are near-duplicates of training images, by the measure of `duplicates`.

    Args:
      train, held_out: float32 [n, d] and [m, d], rows of length 1.

    Returns:
      Their number, and that of the held-out images that were looked at, a sample of many.
    """
    queries = held_out[np.random.default_rng(0).permutation(len(held_out))[:_SAMPLE]]
    distance = np.sqrt(np.maximum(2 - 2 * nearest(train, 1, queries)[1][:, 0], 0))
    return int((distance < max(SHARE * np.median(distance), 1e-3)).sum()), len(queries)


def _merge(groups, images, others):
    """Merges the groups of each pair of images; numbers groups by their first image."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.ones(len(images), bool), (groups[images], groups[others])
    _, merged = connected_components(coo_array(edges, shape=(len(groups), len(groups))), directed=False)
    return merged[groups]
