"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4)."""

import time

import numpy as np

from simclr_jax import pretrained, report, supervised
from simclr_jax.errors import UserError
from simclr_jax.evaluation import probes
from simclr_jax.losses import top_k_correct


def run(config, workdir) -> dict:
    """Classifies the held-out images by the labels of their nearest training images.

    Returns:
      The summary: `top1` and `top5`, `examples`, `seconds`.
    """
    begun = time.monotonic()
    if config.k < 1 or not config.temperature > 0:
        raise UserError(
            f"k={config.k}, temperature={config.temperature}: expected at least 1 and more than 0; "
            "set --config.k and --config.temperature"
        )
    sources = supervised.load_labelled(config, workdir)
    report.print_table({"task": "knn", "pretrained": config.pretrained, "dataset": sources[0].name})
    train, held_out = map(probes.labelled, map(pretrained.make_extract(config), sources))
    if len(train.labels) < config.k:
        report.say(f"note: all {len(train.labels)} training images vote, fewer than k={config.k}")
    votes = probes.knn_votes(train, held_out, k=config.k, temperature=config.temperature)
    summary = {f"top{k}": float(np.mean(top_k_correct(votes, held_out.labels, k=k))) for k in (1, 5)}
    return summary | {"examples": len(held_out.labels), "seconds": round(time.monotonic() - begun, 1)}
