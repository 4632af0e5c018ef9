"""Figures of health on representations of which the right answer is known."""

import numpy as np
import pytest

from simclr_jax.evaluation import health


def gaussian(rows=512, width=16, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def test_alignment_is_the_squared_distance_of_directions():
    rows = gaussian()
    assert health.alignment(rows, 3 * rows) == pytest.approx(0, abs=1e-12)
    assert health.alignment(rows, -rows) == pytest.approx(4)
    assert health.alignment(np.eye(4), np.roll(np.eye(4), 1, axis=0)) == pytest.approx(2)


def test_uniformity_is_that_of_a_plain_double_loop_for_any_chunk():
    rows = gaussian(50, 3)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(unit) for b in unit[:i]]
    for chunk in (7, 1024):
        assert health.uniformity(rows, chunk=chunk) == pytest.approx(np.log(np.mean(pairs)), rel=1e-6)


def test_uniformity_is_0_in_a_point_and_near_minus_4_when_spread_out():
    assert health.uniformity(np.ones((10, 4))) == pytest.approx(0, abs=1e-9)
    assert health.uniformity(gaussian(1000, 512)) == pytest.approx(-4, abs=0.05)


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("rows", [8 * 16, 16])
def test_effective_rank_counts_equal_directions(rank, rows):
    basis = np.linalg.qr(gaussian(16, 16))[0][:rank]
    coefficients = np.linalg.qr(gaussian(rows, 16, seed=1))[0][:, :rank]
    assert health.effective_rank(coefficients @ basis) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_is_exp_of_the_entropy_of_the_singular_values():
    rows = gaussian(100, 8) * np.arange(1, 9)
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    shares = values / values.sum()
    assert health.effective_rank(rows) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert health.effective_rank(np.zeros((4, 8))) == 1


def test_collapsed_share_counts_dead_and_constant_dimensions():
    rows = gaussian(512, 16)
    assert health.collapsed_share(rows) == 0
    rows[:, :4] = 0
    assert health.collapsed_share(rows) == 0.25
    assert health.collapsed_share(np.ones((10, 4))) == 1


def test_measure_tells_a_healthy_representation_from_a_collapsed_one():
    noise = gaussian(seed=1)
    healthy = health.measure(gaussian(), gaussian() + 0.1 * noise)
    collapsed = health.measure(np.ones((512, 16)), np.ones((512, 16)) + 1e-4 * noise)
    assert healthy["dimensions"] == 16
    assert 0 < healthy["alignment"] < 0.1 and healthy["uniformity"] < -3
    assert healthy["effective_rank"] > 15 and healthy["collapsed"] == 0
    assert (
        collapsed["uniformity"] > -0.01 and collapsed["effective_rank"] < 1.1 and collapsed["collapsed"] == 1
    )


def collapsed_space(kind, images, width):
    """Two views of images in a space that tells nothing apart."""
    constant = gaussian(1, width, seed=2)
    noise = [gaussian(images, width, seed=seed) for seed in (3, 4)]
    point = {"zeros": 0, "same": constant, "ones": 1, "noise around zeros": 0, "noise": 1000 * constant}[kind]
    size = {"noise around zeros": 1e-8, "noise": 1e-4}.get(kind, 0)
    return [(point + size * part).astype(np.float32) for part in noise]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", [1, 2, 3, 100])
@pytest.mark.parametrize("width", [2, 16, 512])
@pytest.mark.parametrize("kind", ["zeros", "same", "ones", "noise around zeros", "noise"])
def test_a_space_without_differences_is_collapsed_at_any_number_of_images(kind, width, images):
    figures = health.measure(*collapsed_space(kind, images, width))
    assert figures["uniformity"] == pytest.approx(0, abs=1e-3) and figures["alignment"] == pytest.approx(
        0, abs=1e-3
    )
    assert figures["effective_rank"] == pytest.approx(1, abs=0.05) and figures["collapsed"] == 1


@pytest.mark.filterwarnings("error")
def test_one_row_spreads_nowhere():
    assert health.uniformity(gaussian(1)) == 0 and health.collapsed_share(gaussian(1)) == 1
