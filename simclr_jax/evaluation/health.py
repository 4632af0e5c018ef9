"""Health of a representation without labels: do views of an image stay near, do images spread out?

A representation may collapse while the loss still falls: onto a point, or into a subspace of few dimensions.
These figures need only the representations of two views of the same images.
"""

import numpy as np
from scipy.special import entr

# A dimension is collapsed when its deviation is below this share of 1 / sqrt(w), that of an isotropic one.
_COLLAPSED = 0.01
_ZERO = 1e-6  # Shorter rows have no direction and count as zeros; the loss does not scale them to 1 either.


def measure(view1: np.ndarray, view2: np.ndarray) -> dict[str, float]:
    """Measures the health of a representation, float [n, w] for each of two views of the same n images.

    Returns:
      `alignment`, `uniformity`, `effective_rank` and `collapsed`, as below, and `dimensions`, w. All but the
      alignment are of both views together.
    """
    both = np.concatenate([view1, view2])
    return {
        "alignment": alignment(view1, view2),
        "uniformity": uniformity(both),
        "effective_rank": effective_rank(both),
        "dimensions": both.shape[1],
        "collapsed": collapsed_share(both),
    }


def alignment(view1: np.ndarray, view2: np.ndarray) -> float:
    """Returns the mean squared distance of positive pairs on the unit sphere (Wang and Isola 2020, 4.1).

    0 where the augmentations change nothing; 2 is the distance of unrelated directions.
    """
    return float(((_normalize(view1) - _normalize(view2)) ** 2).sum(axis=1).mean())


def uniformity(rows: np.ndarray, *, t: float = 2.0, chunk: int = 1024) -> float:
    """Returns the log of the mean of exp(-t d^2) over all pairs on the unit sphere (Wang and Isola, 4.1).

    It is 0 where all rows are the same or zero, or where there is only one, and near -2 t where they spread
    evenly over many dimensions: lower is better. It holds `chunk` x n similarities at a time.
    """
    rows = _normalize(rows)
    count, squares = len(rows), (rows**2).sum(axis=1)
    if count < 2:
        return 0.0
    total = 0.0
    for start in range(0, count, chunk):
        stop = start + chunk
        distances = squares[start:stop, None] + squares - 2 * rows[start:stop] @ rows.T
        total += np.exp(-t * np.maximum(distances, 0)).sum()
    return float(np.log((total - count) / (count * (count - 1))))


def effective_rank(rows: np.ndarray) -> float:
    """Returns the exponential of the entropy of the singular values (RankMe, Garrido et al. 2023, eq. 1).

    It lies between 1, also for rows of zeros, and w. Among checkpoints that differ in their training alone,
    the one of higher rank tends to do better. It is at most the number of rows, which should be several times
    the number of dimensions.
    """
    rows = np.asarray(rows, np.float64)
    if np.linalg.norm(rows, axis=1).max() < _ZERO:
        return 1.0
    rows = rows if rows.shape[0] >= rows.shape[1] else rows.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(rows.T @ rows), 0))
    return float(np.exp(entr(values / values.sum()).sum()))


def collapsed_share(rows: np.ndarray) -> float:
    """Returns the share of the dimensions that are constant on the unit sphere, as those of dead units."""
    rows = _normalize(rows)
    return float((rows.std(axis=0) < _COLLAPSED / np.sqrt(rows.shape[1])).mean())


def _normalize(rows):
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms < _ZERO, np.inf, norms)
