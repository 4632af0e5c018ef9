"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4)."""

import time
from functools import partial

from simclr_jax import pretrained, supervised
from simclr_jax.evaluation import probes
from simclr_jax.evaluation.features import Features
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Classifies the held-out images by the labels of their nearest training images.

    Returns:
      The summary: `top1` and `top5`, `examples`, `seconds`. Where labels by CSV are few, these are of a
      cross-validation: every labelled image by its nearest among those of the other folds.
    """
    begun = time.monotonic()
    source, held_out = supervised.load_labelled(config, workdir)
    report.print_table({"task": "knn", "pretrained": config.pretrained, "dataset": source.name})
    extract = pretrained.make_extract(config)
    train = probes.labelled(extract(source))
    if len(train.labels) < config.k:
        report.say(f"note: all {len(train.labels)} training images vote, fewer than k={config.k}")

    def score(train, held_out, k):
        votes = probes.knn_votes(train, held_out, k=config.k, temperature=config.temperature)
        return supervised.top_k(Features(votes, held_out.labels), k)

    if held_out:
        tested = probes.labelled(extract(held_out))
        summary = {f"top{k}": score(train, tested, k) for k in (1, 5)}
    else:
        tested = train
        summary = {f"top{k}": probes.cross_validated(partial(score, k=k), train) for k in (1, 5)}
    return summary | {"examples": len(tested.labels), "seconds": round(time.monotonic() - begun, 1)}
