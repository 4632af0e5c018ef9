"""scikit-learn's handwritten digits, 8 x 8 pixels: four fifths to train on, one to be held out."""

import numpy as np
import tensorflow as tf

from simclr_jax.data.datasets import Source


def load(split: str) -> Source:
    """The examples of 'train' or 'eval'."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    # A constant, not the run's seed: every run and task holds out the same digits.
    rows = dict(
        zip(
            ("train", "eval"),
            train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0),
        )
    )[split]
    labels = digits.target[rows].astype(np.int32)
    source = Source(f"digits ({split})", len(rows), 10, tf.identity, images[rows], labels)
    return source._replace(class_names=tuple("0123456789"))
