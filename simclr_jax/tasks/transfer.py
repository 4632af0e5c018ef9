"""Transfer by logistic regression on frozen features (SimCLR appendix B.8.1, after Kornblith et al. 2019)."""

import time
from functools import partial

import numpy as np

from simclr_jax import losses, pretrained, report, supervised
from simclr_jax.errors import UserError
from simclr_jax.evaluation import probes
from simclr_jax.evaluation.probes import Features

L2_WEIGHTS = np.logspace(-6, 5, 45)


def run(config, workdir) -> dict:
    """Chooses the L2 weight on a validation split, retrains on training and validation, tests on the rest.

    Returns:
      The summary: `top1`, `top5`, `mean_per_class`, the chosen `l2` and its `validation` score, `seconds`.
    """
    begun = time.monotonic()
    if config.metric not in ("top1", "mean_per_class"):
        raise UserError(f"metric='{config.metric}': set --config.metric to top1 or mean_per_class")
    splits = ("train", "eval", "validation") if config.dataset.validation_split else ("train", "eval")
    sources = supervised.load_labelled(config, workdir, splits)
    report.print_table({"task": "transfer", "pretrained": config.pretrained, "dataset": sources[0].name})
    extract = pretrained.make_extract(config, transform=partial(_whole_view, size=config.image_size))
    train, test, *validation = (probes.labelled(extract(source)) for source in sources)
    train, validation = (train, *validation) if validation else hold_out(train, seed=config.seed)
    both = Features(*(np.concatenate(parts) for parts in zip(train, validation)))
    classes = sources[0].num_classes

    fit, weights, scores = probes.make_logistic_regression(train, classes), None, []
    for l2 in L2_WEIGHTS[::-1]:  # from strong to weak, each from where the one before ended
        weights = fit(l2, weights)
        scores.append(score(weights, validation)[config.metric])
    best = int(np.argmax(scores))
    l2 = float(L2_WEIGHTS[::-1][best])
    weights = probes.make_logistic_regression(both, classes)(l2)
    chosen = {"l2": l2, "validation": scores[best]}
    return score(weights, test) | chosen | {"seconds": round(time.monotonic() - begun, 1)}


def _whole_view(image, _seed, size):
    """The protocol's view: the largest square of the image, not the 0.875 of it that others look at."""
    from simclr_jax.data import augment

    return {"image": augment.eval_view(image, size, proportion=1.0)}


def score(weights: np.ndarray, held_out: Features) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` accuracy of logistic regression."""
    logits = probes.predict(weights, held_out.features)
    scores = {f"top{k}": float(np.mean(losses.top_k_correct(logits, held_out.labels, k=k))) for k in (1, 5)}
    correct = logits.argmax(axis=1) == held_out.labels
    by_class = [correct[held_out.labels == label].mean() for label in np.unique(held_out.labels)]
    return scores | {"mean_per_class": float(np.mean(by_class))}


def hold_out(train: Features, *, seed: int) -> tuple[Features, Features]:
    """A fifth of every class as validation examples, the rest for training."""
    order = np.random.default_rng(seed).permutation(len(train.labels))
    order = order[np.argsort(train.labels[order], kind="stable")]
    validation = np.zeros(len(order), bool)
    validation[order[::5]] = True
    return tuple(Features(train.features[rows], train.labels[rows]) for rows in (~validation, validation))
