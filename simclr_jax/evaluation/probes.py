"""Probes of frozen features: linear, few-label and nearest-neighbour accuracy on held-out images.

The cost is bounded. 50,000 training and 50,000 held-out images with 3,072 dimensions and 10 classes, the most
that pretraining asks for, took 375 CPU seconds, 300 of them for the neighbours, and 3.2 GiB with the features
themselves (2 CPU cores, 2026-11-25). `ITERATIONS` and `PRODUCTS` bound it for more classes.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import parallel
from simclr_jax.evaluation.features import Features, unit_rows

ITERATIONS = 100  # Iterations of L-BFGS: held-out accuracy settles long before the loss does.
# Training images x dimensions x classes, the multiplications of an iteration of a logistic regression. Beyond
# it fewer images or fewer draws are taken. 50,000 images, 2,048 dimensions and 300 classes are below it.
PRODUCTS = 2**35
FOLDS = 5  # Folds of a cross-validation: every classifier learns from four fifths.
_CHUNK = 4096  # Held-out images that are standardised at a time.
# Bias of a class without training images: its probability is below 1e-6, yet its cross entropy is finite.
_ABSENT = -15.0


def labelled(examples: Features) -> Features:
    """Returns the examples with a label, which is -1 where there is none."""
    has_label = examples.labels >= 0
    return examples if has_label.all() else rows_of(examples, has_label)


def rows_of(examples: Features, rows) -> Features:
    """Returns the examples of these rows."""
    return Features(examples.features[rows], examples.labels[rows])


def notes(train: np.ndarray, held_out: np.ndarray, *, labels_per_class: int, k: int = 20) -> list[str]:
    """Returns sentences on what the scores with these labels, [n] and [m], leave out."""
    classes, counts = np.unique(train, return_counts=True)
    few, unseen = int((counts < labels_per_class).sum()), int((~np.isin(held_out, classes)).sum())
    conditions = {
        "all training images are of one class: scores are its share of the held-out images": len(classes)
        == 1,
        f"{few} of {len(classes)} classes have fewer training images than labels_per_class="
        f"{labels_per_class}: the few-label score takes those that there are": few,
        f"{unseen} of {len(held_out)} held-out images are of classes without training images: they count as "
        "wrong": unseen,
        f"all {len(train)} training images vote as nearest neighbours, fewer than {k}": len(train) < k,
    }
    return [note for note, holds in conditions.items() if holds]


def linear_accuracy(train: Features, held_out: Features) -> float:
    """Returns the top-1 accuracy on `held_out` of logistic regression trained on `train`, L2 weight 1.

    Features are scaled by their deviation in `train`. Where there are more images than `PRODUCTS` allow, it
    learns from random ones. A class that `train` lacks is never predicted.
    """
    count = max(1, PRODUCTS // (train.features.shape[1] * _num_classes(train)))
    rows = slice(None)
    if count < len(train.labels):
        rows = np.random.default_rng(0).permutation(len(train.labels))[:count]
    [accuracy] = _accuracies(train, [rows], held_out)
    return accuracy


def probabilities(train: Features, features: np.ndarray) -> np.ndarray:
    """Returns the probabilities, [n, classes in `train`], of logistic regression on `train`, L2 weight 1.

    Features are scaled by their deviation in `features`, [n, w], which need not be copied for it.
    """
    from scipy.special import softmax

    mean, deviation = scale = _scale(features)
    with _fitting():
        _, weights = _logistic_regression(Features(_standardize(train.features, scale), train.labels))
    scaled = weights[:-1] / deviation[:, None]
    return softmax(predict(np.vstack([scaled, weights[-1] - mean @ scaled]), features), axis=1)


def few_label_accuracies(
    train: Features, held_out: Features, *, labels_per_class: int, draws: int = 20, seed: int = 0
) -> list[float]:
    """Returns the linear accuracy of each draw of `labels_per_class` random labels of every class.

    The scale of each feature comes from all of `train`, whose labels it does not need. A class with fewer
    images gives all of them. Where all draws are more than `PRODUCTS` allow, there are fewer, one at least.
    """
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(train.labels == label) for label in np.unique(train.labels)]
    count = sum(min(len(members), labels_per_class) for members in by_class)
    draws = min(draws, max(1, PRODUCTS // (count * train.features.shape[1] * _num_classes(train))))
    drawn = (
        np.concatenate([rng.permutation(members)[:labels_per_class] for members in by_class])
        for _ in range(draws)
    )
    return _accuracies(train, drawn, held_out)


def assign_folds(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Returns the fold of each example, int [n] below `count`; each fold has its share of every class.

    The only example of a class is in no fold, -1: without it, no classifier would know its class.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    order = order[np.bincount(labels)[labels[order]] > 1]
    fold = np.full(len(labels), -1)
    fold[order] = np.arange(len(order)) % count
    return fold


def folds(labels: np.ndarray, groups: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the rows to train on and the rows to test on, for every fold of a cross-validation.

    There are up to `FOLDS`, and each tests its share of every class. The only label of a class is trained on
    in all of them. Where no class has two labels, there are no folds.

    Args:
      labels: int [n].
      groups: [n], which no fold divides; None: each example is by itself.
    """
    count = min(FOLDS, int(np.bincount(labels).max()), len(labels if groups is None else set(groups)))
    if count < 2:
        return []
    if groups is not None:
        from sklearn.model_selection import StratifiedGroupKFold

        with warnings.catch_warnings():
            # A class may have fewer examples than there are folds.
            warnings.simplefilter("ignore", UserWarning)
            return list(StratifiedGroupKFold(count).split(labels, labels, groups))
    fold = assign_folds(labels, count)
    return [(np.flatnonzero(fold != part), np.flatnonzero(fold == part)) for part in range(count)]


