"""How good frozen features are: linear, few-label and nearest-neighbour accuracy on held-out images.

What they cost is bounded. 50,000 training and 50,000 held-out images of 3,072 dimensions and 10 classes, the
most that pretraining asks for, took 375 CPU seconds, 300 of them for the neighbours, and 3.2 GiB with the
features themselves (2 CPU cores, 2026-11-25). `ITERATIONS` and `PRODUCTS` bound it for more classes.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from simclr_jax import parallel
from simclr_jax.evaluation.features import Features

ITERATIONS = 100  # of L-BFGS: held-out accuracy settles long before the loss does
# Training images x dimensions x classes, what a logistic regression goes through once an iteration: beyond it
# fewer images are taken, or fewer draws. 50,000 images, 2,048 dimensions and 300 classes are below it.
PRODUCTS = 2**35
FOLDS = 5  # of a cross-validation, as is usual: every classifier learns from four fifths
_CHUNK = 4096  # held-out images that are standardised at a time


def labelled(examples: Features) -> Features:
    """Those whose label is known, not -1."""
    known = examples.labels >= 0
    return examples if known.all() else Features(examples.features[known], examples.labels[known])


def notes(train: np.ndarray, held_out: np.ndarray, *, labels_per_class: int, k: int = 20) -> list[str]:
    """What the scores of these labels, [n] and [m], leave out, in words."""
    classes, counts = np.unique(train, return_counts=True)
    few, unseen = int((counts < labels_per_class).sum()), int((~np.isin(held_out, classes)).sum())
    said = {
        "all training images are of one class: scores are its share of the held-out images": len(classes)
        == 1,
        f"{few} of {len(classes)} classes have fewer training images than labels_per_class="
        f"{labels_per_class}: the few-label score takes those that there are": few,
        f"{unseen} of {len(held_out)} held-out images are of classes without training images: they count as "
        "wrong": unseen,
        f"all {len(train)} training images vote as nearest neighbours, fewer than {k}": len(train) < k,
    }
    return [note for note, holds in said.items() if holds]


def linear_accuracy(train: Features, held_out: Features) -> float:
    """Top-1 accuracy on `held_out` of multinomial logistic regression trained on `train`, L2 weight 1.

    Features are scaled by their deviation in `train`. Of more images than `PRODUCTS` allow, random ones are
    learnt from. A class that `train` lacks is never predicted; if it has but one, that is the prediction.
    """
    scale = _scale(train.features)
    count = max(1, PRODUCTS // (train.features.shape[1] * _num_classes(train)))
    rows = np.random.default_rng(0).permutation(len(train.labels))[:count]
    [accuracy] = _accuracies(train, [rows] if count < len(train.labels) else [slice(None)], held_out, scale)
    return accuracy


def few_label_accuracy(train: Features, held_out: Features, **options) -> float:
    """The mean of `few_label_accuracies`."""
    return float(np.mean(few_label_accuracies(train, held_out, **options)))


def few_label_accuracies(
    train: Features, held_out: Features, *, labels_per_class: int, draws: int = 20, seed: int = 0
) -> list[float]:
    """The linear accuracy with `labels_per_class` random labels of each class, of each of `draws`.

    The scale of each feature comes from all of `train`, whose labels it does not need. A class with fewer
    images gives all of them. There are fewer draws, one at least, where all are more than `PRODUCTS` allow.
    """
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(train.labels == label) for label in np.unique(train.labels)]
    count = sum(min(len(members), labels_per_class) for members in by_class)
    draws = min(draws, max(1, PRODUCTS // (count * train.features.shape[1] * _num_classes(train))))
    drawn = (
        np.concatenate([rng.permutation(members)[:labels_per_class] for members in by_class])
        for _ in range(draws)
    )
    return _accuracies(train, drawn, held_out, _scale(train.features))


def folds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows to test, of every fold of a cross-validation, [n] labels being given.

    There are up to `FOLDS`, and each has its share of every class. Of a class with one label that label is
    tested by what has not seen its class.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    count = min(FOLDS, int(np.bincount(labels).max()))
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % count
    return [(np.flatnonzero(fold != part), np.flatnonzero(fold == part)) for part in range(count)]


def cross_validated(score: Callable[[Features, Features], np.ndarray], examples: Features) -> np.ndarray:
    """The mean over the folds of what `score(train, held_out)` makes of them, each image counting once."""
    parts = folds(examples.labels)
    scores = [score(*(Features(*(of[rows] for of in examples)) for rows in pair)) for pair in parts]
    return np.average(scores, axis=0, weights=[len(tested) for _, tested in parts])


def knn_accuracy(train: Features, held_out: Features, *, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 accuracy of `knn_votes`."""
    votes = knn_votes(train, held_out, k=k, temperature=temperature)
    return float((votes.argmax(axis=1) == held_out.labels).mean())


