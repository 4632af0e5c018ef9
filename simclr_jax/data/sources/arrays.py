"""Examples that a program has in memory, for `simclr_jax.run(config, workdir, train=(images, labels))`."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import tensorflow as tf

from simclr_jax.data.source import Source
from simclr_jax.process import UserError

_given: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # Images and labels by split.


@contextmanager
def given(train, held_out=None) -> Iterator[str]:
    """Holds the examples of `dataset.name='arrays'` while inside; yields their digest.

    Args:
      train: images uint8 [n, h, w, c], 1 of which is grey; or a pair of images and labels, int [n], -1
        where an image has none.
      held_out: examples of the same form to judge features on; None: labels judge no features.

    Raises:
      UserError: images or labels have another type or shape, or another run has given examples.
    """
    if _given:
        raise UserError("another run has examples in memory: start one after the other")
    splits = {"train": _check("train", train)}
    if held_out is not None:
        splits["eval"] = _check("held_out", held_out)
    digest = hashlib.sha256()
    for images, labels in splits.values():
        digest.update(str(images.shape).encode())
        digest.update(np.ascontiguousarray(images))
        digest.update(labels)
    _given.update(splits)
    try:
        yield digest.hexdigest()[:12]
    finally:
        _given.clear()


def load(split: str) -> Source:
    """Returns the examples of a split: 'eval', or 'train', which also serves as 'probe'.

    Raises:
      UserError: the program has given no examples.
    """
    if not _given:
        raise UserError(
            "dataset.name='arrays' are examples in memory: give them, as in simclr_jax.run(config, workdir, "
            "train=(images, labels))"
        )
    images, labels = _given["train"]
    classes = max(0, 1 + max(int(labels.max(initial=-1)) for _, labels in _given.values()))
    if split == "eval":
        images, labels = _given.get("eval", (images[:0], labels[:0]))
    records = tf.Variable(np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images, trainable=False)
    num_classes = classes if (labels >= 0).any() else 0
    name, channels = f"arrays ({split})", records.shape[-1]
    return Source(name, len(images), num_classes, tf.identity, records, labels, channels=channels)


def _check(name, examples):
    """Returns images uint8 [n, h, w, c] and labels int32 [n]."""
    is_pair = isinstance(examples, tuple | list) and len(examples) == 2
    try:
        images, labels = map(np.asarray, examples) if is_pair else (np.asarray(examples), None)
        labels = np.full(len(images), -1) if labels is None else labels
    except (ValueError, TypeError):
        raise UserError(f"{name}: expected one array of images, or a pair of images and labels") from None
    are_images = images.dtype == np.uint8 and images.ndim == 4 and 0 not in images.shape
    if not are_images or (images.shape[-1] > 16 and images.shape[1] <= 4):  # channels first
        raise UserError(
            f"{name} images are {images.dtype} of shape {images.shape}: expected uint8 [n, height, width, 3] "
            "or 1 channel where they are grey, or others"
        )
    are_integers = labels.shape == (len(images),) and np.issubdtype(labels.dtype, np.integer)
    if not are_integers or labels.min() < -1 or labels.max() >= 2**31:
        raise UserError(
            f"{name} labels are {labels.dtype} of shape {labels.shape}: expected {len(images)} whole numbers "
            "from 0, one for each image, or -1 where there is none"
        )
    return images, labels.astype(np.int32)