def cross_validated(
    score: Callable[[Features, Features], np.ndarray], examples: Features, groups: np.ndarray | None = None
) -> np.ndarray:
    """Returns the mean over the folds of `score(train, held_out)`, in which each image counts once."""
    parts = folds(examples.labels, groups)
    scores = [score(rows_of(examples, train), rows_of(examples, tested)) for train, tested in parts]
    return np.average(scores, axis=0, weights=[len(tested) for _, tested in parts])


def average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, [classes], NaN without images; both are [n, classes]."""
    from sklearn.metrics import average_precision_score

    columns = zip(targets.T, scores.T)
    return np.array([average_precision_score(*pair) if pair[0].any() else np.nan for pair in columns])


def knn_accuracy(train: Features, held_out: Features, *, k: int = 20, temperature: float = 0.07) -> float:
    """Returns the top-1 accuracy of `knn_votes`."""
    votes = knn_votes(train, held_out, k=k, temperature=temperature)
    return float((votes.argmax(axis=1) == held_out.labels).mean())


def knn_votes(
    train: Features, queries: Features, *, k: int, temperature: float, max_elements: int = 2**26
) -> np.ndarray:
    """Lets the k nearest neighbours in `train` vote for their classes (Wu et al. 2018, section 3.4).

    Neighbours with cosine similarity s vote with weight exp((s - 1) / temperature). Every device holds its
    share of `train` and finds its own k nearest, from which the k nearest of all are taken. It is compiled
    once for the shapes of `train` and `queries`.

    Args:
      train, queries: the same on every process.
      k: number of neighbours; fewer images all vote.
      temperature: a positive float.
      max_elements: similarities that a device holds at a time, which limits the queries of a call.

    Returns:
      The votes of every query, float32 [n, classes].
    """
    classes = max(map(_num_classes, (train, queries)))
    bank = _shard_bank(Features(unit_rows(train.features), train.labels))
    count = len(queries.labels)
    chunk = max(1, min(max_elements // bank["label"].shape[1], count))
    chunk = -(-count // -(-count // chunk))  # The same number of chunks, of one size.
    vote = _make_vote(min(k, len(train.labels)), classes)
    votes = []
    for start in range(0, count, chunk):
        part = unit_rows(queries.features[start : start + chunk])
        part = np.pad(part, ((0, chunk - len(part)), (0, 0)))
        votes.append(vote({"queries": part, "temperature": np.float32(temperature)}, bank))
    return np.concatenate(votes)[:count]


@functools.cache  # Otherwise every evaluation would compile it again.
def _make_vote(k, classes):
    def vote(state, bank):
        queries = state["queries"]
        similarities = jnp.matmul(queries, bank["features"].T, precision=jax.lax.Precision.HIGHEST)
        similarities = jnp.where(bank["label"] < 0, -jnp.inf, similarities)
        near, neighbours = jax.lax.top_k(similarities, min(k, len(bank["label"])))
        gathered = jax.lax.all_gather((near, bank["label"][neighbours]), parallel.AXIS, axis=1, tiled=True)
        near, chosen = jax.lax.top_k(gathered[0], k)
        labels = jnp.take_along_axis(gathered[1], chosen, axis=1)
        weights = jnp.exp((near - 1) / state["temperature"])
        votes = jnp.zeros((len(queries), classes), weights.dtype)
        return votes.at[jnp.arange(len(queries))[:, None], labels].add(weights)

    return parallel.pmap(vote)


def logistic_regressions(
    train: Features, classes: int, l2_weights: Iterable[float], class_weights: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yields the weights of multinomial logistic regression for each L2 weight.

    They minimise the sum of cross entropies plus l2 / 2 times the sum of squared weights, biases excluded
    (protocol of v1 appendix B.8.1). Each fit starts from the one before: neighbouring L2 weights take few
    iterations.

    Args:
      train: features and labels; a class without examples is never predicted.
      classes: number of classes.
      l2_weights: positive floats, best from strong to weak.
      class_weights: [classes], by which the cross entropy of an example is multiplied; None: by 1.

    Yields:
      Weights float64 [w + 1, classes] for `predict`, the last row the biases.
    """
    from sklearn.linear_model import LogisticRegression

    # In 32 bits the last iterations are lost in rounding.
    train = Features(train.features.astype(np.float64), train.labels)
    model = LogisticRegression(max_iter=1000, tol=1e-6, warm_start=True)
    # With two classes scikit-learn fits their difference, whose penalty is half that of both.
    penalty = 2 if len(np.unique(train.labels)) == 2 else 1
    for l2 in l2_weights:
        with _fitting():
            sample_weight = None if class_weights is None else class_weights[train.labels]
            present, fitted = _fit(model.set_params(C=penalty / l2), train, sample_weight)
        weights = np.zeros((len(fitted), classes))
        weights[-1] = _ABSENT
        weights[:, present] = fitted
        yield weights


