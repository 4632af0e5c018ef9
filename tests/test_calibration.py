"""The temperature that makes probabilities as often right as they say."""

import numpy as np
import pytest

from simclr_jax.evaluation import calibration


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_temperature_undoes_a_factor_of_the_logits(factor):
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((5000, 6))
    odds = np.exp(logits)
    labels = (rng.random((5000, 1)) < np.cumsum(odds / odds.sum(1, keepdims=True), axis=1)).argmax(axis=1)
    assert calibration.temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)


def test_few_images_tell_none_and_extremes_stay_in_bounds():
    logits, labels = np.eye(3).repeat(20, axis=0), np.arange(3).repeat(20)
    assert calibration.temperature(logits[:29], labels[:29]) is None
    assert calibration.temperature(logits, labels) == pytest.approx(1 / 20, rel=0.01)
    assert calibration.temperature(logits, (labels + 1) % 3) == pytest.approx(20, rel=0.01)
