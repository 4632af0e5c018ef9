"""Transfer by logistic regression on frozen features (SimCLR appendix B.8.1, after Kornblith et al. 2019)."""

from functools import partial

import jax
import numpy as np

from simclr_jax import checkpoint, parallel, pretrained, supervised
from simclr_jax.evaluation import doubt, features, probes
from simclr_jax.evaluation.features import Features
from simclr_jax.models import make_model
from simclr_jax.process import group
from simclr_jax.workdir import report

# Share of an image's shorter side in the view of the protocol: the largest square, where others take 0.875.
PROPORTION = 1.0
L2_WEIGHTS = np.logspace(-6, 5, 45)
_FALLBACK_L2 = 1.0  # The weight where no class has an image to validate with.


def run(config, workdir) -> dict:
    """Chooses the L2 weight on a validation split, retrains on training and validation, tests on the rest.

    Where labels by CSV are few, that is done in every fold of a cross-validation, and then for all of them.
    The network with the classifier is saved as a checkpoint.

    Returns:
      The summary: `top1`, `top5`, `mean_per_class`, the chosen `l2` and its `validation` score, those of
      `supervised.class_scores`, `calibration_temperature`; after a cross-validation also `folds` and
      `labels`. With one label of each class there is no accuracy.
    """
    from simclr_jax.data import datasets

    splits = ("train", "eval", "validation") if config.dataset.validation_split else ("train", "eval")
    sources = supervised.load_labelled(config, workdir, splits)
    report.print_table({"task": "transfer", "pretrained": config.pretrained, "dataset": sources[0].name})
    extract = features.make_pretrained_extract(config, PROPORTION)
    examples = [source and probes.labelled(extract(source)) for source in sources]
    train, held_out, validation = (*examples, None)[:3]
    fit = partial(_fit, config, sources[0].num_classes, supervised.class_weights(config, sources[0]))
    groups = datasets.readable_groups(sources[0])
    weights, choice = fit(train, validation, groups)
    if held_out:
        logits = _predict(weights, held_out)
    else:
        parts = []
        for rows, tested in probes.folds(train.labels, groups):
            fitted, _ = fit(probes.rows_of(train, rows), groups=None if groups is None else groups[rows])
            parts.append(_predict(fitted, probes.rows_of(train, tested)))
        logits = features.concatenate(parts) if parts else None
        choice |= {"folds": len(parts)} if parts else {}
        choice |= {"labels": len(train.labels)}
    _save(config, workdir, sources[0], weights)
    rows = np.random.default_rng(config.seed).permutation(len(train.labels))[: doubt.MAX_LABELLED]
    group.run_on_first(lambda: doubt.save(workdir, train.features[rows]))
    if not logits:
        return choice
    scores = score(logits) | supervised.scores_of_classes(logits, sources[0], workdir)
    return choice | scores | supervised.calibrated(logits, sources[0])


def _fit(config, classes, class_weights, train, validation=None, groups=None):
    """The weights for the L2 weight that is best on `validation`, fitted to both sets, and that choice."""
    train, validation = (train, validation) if validation else hold_out(train, groups, seed=config.seed)
    regressions = partial(probes.logistic_regressions, classes=classes, class_weights=class_weights)
    if not len(validation.labels):
        [weights] = regressions(train, l2_weights=[_FALLBACK_L2])
        return weights, {"l2": _FALLBACK_L2}
    strong_to_weak = L2_WEIGHTS[::-1]
    scores = [
        score(_predict(weights, validation))[config.metric]
        for weights in regressions(train, l2_weights=strong_to_weak)
    ]
    best = int(np.argmax(scores))
    l2 = float(strong_to_weak[best])
    [weights] = regressions(features.concatenate([train, validation]), l2_weights=[l2])
    return weights, {"l2": l2, "validation": scores[best]}


def _predict(weights, examples):
    return Features(probes.predict(weights, examples.features), examples.labels)


def _save(config, workdir, source, weights):
    """Saves the network with this classifier as a checkpoint, for the task predict."""
    model = make_model(config.model, source.num_classes, whole_projection=False)
    variables = pretrained.make_init(config, model)(jax.random.key(0))
    # Process 0 has the last word, since others may round otherwise.
    weights = parallel.gather(weights[None])[0].astype(np.float32)
    params = {**variables["params"], "supervised_head": {"kernel": weights[:-1], "bias": weights[-1]}}
    state = parallel.replicate({"step": np.int32(1), **variables, "params": params})
    meta = pretrained.make_meta(config, model, source) | {"proportion": PROPORTION}
    with checkpoint.opened(workdir, keep=1) as manager:
        checkpoint.save(manager, 1, state, meta)


def score(logits: Features) -> dict[str, float]:
    """Returns the `top1`, `top5` and `mean_per_class` accuracy of logits and labels."""
    scores = {f"top{k}": supervised.top_k(logits, k) for k in (1, 5)}
    correct = logits.features.argmax(axis=1) == logits.labels
    by_class = [correct[logits.labels == label].mean() for label in np.unique(logits.labels)]
    return scores | {"mean_per_class": float(np.mean(by_class))}


def hold_out(train: Features, groups: np.ndarray | None = None, *, seed: int) -> tuple[Features, Features]:
    """Splits examples: a fifth of every class with two or more for validation, the rest for training.

    With groups, [n], about a fifth of them is validated with; nothing where there is one group.
    """
    validation = probes.assign_folds(train.labels, 5, seed) == 0
    if groups is not None:
        tested = [tested for _, tested in probes.folds(train.labels, groups)[:1]]
        validation = np.isin(np.arange(len(groups)), tested)
    return probes.rows_of(train, ~validation), probes.rows_of(train, validation)