def predict(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Returns the logits [n, classes] of weights [w + 1, classes], in the precision of the features."""
    weights = weights.astype(features.dtype)
    return features @ weights[:-1] + weights[-1]


def _accuracies(train, selections, held_out):
    """The accuracies of logistic regressions on each selection of rows of `train`, whose scale all share.

    `held_out` is standardised once, in chunks.
    """
    scale = _scale(train.features)
    with _fitting():
        fitted = []
        for rows in selections:
            features = _standardize(train.features[rows], scale)
            fitted.append(_logistic_regression(Features(features, train.labels[rows])))
        correct = np.zeros(len(fitted))
        for start in range(0, len(held_out.labels), _CHUNK):
            features = _standardize(held_out.features[start : start + _CHUNK], scale)
            labels = held_out.labels[start : start + _CHUNK]
            for index, (classes, weights) in enumerate(fitted):
                predicted = classes[predict(weights, features).argmax(axis=1)]
                correct[index] += (predicted == labels).sum()
    return (correct / len(held_out.labels)).tolist()


@contextmanager
def _fitting():
    """Inside, BLAS has one thread, and a regression that reaches its last iteration does not warn.

    More threads wait for one another, and for those of JAX and TensorFlow, longer than they compute.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _logistic_regression(train):
    """The classes of `train`, and the weights of a regression of `ITERATIONS` at most; see `_fit`."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1.0, max_iter=ITERATIONS)
    if 2 * len(train.labels) > train.features.shape[1]:
        return _fit(model, train)
    basis, triangle = np.linalg.qr(train.features.T)  # Weights lie in the span of the examples.
    classes, weights = _fit(model, Features(np.ascontiguousarray(triangle.T), train.labels))
    return classes, np.vstack([basis @ weights[:-1], weights[-1]])


def _fit(model, train, sample_weight=None):
    """Fits a `LogisticRegression`; returns the classes, [c], and their weights, [w + 1, c]: see `predict`."""
    classes = np.unique(train.labels)
    if len(classes) < 2:
        return classes, np.zeros((train.features.shape[1] + 1, len(classes)))
    model.fit(*train, sample_weight)
    weights = np.vstack([model.coef_.T, model.intercept_])
    return classes, weights if len(classes) > 2 else np.hstack([-weights, weights]) / 2


def _shard_bank(train):
    """Spreads rows over all devices: `features` [local devices, rows, w] and `label`, -1 for padding."""
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
    """Returns mean and deviation of each feature, 1 for a constant one; copies a few columns at a time."""
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
