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
      labelled images, and None: a classifier learns from all of them, and a cross-validation scores it if a
      class has two labels.
    """
    from simclr_jax.data import datasets

    labelled, held_out = (datasets.labelled(load(split)) for split in ("all", "eval"))
    counts, tested = map(_class_counts, (labelled, held_out))
    smallest = counts.min()
    if smallest >= MIN_PER_CLASS and tested.any() and tested.all():
        return datasets.labelled(load("train")), held_out
    if folds := len(folds_of(labelled)):
        accuracy = f"is that of a cross-validation ({folds} folds)"
        if smallest == 1 and not labelled.label_sets:
            accuracy += f", without the {(counts == 1).sum()} classes that have one label"
    else:
        accuracy = "cannot be measured: label a second image of each class"
    say_once(
        f"note: {labelled.num_examples} labels, {smallest} of the smallest class: too few to hold some of "
        f"them out, so accuracy {accuracy}"
    )
    return labelled, None


def folds_of(source):
    """Returns the `probes.folds` of labelled examples; those of several labels an image are random."""
    labels = np.zeros_like(source.labels) if source.label_sets else source.labels
    return probes.folds(labels, source.groups)


def _class_counts(source):
    if source.label_sets:
        return source.label_sets[1][source.labels].sum(axis=0)
    return np.bincount(source.labels, minlength=source.num_classes)
