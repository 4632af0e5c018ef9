"""How good frozen features are: linear, few-label and nearest-neighbour accuracy on held-out images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Features(NamedTuple):
    """Features float32 [n, w] of n examples and their labels int32 [n]."""

    features: np.ndarray
    labels: np.ndarray


def linear_accuracy(train: Features, held_out: Features) -> float:
    """Top-1 accuracy on `held_out` of multinomial logistic regression trained on `train`."""
    train, held_out = _standardize(train, held_out)
    return _logistic_regression(train).score(*held_out)


def few_label_accuracy(
    train: Features, held_out: Features, *, labels_per_class: int, draws: int = 20, seed: int = 0
) -> float:
    """Mean over `draws` of the linear accuracy with `labels_per_class` random labels of each class.

    The scale of each feature comes from all of `train`, whose labels it does not need.
    """
    train, held_out = _standardize(train, held_out)
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(train.labels == label) for label in np.unique(train.labels)]
    scores = []
    for _ in range(draws):
        rows = np.concatenate([rng.permutation(members)[:labels_per_class] for members in by_class])
        labelled = Features(train.features[rows], train.labels[rows])
        scores.append(_logistic_regression(labelled).score(*held_out))
    return float(np.mean(scores))


def knn_accuracy(
    train: Features, held_out: Features, *, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> float:
    """Top-1 accuracy of the vote of the k nearest of `train` (Wu et al. 2018, section 3.4).

    Neighbours are near by cosine similarity s and vote with weight exp(s / temperature). Memory is that of
    `chunk` x n similarities.
    """
    classes = int(max(train.labels.max(), held_out.labels.max())) + 1
    k = min(k, len(train.labels))
    bank = jnp.asarray(_normalize(train.features))
    votes_of = jax.nn.one_hot(train.labels, classes)

    @jax.jit
    def predict(queries):
        similarities, neighbours = jax.lax.top_k(queries @ bank.T, k)
        weights = jnp.exp((similarities - 1) / temperature)
        return (weights[..., None] * votes_of[neighbours]).sum(axis=1).argmax(axis=1)

    queries = _normalize(held_out.features)
    predictions = [predict(queries[start : start + chunk]) for start in range(0, len(queries), chunk)]
    return float((np.concatenate(predictions) == held_out.labels).mean())


def _standardize(train, held_out):
    mean, deviation = train.features.mean(axis=0), train.features.std(axis=0)
    deviation = np.where(deviation < 1e-6, 1, deviation)
    return tuple(Features((x.features - mean) / deviation, x.labels) for x in (train, held_out))


def _logistic_regression(train):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1.0, max_iter=500).fit(*train)


def _normalize(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
