"""Probes against scikit-learn, and on features of which the right answer is known."""

import logging
import warnings

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info

from simclr_jax.evaluation import probes
from simclr_jax.evaluation.probes import Features

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order].astype(np.float32), labels[order]
    return Features(pixels[:1000], labels[:1000]), Features(pixels[1000:], labels[1000:])


def few_label_accuracy(train, held_out, **options):
    return np.mean(probes.few_label_accuracies(train, held_out, **options))


def test_linear_accuracy_is_that_of_scaled_logistic_regression(digits):
    train, held_out = digits
    scaler = StandardScaler().fit(train.features)
    model = LogisticRegression(C=1.0, max_iter=500).fit(scaler.transform(train.features), train.labels)
    expected = model.score(scaler.transform(held_out.features), held_out.labels)
    assert probes.linear_accuracy(train, held_out) == pytest.approx(expected, abs=0.003)
    assert expected > 0.9


def test_probabilities_are_those_of_scaled_logistic_regression(digits):
    train, held_out = digits
    few = Features(train.features[:40], train.labels[:40])
    scaler = StandardScaler().fit(held_out.features)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(few.features), few.labels)
    expected = model.predict_proba(scaler.transform(held_out.features))
    np.testing.assert_allclose(probes.probabilities(few, held_out.features), expected, atol=2e-3)


def test_linear_accuracy_does_not_depend_on_the_scale_of_features(digits):
    train, held_out = digits
    scale = np.logspace(-3, 3, train.features.shape[1], dtype=np.float32)
    scaled = (Features(part.features * scale + 5, part.labels) for part in digits)
    assert probes.linear_accuracy(*scaled) == pytest.approx(probes.linear_accuracy(train, held_out), abs=0.02)


def test_few_labels_score_less_than_all_and_are_the_same_for_the_same_seed(digits):
    few = few_label_accuracy(*digits, labels_per_class=5, draws=3)
    assert 0.6 < few < probes.linear_accuracy(*digits) - 0.05
    assert few == few_label_accuracy(*digits, labels_per_class=5, draws=3)
    assert few != few_label_accuracy(*digits, labels_per_class=5, draws=3, seed=1)


def test_few_labels_use_only_those_labels(digits):
    train, held_out = digits
    seen = []
    original = probes._logistic_regression
    probes._logistic_regression = lambda part: seen.append(part.labels) or original(part)
    try:
        few_label_accuracy(train, held_out, labels_per_class=3, draws=2)
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
    votes = probes.knn_votes(bank, queries, k=20, temperature=0.5)  # more than one device holds
    a, b = (x.features / np.linalg.norm(x.features, axis=1, keepdims=True) for x in (queries, bank))
    expected = np.zeros((5, 10))
    for row, similarities in zip(expected, a @ b.T):
        for neighbour in np.argsort(-similarities)[:20]:
            row[bank.labels[neighbour]] += np.exp((similarities[neighbour] - 1) / 0.5)
    np.testing.assert_allclose(votes, expected, rtol=1e-4, atol=1e-6)


def objective(weights, examples, l2):
    log_probabilities = log_softmax(probes.predict(weights, examples.features), axis=1)
    losses = -log_probabilities[np.arange(len(examples.labels)), examples.labels]
    return losses.sum() + 0.5 * l2 * (weights[:-1] ** 2).sum()


@pytest.mark.parametrize("l2", [1e-3, 1.0, 1e3])
def test_logistic_regression_is_that_of_scikit_learn(digits, l2):
    train, held_out = digits
    train = Features(train.features / 16, train.labels)
    expected = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-8).fit(*train)
    [weights] = probes.logistic_regressions(train, 10, [l2])
    best = objective(np.vstack([expected.coef_.T, expected.intercept_]), train, l2)
    assert objective(weights, train, l2) == pytest.approx(best, rel=1e-3, abs=1e-4 * len(train.labels))
    predictions = probes.predict(weights, held_out.features / 16).argmax(axis=1)
    assert (predictions == expected.predict(held_out.features / 16)).mean() > 0.99


