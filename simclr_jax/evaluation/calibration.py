"""Probabilities that hold: one temperature for a classifier (Guo et al., arXiv 1706.04599, section 4.2)."""

import numpy as np
from scipy import optimize
from scipy.special import log_softmax

ENOUGH = 30  # labelled images that the classifier has not learnt from; of fewer a temperature is a guess
_LARGEST = 20.0  # and its inverse the smallest: beyond it logits that tell nothing, or are all right, lead


def temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """What to divide logits by so that their probabilities are as often right as they say.

    Args:
      logits: [n, classes], of images that the classifier has not learnt from.
      labels: int [n].

    Returns:
      The temperature of the least cross entropy; None where the images are fewer than `ENOUGH`.
    """
    if len(labels) < ENOUGH:
        return None
    logits, rows = logits.astype(np.float64), np.arange(len(labels))

    def cross_entropy(log_temperature):
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean()

    bound = np.log(_LARGEST)
    found = optimize.minimize_scalar(cross_entropy, bounds=(-bound, bound), method="bounded")
    return float(np.exp(found.x))
