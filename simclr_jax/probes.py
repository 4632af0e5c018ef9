"""How good frozen features are: linear, few-label and nearest-neighbour accuracy on held-out images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from simclr_jax import parallel


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


def knn_accuracy(train: Features, held_out: Features, *, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 accuracy of `knn_votes`."""
    votes = knn_votes(train, held_out, k=k, temperature=temperature)
    return float((votes.argmax(axis=1) == held_out.labels).mean())


def knn_votes(
    train: Features, queries: Features, *, k: int, temperature: float, max_elements: int = 2**26
) -> np.ndarray:
    """Votes of the k nearest of `train` for every class (Wu et al. 2018, section 3.4), float32 [n, classes].

    Neighbours are near by cosine similarity s and vote with weight exp((s - 1) / temperature). Every device
    holds its share of `train` and finds its own k nearest, of which the k nearest of all are voters.

    Args:
      train, queries: the same on every process.
      k: number of neighbours, at most n.
      temperature: a positive float.
      max_elements: similarities that a device holds at a time; sets how many queries go at once.
    """
    classes = int(max(train.labels.max(), queries.labels.max())) + 1
    k = min(k, len(train.labels))
    bank = _shard_bank(Features(_normalize(train.features), train.labels))
    rows = bank["label"].shape[1]

    @parallel.pmap
    def vote(queries, bank):
        similarities = jnp.matmul(queries, bank["features"].T, precision=jax.lax.Precision.HIGHEST)
        similarities = jnp.where(bank["label"] < 0, -jnp.inf, similarities)
        near, neighbours = jax.lax.top_k(similarities, min(k, rows))
        everywhere = jax.lax.all_gather((near, bank["label"][neighbours]), parallel.AXIS, axis=1, tiled=True)
        near, chosen = jax.lax.top_k(everywhere[0], k)
        labels = jnp.take_along_axis(everywhere[1], chosen, axis=1)
        weights = jnp.exp((near - 1) / temperature)
        return jnp.zeros((len(queries), classes)).at[jnp.arange(len(queries))[:, None], labels].add(weights)

    chunk = max(1, min(max_elements // rows, len(queries.labels)))
    chunks = [queries.features[start : start + chunk] for start in range(0, len(queries.labels), chunk)]
    return np.concatenate([vote(_normalize(part), bank) for part in chunks])


def make_logistic_regression(train: Features, classes: int):
    """Builds `fit(l2, start=None) -> weights`: multinomial logistic regression by L-BFGS, on all devices.

    It minimises the sum of cross entropies plus l2 / 2 times the sum of squared weights, biases excluded,
    which is scikit-learn's for C = 1 / l2 (protocol of v1 appendix B.8.1). `start` is the result for another
    `l2`, from which a neighbouring one takes fewer steps. Weights are float64 [w + 1, classes], the last row
    the biases; `predict` applies them.

    Args:
      train: the same on every process; every device evaluates the loss of its share.
      classes: number of classes.
    """
    count = len(train.labels)
    shape = train.features.shape[1] + 1, classes
    share = _shard_bank(train)

    @parallel.pmap
    def sums(weights, share):
        def loss(weights):
            logits = jnp.matmul(share["features"], weights[:-1], precision=jax.lax.Precision.HIGHEST)
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits + weights[-1], jnp.maximum(share["label"], 0)
            )
            return jnp.where(share["label"] < 0, 0, each).sum()

        return jax.lax.psum(jax.value_and_grad(loss)(weights), parallel.AXIS)

    def fit(l2: float, start: np.ndarray | None = None) -> np.ndarray:
        def objective(flat):
            weights = flat.reshape(shape)
            value, gradient = jax.device_get(sums(weights.astype(np.float32), share))
            kernel = np.concatenate([weights[:-1], np.zeros((1, classes))])
            value = value + 0.5 * l2 * (kernel**2).sum()
            return value / count, (gradient + l2 * kernel).ravel() / count

        start = np.zeros(shape) if start is None else start
        options = {"maxiter": 1000, "maxcor": 20}
        found = optimize.minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
        return found.x.reshape(shape)

    return fit


def predict(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Logits [n, classes] of `make_logistic_regression`'s weights."""
    return features @ weights[:-1] + weights[-1]


def _shard_bank(train):
    """Rows over all devices: 'features' [local devices, rows, w] and 'label', -1 where a row is padding."""
    processes, devices = jax.process_count(), jax.local_device_count()
    rows = -(-len(train.labels) // (processes * devices))
    first = jax.process_index() * devices * rows
    features, labels = (x[first : first + devices * rows] for x in train)
    missing = devices * rows - len(labels)
    return parallel.shard(
        {
            "features": np.pad(features, ((0, missing), (0, 0))),
            "label": np.pad(labels, (0, missing), constant_values=-1),
        }
    )


def _standardize(train, held_out):
    mean, deviation = train.features.mean(axis=0), train.features.std(axis=0)
    deviation = np.where(deviation < 1e-6, 1, deviation)
    return tuple(Features((x.features - mean) / deviation, x.labels) for x in (train, held_out))


def _logistic_regression(train):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1.0, max_iter=500).fit(*train)


def _normalize(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