@pytest.mark.parametrize("l2", [1e-2, 1.0, 1e2])
def test_two_classes_have_weights_of_the_least_objective_too(digits, l2):
    rows = digits[0].labels < 2
    train = Features(digits[0].features[rows] / 16, digits[0].labels[rows])
    [weights] = probes.logistic_regressions(train, 2, [l2])
    assert weights.shape == (65, 2)
    least = objective(weights, train, l2)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert objective(weights * factor, train, l2) > least
        assert objective(weights * [[1.0, factor]], train, l2) > least


def test_logistic_regression_from_a_neighbour_ends_at_the_same_place(digits):
    train = Features(digits[0].features / 16, digits[0].labels)
    [direct] = probes.logistic_regressions(train, 10, [1.0])
    strong, by_steps = probes.logistic_regressions(train, 10, [10.0, 1.0])
    np.testing.assert_allclose(by_steps, direct, atol=0.05)
    assert np.abs(strong - direct).max() > 0.5


@pytest.mark.parametrize("present", [[], [2], [0, 3], [0, 2, 3]])
def test_classes_without_examples_are_never_predicted(digits, present):
    rows = np.isin(digits[0].labels, present)
    train = Features(digits[0].features[rows] / 16, digits[0].labels[rows])
    for weights in probes.logistic_regressions(train, 5, [10.0, 1e-4]):
        assert weights.shape == (65, 5) and np.isfinite(weights).all()
        predictions = probes.predict(weights, digits[1].features / 16).argmax(axis=1)
        assert set(predictions) == set(present) or not present


def test_knn_weighs_near_neighbours_more():
    bank = Features(np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32), np.array([0, 1, 1]))
    query = Features(np.array([[1, 0.05]], np.float32), np.array([0]))
    assert probes.knn_accuracy(bank, query, k=3, temperature=0.07) == 1
    assert probes.knn_accuracy(bank, query, k=3, temperature=100) == 0


