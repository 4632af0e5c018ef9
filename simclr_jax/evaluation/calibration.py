"""Calibration of a classifier by one temperature (Guo et al., arXiv 1706.04599, section 4.2)."""

import numpy as np

MIN_LABELS = 30  # Labelled images that a temperature needs; with fewer it would be a guess.
# The largest temperature, and the inverse of the smallest. The optimum lies beyond them for logits that are
# right about every image, or that carry no information.
_LARGEST = 20.0


def temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the temperature that calibrates the probabilities of logits when it divides them.

    Args:
      logits: [n, classes], of images that the classifier has not learnt from.
      labels: int [n]; of several labels an image, bool [n, classes].

    Returns:
      The temperature with the least cross entropy; None with fewer than `MIN_LABELS` images.
    """
    if len(labels) < MIN_LABELS:
        return None
    from scipy import optimize  # Its import takes a quarter of a second.
    from scipy.special import log_softmax

    logits, rows = logits.astype(np.float64), np.arange(len(labels))

    def cross_entropy(log_temperature):
        scaled = logits / np.exp(log_temperature)
        if labels.ndim == 2:
            return (np.logaddexp(0, scaled) - labels * scaled).mean()
        return -log_softmax(scaled, axis=1)[rows, labels].mean()

    bound = np.log(_LARGEST)
    optimum = optimize.minimize_scalar(cross_entropy, bounds=(-bound, bound), method="bounded")
    return float(np.exp(optimum.x))
