"""Transfer by logistic regression on frozen features (SimCLR appendix B.8.1, after Kornblith et al. 2019)."""

from functools import partial

import jax
import numpy as np

from simclr_jax import checkpoint, parallel, pretrained, supervised
from simclr_jax.evaluation import features, probes
from simclr_jax.evaluation.features import Features
from simclr_jax.models import make_model
from simclr_jax.workdir import report

PROPORTION = 1.0  # Share of an image's shorter side in the view.
L2_WEIGHTS = np.logspace(-6, 5, 45)


def run(config, workdir) -> dict:
    """Chooses the L2 weight on a validation split, retrains on training and validation, tests on the rest.

    Where labels by CSV are few, that is done in every fold of a cross-validation, and then for all of them.
    The network with the classifier is saved as a checkpoint.

    Returns:
      The summary: `top1`, `top5`, `mean_per_class`, the chosen `l2` and its `validation` score,
      `calibration_temperature`; after a cross-validation also `folds` and `labels`.
    """
    splits = ("train", "eval", "validation") if config.dataset.validation_split else ("train", "eval")
    sources = supervised.load_labelled(config, workdir, splits)
    report.print_table({"task": "transfer", "pretrained": config.pretrained, "dataset": sources[0].name})
    extract = features.make_pretrained_extract(config, partial(_whole_view, size=config.image_size))
    examples = [source and probes.labelled(extract(source)) for source in sources]
    train, held_out, validation = (*examples, None)[:3]
    fit = partial(_fit, config, sources[0].num_classes)
    weights, choice = fit(train, validation)
    if held_out:
        logits = Features(probes.predict(weights, held_out.features), held_out.labels)
    else:
        parts = probes.folds(train.labels)
        logits = _cross_validate(fit, train, parts)
        choice |= {"folds": len(parts), "labels": len(train.labels)}
    _save(config, workdir, sources[0], weights)
    return score(logits) | choice | supervised.calibrated(logits)


def _fit(config, classes, train, validation=None):
    """The weights for the L2 weight that is best on `validation`, fitted to both sets, and that choice."""
    train, validation = (train, validation) if validation else hold_out(train, seed=config.seed)
    strong_to_weak = L2_WEIGHTS[::-1]
    scores = [
        score(Features(probes.predict(weights, validation.features), validation.labels))[config.metric]
        for weights in probes.logistic_regressions(train, classes, strong_to_weak)
    ]
    best = int(np.argmax(scores))
    l2 = float(strong_to_weak[best])
    both = Features(*map(np.concatenate, zip(train, validation)))
    [weights] = probes.logistic_regressions(both, classes, [l2])
    return weights, {"l2": l2, "validation": scores[best]}


def _cross_validate(fit, examples, folds):
    """The logits of every example from a fit to the other folds."""
    logits = []
    for rows, tested in folds:
        weights, _ = fit(probes.rows_of(examples, rows))
        logits.append(probes.predict(weights, examples.features[tested]))
    tested = np.concatenate([tested for _, tested in folds])
    return Features(np.concatenate(logits), examples.labels[tested])


def _save(config, workdir, source, weights):
    """Saves the network with this classifier as a checkpoint, for the task predict."""
    model = make_model(config.model, source.num_classes, whole_projection=False)
    variables = pretrained.make_init(config, model)(jax.random.key(0))
    weights = parallel.gather(weights[None])[0].astype(
        np.float32
    )  # Of process 0: others may round otherwise.
    params = {**variables["params"], "supervised_head": {"kernel": weights[:-1], "bias": weights[-1]}}
    state = parallel.replicate({"step": np.int32(1), **variables, "params": params})
    meta = supervised.meta_of(config, model, source) | {"proportion": PROPORTION}
    with checkpoint.opened(workdir, keep=1) as manager:
        checkpoint.save(manager, 1, state, meta)


def _whole_view(image, _seed, size):
    """The view of the protocol: the largest square of the image, where others take 0.875 of it."""
    from simclr_jax.data import augment

    return {"image": augment.eval_view(image, size, proportion=PROPORTION)}


def score(logits: Features) -> dict[str, float]:
    """Returns the `top1`, `top5` and `mean_per_class` accuracy of logits and labels."""
    scores = {f"top{k}": supervised.top_k(logits, k) for k in (1, 5)}
    correct = logits.features.argmax(axis=1) == logits.labels
    by_class = [correct[logits.labels == label].mean() for label in np.unique(logits.labels)]
    return scores | {"mean_per_class": float(np.mean(by_class))}


def hold_out(train: Features, *, seed: int) -> tuple[Features, Features]:
    """Splits examples: a fifth of every class for validation, the rest for training."""
    order = np.random.default_rng(seed).permutation(len(train.labels))
    order = order[np.argsort(train.labels[order], kind="stable")]
    validation = np.zeros(len(order), bool)
    validation[order[::5]] = True
    return probes.rows_of(train, ~validation), probes.rows_of(train, validation)