def compiled(caplog, function):
    """How many programs JAX compiles in `function`."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function()
    return sum(record.getMessage().startswith("Compiling ") for record in caplog.records)


def test_votes_are_compiled_once_for_a_shape(digits, caplog):
    bank, queries = digits[0], Features(digits[1].features[:77], digits[1].labels[:77])

    def vote(temperature=0.07, shift=0):
        bank_ = Features(bank.features + shift, bank.labels)
        return lambda: probes.knn_votes(bank_, queries, k=7, temperature=temperature, max_elements=5000)

    jax.clear_caches()
    assert compiled(caplog, vote()) > 0
    assert compiled(caplog, vote()) == compiled(caplog, vote(0.5)) == compiled(caplog, vote(shift=1)) == 0


def rows(count, width=6, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def scores(train, held_out):
    return (
        probes.knn_accuracy(train, held_out),
        probes.linear_accuracy(train, held_out),
        few_label_accuracy(train, held_out, labels_per_class=5, draws=2),
    )


ODD = {
    "one class": ([3] * 30, [3] * 6 + [1] * 2, 0.75),
    "one image a class": ([0, 1, 2], [0, 1, 2, 0], None),
    "one image": ([4], [4, 0], 0.5),
    "a class that training lacks": ([0] * 9 + [1] * 9, [7] * 5, 0),
    "classes far apart": ([0] * 9 + [900] * 9, [0, 900], None),
    "two classes of unlike size": ([0] * 29 + [1], [0, 0, 0, 1], None),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("kind", ["noise", "constant", "zeros", "one constant", "large"])
def test_odd_labels_and_features_are_scored_without_a_warning(case, kind):
    labels, held_out_labels, expected = ODD[case]
    train, held_out = rows(len(labels)), rows(len(held_out_labels), seed=1)
    for part in (train, held_out):
        if kind == "one constant":
            part[:, 2] = 0.1
        elif kind != "noise":
            part[:] = {"constant": np.float32(0.1), "zeros": 0, "large": part * 1e8}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = scores(
            Features(train, np.array(labels, np.int32)),
            Features(held_out, np.array(held_out_labels, np.int32)),
        )
    assert all(0 <= score <= 1 for score in actual)
    assert expected is None or actual == (expected,) * 3


def test_two_classes_are_told_apart_also_with_fewer_images_than_dimensions():
    for count, width in ((40, 8), (12, 64)):
        labels = (np.arange(count) % 2).astype(np.int32)
        features = rows(count, width) + 3 * labels[:, None]
        held_out = Features(rows(count, width, seed=1) + 3 * labels[:, None], labels)
        assert min(scores(Features(features, labels), held_out)) > 0.9


def test_fewer_images_than_dimensions_give_the_same_classifier(digits):
    train = Features(digits[0].features[:30] / 16, digits[0].labels[:30])
    classes, weights = probes._logistic_regression(train)
    model = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(*train)
    np.testing.assert_array_equal(classes, model.classes_)
    expected = model.decision_function(digits[1].features / 16)
    logits = probes.predict(weights, digits[1].features / 16)
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())


def test_regressions_keep_to_one_thread_iterations_and_products(digits, monkeypatch):
    seen = []
    original = probes._logistic_regression

    def watched(part):
        threads = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        seen.append((len(part.labels), max(threads)))
        return original(part)

    monkeypatch.setattr(probes, "_logistic_regression", watched)
    monkeypatch.setattr(probes, "ITERATIONS", 1)
    monkeypatch.setattr(probes, "PRODUCTS", 100 * 64 * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one iteration does not converge
        probes.linear_accuracy(*digits)
        few_label_accuracy(*digits, labels_per_class=3)
        few_label_accuracy(*digits, labels_per_class=50)
    assert seen == [(100, 1)] + [(30, 1)] * 3 + [(500, 1)]


def test_images_without_a_label_are_left_out():
    labelled = probes.labelled(Features(rows(4), np.array([1, -1, 0, -1])))
    np.testing.assert_array_equal(labelled.features, rows(4)[[0, 2]])
    np.testing.assert_array_equal(labelled.labels, [1, 0])


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        ([0] * 20 + [1] * 20, [0, 1], []),
        ([0] * 20, [0, 1], ["of one class", "1 of 2 held-out images"]),
        (
            [0] * 20 + [1] * 4 + [2],
            [0, 1],
            ["2 of 3 classes have fewer training images than labels_per_class=5"],
        ),
        ([0] * 5 + [1] * 5, [0, 5, 6], ["2 of 3 held-out images", "all 10 training images vote"]),
    ],
)
def test_notes_say_what_is_left_out(train, held_out, expected):
    notes = probes.notes(np.array(train), np.array(held_out), labels_per_class=5)
    assert len(notes) == len(expected) and all(part in note for part, note in zip(expected, notes))


@pytest.mark.parametrize("counts", [[10, 10, 10], [1, 2, 7], [3, 2], [1, 1], [1, 1, 2]])
def test_folds_share_out_every_class_but_those_of_one_image(counts):
    labels = np.repeat(np.arange(len(counts)), counts)[np.random.default_rng(0).permutation(sum(counts))]
    parts = probes.folds(labels)
    counts = np.array(counts)
    assert len(parts) == (min(5, max(counts)) if max(counts) > 1 else 0)
    tested = np.concatenate([tested for _, tested in parts]) if parts else []
    assert sorted(tested) == np.flatnonzero(counts[labels] > 1).tolist()
    for learnt, tested in parts:
        assert not set(learnt) & set(tested) and len(learnt) + len(tested) == len(labels)
        assert set(labels[learnt]) == set(labels)
        shares = np.bincount(labels[tested], minlength=len(counts))
        assert (abs(shares - np.where(counts > 1, counts, 0) / len(parts)) < 1).all()


def test_cross_validation_counts_every_image_once():
    labels = np.repeat([0, 1], [9, 5])
    examples = Features(np.arange(14.0)[:, None], labels)

    def score(train, held_out):
        assert not set(train.features[:, 0]) & set(held_out.features[:, 0])
        return float(np.mean(held_out.labels == 1))

    assert probes.cross_validated(score, examples) == pytest.approx(5 / 14)