def knn_votes(
    train: Features, queries: Features, *, k: int, temperature: float, max_elements: int = 2**26
) -> np.ndarray:
    """Votes of the k nearest of `train` for every class (Wu et al. 2018, section 3.4), float32 [n, classes].

    Neighbours are near by cosine similarity s and vote with weight exp((s - 1) / temperature). Every device
    holds its share of `train` and finds its own k nearest, of which the k nearest of all are voters. It is
    compiled once for the shapes of `train` and `queries`, however often they are evaluated.

    Args:
      train, queries: the same on every process.
      k: number of neighbours; of fewer images all vote.
      temperature: a positive float.
      max_elements: similarities that a device holds at a time; sets how many queries go at once.
    """
    classes = max(map(_num_classes, (train, queries)))
    bank = _shard_bank(Features(_normalize(train.features), train.labels))
    count = len(queries.labels)
    chunk = max(1, min(max_elements // bank["label"].shape[1], count))
    chunk = -(-count // -(-count // chunk))  # as few as before, but of one size
    vote = _make_vote(min(k, len(train.labels)), classes)
    votes = []
    for start in range(0, count, chunk):
        part = _normalize(queries.features[start : start + chunk])
        part = np.pad(part, ((0, chunk - len(part)), (0, 0)))
        votes.append(vote({"queries": part, "temperature": np.float32(temperature)}, bank))
    return np.concatenate(votes)[:count]


@functools.cache  # or every evaluation would compile it again
def _make_vote(k, classes):
    def vote(state, bank):
        queries = state["queries"]
        similarities = jnp.matmul(queries, bank["features"].T, precision=jax.lax.Precision.HIGHEST)
        similarities = jnp.where(bank["label"] < 0, -jnp.inf, similarities)
        near, neighbours = jax.lax.top_k(similarities, min(k, len(bank["label"])))
        everywhere = jax.lax.all_gather((near, bank["label"][neighbours]), parallel.AXIS, axis=1, tiled=True)
        near, chosen = jax.lax.top_k(everywhere[0], k)
        labels = jnp.take_along_axis(everywhere[1], chosen, axis=1)
        weights = jnp.exp((near - 1) / state["temperature"])
        votes = jnp.zeros((len(queries), classes), weights.dtype)
        return votes.at[jnp.arange(len(queries))[:, None], labels].add(weights)

    return parallel.pmap(vote)


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

    def fit(l2: float, start: np.ndarray | None = None) -> np.ndarray:
        def objective(flat):
            weights = flat.reshape(shape)
            value, gradient = jax.device_get(_make_sums()(weights.astype(np.float32), share))
            kernel = np.concatenate([weights[:-1], np.zeros((1, classes))])
            value = value + 0.5 * l2 * (kernel**2).sum()
            return value / count, (gradient + l2 * kernel).ravel() / count

        start = np.zeros(shape) if start is None else start
        options = {"maxiter": 1000, "maxcor": 20}
        found = optimize.minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
        return found.x.reshape(shape)

    return fit


@functools.cache  # compiled once for a shape, not for every regression
def _make_sums():
    """Builds `sums(weights, share)`: the cross entropy over all devices' shares, and its gradient."""

    def sums(weights, share):
        def loss(weights):
            logits = jnp.matmul(share["features"], weights[:-1], precision=jax.lax.Precision.HIGHEST)
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits + weights[-1], jnp.maximum(share["label"], 0)
            )
            return jnp.where(share["label"] < 0, 0, each).sum()

        return jax.lax.psum(jax.value_and_grad(loss)(weights), parallel.AXIS)

    return parallel.pmap(sums)


def predict(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Logits [n, classes] of `make_logistic_regression`'s weights, in the precision of the features."""
    weights = weights.astype(features.dtype)
    return features @ weights[:-1] + weights[-1]


def _accuracies(train, selections, held_out, scale):
    """Of logistic regressions on each of these rows of `train`; `held_out` is standardised once, by parts."""
    from threadpoolctl import threadpool_limits

    # More of them wait for one another, and for the threads of JAX and TensorFlow, longer than they compute.
    with threadpool_limits(1, user_api="blas"):
        fitted = []
        for rows in selections:
            chosen = Features(_standardize(train.features[rows], scale), train.labels[rows])
            fitted.append(_logistic_regression(chosen))
        correct = np.zeros(len(fitted))
        for start in range(0, len(held_out.labels), _CHUNK):
            features = _standardize(held_out.features[start : start + _CHUNK], scale)
            labels = held_out.labels[start : start + _CHUNK]
            for index, (classes, weights) in enumerate(fitted):
                predicted = classes[predict(weights, features).argmax(axis=1)]
                correct[index] += (predicted == labels).sum()
    return (correct / len(held_out.labels)).tolist()


def _logistic_regression(train):
    """The classes of `train`, [c], and the weights that tell them apart, [w + 1, c]; see `predict`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features, labels = train
    classes = np.unique(labels)
    if len(classes) == 1:
        return classes, np.zeros((features.shape[1] + 1, 1))
    basis = None
    if 2 * len(labels) <= features.shape[1]:  # weights lie in the span of the examples: as good, and faster
        basis, triangle = np.linalg.qr(features.T)
        features = np.ascontiguousarray(triangle.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ITERATIONS are what they may cost
        model = LogisticRegression(C=1.0, max_iter=ITERATIONS).fit(features, labels)
    kernel = model.coef_.T if basis is None else basis @ model.coef_.T
    weights = np.concatenate([kernel, model.intercept_[None]])
    return classes, weights if len(classes) > 2 else np.concatenate([-weights, weights], axis=1)


def _shard_bank(train):
    """Rows over all devices: 'features' [local devices, rows, w] and 'label', -1 where a row is padding."""
    processes, devices = jax.process_count(), jax.local_device_count()
    rows = -(-len(train.labels) // (processes * devices))
    first = jax.process_index() * devices * rows
    features, labels = (x[first : first + devices * rows] for x in train)
    features = features.astype(np.float32, copy=False)
    if missing := devices * rows - len(labels):
        features = np.pad(features, ((0, missing), (0, 0)))
        labels = np.pad(labels, (0, missing), constant_values=-1)
    return parallel.shard({"features": features, "label": labels.astype(np.int32, copy=False)})


def _num_classes(examples):
    return int(examples.labels.max()) + 1


def _scale(features, columns=256):
    """Mean and deviation of each feature, 1 for a constant one; some columns at a time, to copy little."""
    parts = (features[:, start : start + columns] for start in range(0, features.shape[1], columns))
    moments = ((part.mean(axis=0, dtype=np.float64), part.std(axis=0, dtype=np.float64)) for part in parts)
    mean, deviation = map(np.concatenate, zip(*moments))
    deviation = np.where(deviation < 1e-6 * np.maximum(1, np.abs(mean)), 1, deviation)
    return mean.astype(np.float32), deviation.astype(np.float32)


def _standardize(features, scale):
    mean, deviation = scale
    features = features - mean
    features /= deviation
    return features


def _normalize(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
