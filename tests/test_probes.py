"""Probes against scikit-learn, and on features of which the right answer is known."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from simclr_jax import probes
from simclr_jax.probes import Features


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order].astype(np.float32), labels[order]
    return Features(pixels[:1000], labels[:1000]), Features(pixels[1000:], labels[1000:])


def test_linear_accuracy_is_that_of_scaled_logistic_regression(digits):
    train, held_out = digits
    scaler = StandardScaler().fit(train.features)
    model = LogisticRegression(C=1.0, max_iter=500).fit(scaler.transform(train.features), train.labels)
    expected = model.score(scaler.transform(held_out.features), held_out.labels)
    assert probes.linear_accuracy(train, held_out) == pytest.approx(expected, abs=0.003)
    assert expected > 0.9


def test_linear_accuracy_does_not_depend_on_the_scale_of_features(digits):
    train, held_out = digits
    scale = np.logspace(-3, 3, train.features.shape[1], dtype=np.float32)
    scaled = (Features(part.features * scale + 5, part.labels) for part in digits)
    assert probes.linear_accuracy(*scaled) == pytest.approx(probes.linear_accuracy(train, held_out), abs=0.02)


def test_few_labels_score_less_than_all_and_are_the_same_for_the_same_seed(digits):
    few = probes.few_label_accuracy(*digits, labels_per_class=5, draws=3)
    assert 0.6 < few < probes.linear_accuracy(*digits) - 0.05
    assert few == probes.few_label_accuracy(*digits, labels_per_class=5, draws=3)
    assert few != probes.few_label_accuracy(*digits, labels_per_class=5, draws=3, seed=1)


def test_few_labels_use_only_those_labels(digits):
    train, held_out = digits
    seen = []
    original = probes._logistic_regression
    probes._logistic_regression = lambda part: seen.append(part.labels) or original(part)
    try:
        probes.few_label_accuracy(train, held_out, labels_per_class=3, draws=2)
    finally:
        probes._logistic_regression = original
    assert all((np.bincount(labels) == 3).all() for labels in seen) and len(seen) == 2


def test_knn_accuracy_with_a_hot_vote_is_that_of_scikit_learn(digits):
    train, held_out = digits
    expected = KNeighborsClassifier(1, metric="cosine").fit(*train).score(*held_out)
    assert probes.knn_accuracy(*digits, k=1) == pytest.approx(expected, abs=0.002)
    # At a very high temperature all neighbours weigh the same.
    expected = KNeighborsClassifier(10, metric="cosine").fit(*train).score(*held_out)
    assert probes.knn_accuracy(*digits, k=10, temperature=1e6) == pytest.approx(expected, abs=0.005)


def test_knn_votes_do_not_depend_on_the_chunk(digits):
    few, many = (
        probes.knn_votes(*digits, k=10, temperature=0.07, max_elements=elements) for elements in (5000, 2**26)
    )
    assert few.shape == (len(digits[1].labels), 10)
    np.testing.assert_allclose(few, many, rtol=1e-5)


def test_knn_votes_are_those_of_a_plain_loop_also_with_padding(digits):
    bank = Features(digits[0].features[:83], digits[0].labels[:83])  # 8 devices hold 11 rows, the last one 6
    queries = Features(digits[1].features[:5], digits[1].labels[:5])
    found = probes.knn_votes(bank, queries, k=20, temperature=0.5)  # more than one device holds
    a, b = (x.features / np.linalg.norm(x.features, axis=1, keepdims=True) for x in (queries, bank))
    expected = np.zeros((5, 10))
    for row, similarities in zip(expected, a @ b.T):
        for neighbour in np.argsort(-similarities)[:20]:
            row[bank.labels[neighbour]] += np.exp((similarities[neighbour] - 1) / 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("l2", [1e-3, 1.0, 1e3])
def test_logistic_regression_is_that_of_scikit_learn(digits, l2):
    train, held_out = digits
    train = Features(train.features / 16, train.labels)
    expected = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-8).fit(*train)
    weights = probes.make_logistic_regression(train, 10)(l2)

    def objective(weights):
        log_probabilities = log_softmax(probes.predict(weights, train.features), axis=1)
        losses = -log_probabilities[np.arange(len(train.labels)), train.labels]
        return losses.sum() + 0.5 * l2 * (weights[:-1] ** 2).sum()

    theirs = objective(np.vstack([expected.coef_.T, expected.intercept_]))
    assert objective(weights) == pytest.approx(theirs, rel=1e-3, abs=1e-4 * len(train.labels))
    predictions = probes.predict(weights, held_out.features / 16).argmax(axis=1)
    assert (predictions == expected.predict(held_out.features / 16)).mean() > 0.99


def test_logistic_regression_from_a_neighbour_ends_at_the_same_place(digits):
    train = Features(digits[0].features / 16, digits[0].labels)
    fit = probes.make_logistic_regression(train, 10)
    direct, by_steps = fit(1.0), fit(1.0, fit(10.0))
    np.testing.assert_allclose(by_steps, direct, atol=0.05)
    assert np.abs(fit(10.0) - direct).max() > 0.5


def test_knn_weighs_near_neighbours_more():
    bank = Features(np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32), np.array([0, 1, 1]))
    query = Features(np.array([[1, 0.05]], np.float32), np.array([0]))
    assert probes.knn_accuracy(bank, query, k=3, temperature=0.07) == 1
    assert probes.knn_accuracy(bank, query, k=3, temperature=100) == 0
