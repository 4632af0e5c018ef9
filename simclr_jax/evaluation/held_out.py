"""Holds out some of the labels by CSV, where there are enough."""

import numpy as np

from simclr_jax.evaluation import probes
from simclr_jax.process import say_once

# With fewer labels in the smallest class, no image is held out: a tenth of 20 labels is 2 images.
MIN_PER_CLASS = 20


def labelled_by_csv(load):
    """Loads the labelled images of a folder with `dataset.labels`.

    Args:
      load: split -> source.

    Returns:
      The labelled training images, and the held-out ones. Where labels are too few to hold some out, all
      labelled images, and None: a classifier learns from all of them, and a cross-validation scores it.
    """
    from simclr_jax.data import datasets

    labelled, held_out = (datasets.labelled(load(split)) for split in ("all", "eval"))
    smallest = np.bincount(labelled.labels, minlength=labelled.num_classes).min()
    if smallest >= MIN_PER_CLASS and len(set(held_out.labels)) == labelled.num_classes:
        return datasets.labelled(load("train")), held_out
    say_once(
        f"note: {labelled.num_examples} labels, {smallest} of the smallest class: too few to hold some of "
        f"them out, so accuracy is that of a cross-validation ({len(probes.folds(labelled.labels))} folds)"
    )
    return labelled, None
