"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4)."""

from simclr_jax import supervised
from simclr_jax.evaluation import features, probes
from simclr_jax.evaluation.features import Features
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Classifies the held-out images by the labels of their nearest training images.

    Returns:
      The summary: `top1`, `top5` and `examples`. Where labels by CSV are few, they are those of a
      cross-validation: every labelled image is classified by the images of the other folds. With one label
      of each class there is no accuracy.
    """
    from simclr_jax.data import datasets

    source, held_out = supervised.load_labelled(config, workdir)
    report.print_table({"task": "knn", "pretrained": config.pretrained, "dataset": source.name})
    extract = features.make_pretrained_extract(config)
    train = probes.labelled(extract(source))
    groups = datasets.readable_groups(source)
    if not held_out and not probes.folds(train.labels, groups):
        return {"examples": len(train.labels)}
    if len(train.labels) < config.k:
        report.say(f"note: all {len(train.labels)} training images vote, fewer than k={config.k}")

    def scores(train, tested):
        votes = probes.knn_votes(train, tested, k=config.k, temperature=config.temperature)
        return [supervised.top_k(Features(votes, tested.labels), k) for k in (1, 5)]

    tested = probes.labelled(extract(held_out)) if held_out else train
    top1, top5 = scores(train, tested) if held_out else probes.cross_validated(scores, train, groups)
    return {"top1": float(top1), "top5": float(top5), "examples": len(tested.labels)}
