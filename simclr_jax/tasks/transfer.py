"""Transfer by logistic regression on frozen features (SimCLR appendix B.8.1, after Kornblith et al. 2019)."""

import time
from functools import partial

import jax
import numpy as np
from etils import epath

from simclr_jax import checkpoint, parallel, pretrained, supervised
from simclr_jax.evaluation import probes
from simclr_jax.evaluation.probes import Features
from simclr_jax.models import make_model
from simclr_jax.workdir import report

PROPORTION = 1.0  # of an image's shorter side that is looked at
L2_WEIGHTS = np.logspace(-6, 5, 45)


def run(config, workdir) -> dict:
    """Chooses the L2 weight on a validation split, retrains on training and validation, tests on the rest.

    Where labels by CSV are few, that is done in every fold of a cross-validation, and then for all of them.
    The network with the classifier is saved as a checkpoint.

    Returns:
      The summary: `top1`, `top5`, `mean_per_class`, the chosen `l2` and its `validation` score,
      `calibration_temperature`, `seconds`; after a cross-validation `folds` and `labels` besides.
    """
    begun = time.monotonic()
    workdir = epath.Path(workdir)
    splits = ("train", "eval", "validation") if config.dataset.validation_split else ("train", "eval")
    sources = supervised.load_labelled(config, workdir, splits)
    report.print_table({"task": "transfer", "pretrained": config.pretrained, "dataset": sources[0].name})
    extract = pretrained.make_extract(config, transform=partial(_whole_view, size=config.image_size))
    found = [source and probes.labelled(extract(source)) for source in sources]
    train, test, validation = (*found, None)[:3]

    def fit(train, validation=None):
        return _fit(config, sources[0].num_classes, train, validation)

    if test:
        weights, chosen = fit(train, validation)
        told = Features(probes.predict(weights, test.features), test.labels)
    else:
        parts = probes.folds(train.labels)
        tested = np.concatenate([rows for _, rows in parts])
        fitted = [fit(Features(*(of[rows] for of in train)))[0] for rows, _ in parts]
        logits = [probes.predict(one, train.features[rows]) for one, (_, rows) in zip(fitted, parts)]
        told = Features(np.concatenate(logits), train.labels[tested])
        weights, chosen = fit(train)
        chosen |= {"folds": len(parts), "labels": len(train.labels)}
    _save(config, workdir, sources[0], weights)
    summary = score(told) | chosen | supervised.calibrated(told)
    return summary | {"seconds": round(time.monotonic() - begun, 1)}


def _fit(config, classes, train, validation):
    """Weights of the L2 weight that is best on `validation`, on both then, and what was chosen."""
    train, validation = (train, validation) if validation else hold_out(train, seed=config.seed)
    both = Features(*(np.concatenate(parts) for parts in zip(train, validation)))
    fit, weights, scores = probes.make_logistic_regression(train, classes), None, []
    for l2 in L2_WEIGHTS[::-1]:  # from strong to weak, each from where the one before ended
        weights = fit(l2, weights)
        logits = probes.predict(weights, validation.features)
        scores.append(score(Features(logits, validation.labels))[config.metric])
    best = int(np.argmax(scores))
    l2 = float(L2_WEIGHTS[::-1][best])
    weights = probes.make_logistic_regression(both, classes)(l2)
    return weights, {"l2": l2, "validation": scores[best]}


def _save(config, workdir, source, weights):
    """A checkpoint of the network that was started from, with this classifier, for the task predict."""
    model = make_model(config.model, source.num_classes, whole_projection=False)
    variables = pretrained.make_init(config, model)(jax.random.key(0))
    head = {"kernel": weights[:-1].astype(np.float32), "bias": weights[-1].astype(np.float32)}
    params = {**variables["params"], "supervised_head": head}
    state = parallel.replicate({"step": np.int32(1), **variables, "params": params})
    meta = supervised.meta_of(config, model, source) | {"proportion": PROPORTION}
    with checkpoint.opened(workdir, keep=1) as manager:
        checkpoint.save(manager, 1, state, meta)


def _whole_view(image, _seed, size):
    """The protocol's view: the largest square of the image, not the 0.875 of it that others look at."""
    from simclr_jax.data import augment

    return {"image": augment.eval_view(image, size, proportion=PROPORTION)}


def score(told: Features) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` accuracy of logits."""
    scores = {f"top{k}": supervised.top_k(told, k) for k in (1, 5)}
    correct = told.features.argmax(axis=1) == told.labels
    by_class = [correct[told.labels == label].mean() for label in np.unique(told.labels)]
    return scores | {"mean_per_class": float(np.mean(by_class))}


def hold_out(train: Features, *, seed: int) -> tuple[Features, Features]:
    """A fifth of every class as validation examples, the rest for training."""
    order = np.random.default_rng(seed).permutation(len(train.labels))
    order = order[np.argsort(train.labels[order], kind="stable")]
    validation = np.zeros(len(order), bool)
    validation[order[::5]] = True
    return tuple(Features(train.features[rows], train.labels[rows]) for rows in (~validation, validation))
