"""Dataset name -> examples, and parts of them; where they come from: `data/sources/`, a file each."""

import hashlib
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from simclr_jax.process.console import escape
from simclr_jax.process.errors import RunError, UserError

LOST = 0.1  # share of the images that may vanish or break after the catalogue was made; one always may
FIRST = 64  # labels of a stream that are looked at before it is used


class Source(NamedTuple):
    """Examples that any row number reaches at once.

    Attributes:
        name: dataset and split, for messages.
        num_examples: n.
        num_classes: 0 where there are no labels.
        decode: record -> uint8 [h, w, 3]; runs inside a tf.data graph.
        records: n undecoded records, an array or a tf.Variable: no graph constant holds more than 2 GB.
        labels: int32 [n], -1 where there is none.
        names: of the image files, relative to the folder; None where examples have none.
        class_names: where they are known.
        value_range: of a folder of images with 16 bits, what becomes black and white.
        order: of a `Stream`, the name of how it is shuffled, which checkpoints keep.
        lost: of a folder, what cannot be read any more.
    """

    name: str
    num_examples: int
    num_classes: int
    decode: Callable[..., tf.Tensor]
    records: np.ndarray | tf.Variable
    labels: np.ndarray
    names: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    value_range: tuple[int, int] | None = None
    order: None = None
    lost: "LostFiles | None" = None


class LostFiles:
    """The files of a split that vanished or broke after its catalogue was made; all its subsets share it."""

    def __init__(self, name: str, size: int):
        self._name, self._size, self._reasons = name, size, {}

    def add(self, reasons: dict[str, str]) -> None:
        """Takes {name: reason} in and says so.

        Raises:
            RunError: that is a tenth of the split or more.
        """
        self._reasons |= reasons
        count = len(self._reasons)
        told = [f"{escape(name)} ({reason})" for name, reason in list(reasons.items())[:3]]
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        line = f"{self._name}: {count} of {self._size} images can no longer be read: {', '.join(told)}{more}"
        if too_many_lost(count, self._size):
            raise RunError(f"{line}; restore them, or start with a new --workdir")
        print(f"{line}; they are left out, and in training others take their place", flush=True)

    def rows(self, names: np.ndarray) -> np.ndarray:
        """Which of these names are lost, bool [n]."""
        if not self._reasons:
            return np.zeros(len(names), bool)
        return np.array([name in self._reasons for name in names.tolist()], bool)


class Stream(NamedTuple):
    """Examples too big for memory, read in order from ranges of the split.

    Attributes:
        name, num_examples, num_classes, decode, names, class_names, value_range, order: as in `Source`.
        read: list of (start, stop) -> tf.data.Dataset of examples, in order; `unpack` takes them apart.
        shuffle_buffer: undecoded records held for shuffling, over all readers of all processes.
    """

    name: str
    num_examples: int
    num_classes: int
    decode: Callable[..., tf.Tensor]
    read: Callable[[list[tuple[int, int]]], tf.data.Dataset]
    shuffle_buffer: int
    names: None = None
    class_names: tuple[str, ...] = ()
    value_range: None = None
    order: str = "blocks"


def load(config, split, *, seed, workdir=None) -> Source | Stream:
    """Opens one split; downloads nothing.

    Args:
        config: `config.dataset`, see configs/base.py.
        split: 'train', 'eval', 'probe', the labelled examples to judge features on, 'validation', or of a
            folder 'all', whatever split its images are of.
        seed: chooses the validation images of a folder that has none of its own, and which
            `config.num_examples` digits or images are trained on (of TFDS it is the first ones).
        workdir: where a folder's list of good images is kept, so that indices survive a restart.

    Returns:
        `Source`, or `Stream` for a TFDS dataset with `in_memory=False`.

    Raises:
        UserError: unknown or unprepared dataset, unknown split, empty or changed folder.
    """
    if split not in ("train", "eval", "probe", "validation") and (split, config.name) != ("all", "folder"):
        raise UserError(f"split {split!r}: expected 'train', 'eval', 'probe' or 'validation'")
    wanted = config.num_examples if split == "train" else None
    if wanted is not None and wanted < 1:
        raise UserError(
            f"dataset.num_examples={wanted}: expected at least 1; "
            "raise or unset --config.dataset.num_examples"
        )
    from simclr_jax.data.sources import arrays, digits, folder, tfds  # which need `Source`

    if config.name not in ("digits", "folder", "arrays"):
        return tfds.load(config, split, wanted)
    if split == "validation":
        raise UserError(
            f"dataset.validation_split={config.validation_split!r}: {config.name} has no such split; unset it"
        )
    if config.name == "folder":
        source = folder.load(config, split, seed=seed, workdir=workdir)
    else:
        source = {"digits": digits, "arrays": arrays}[config.name].load(split)
    if wanted is None:
        return source
    check_size(wanted, source.num_examples, source.name)
    return sample(source, wanted, seed=seed)


def too_many_lost(count: int, total: int) -> bool:
    """Whether so many images of a folder have been lost that a run on the others would be another run."""
    return count > 1 and count >= LOST * total


def reason(error) -> str:
    """Why a file cannot be decoded, without what TensorFlow and Python say of themselves."""
    text = " ".join((getattr(error, "message", None) or str(error)).split())
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*|\[\[.*|Traceback.*$|^ValueError: ", "", text)
    return escape(text.strip())[:100] or type(error).__name__


def unpack(example: dict[str, tf.Tensor], num_classes: int) -> tuple[tf.Tensor, tf.Tensor]:
    """An undecoded TFDS example -> (record, label int32, -1 where there are no classes)."""
    return example["image"], tf.cast(example["label"], tf.int32) if num_classes else tf.constant(-1)


def check_labels(name: str, num_classes: int, labels: np.ndarray) -> None:
    """Refuses labels, int [n], beyond `num_classes` or below 0; without classes none is looked at.

    Raises:
        UserError: there are such.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)] if num_classes else labels[:0]
    if len(wrong):
        raise UserError(
            f"{name}: a label is {wrong[0]}, but dataset.num_classes={num_classes}: expected 0 to "
            f"{num_classes - 1}; set --config.dataset.num_classes to more than the highest label, or choose "
            "a split that is labelled"
        )


def labelled(source: Source | Stream) -> Source | Stream:
    """The examples with a label, where that is known before they are read, as of all but a `Stream`."""
    if isinstance(source, Stream) or (source.labels >= 0).all():
        return source
    return subset(source, np.flatnonzero(source.labels >= 0))


def sample(source: Source | Stream, size: int, *, seed: int) -> Source | Stream:
    """At most `size` of the examples: random ones, or the first of a `Stream`, which is shuffled on disk."""
    if size >= source.num_examples:
        return source
    if isinstance(source, Stream):
        return source._replace(num_examples=size)
    return subset(source, np.random.default_rng([seed, 0]).permutation(source.num_examples)[:size])


def find_lost(source: Source | Stream, batch: np.ndarray, others: np.ndarray) -> bool:
    """Looks for files that cannot be read any more, after the pipeline has failed.

    Args:
        source: examples; only those of a folder are looked at.
        batch: rows that are decoded.
        others: rows whose files need only be there.

    Returns:
        Whether there are any that `source.lost` did not have.
    """
    if not isinstance(source, Source) or source.lost is None:
        return False
    reasons = {}
    known = lost_rows(source)
    for row in np.unique(batch):
        if not known[row]:
            try:
                source.decode(source.records[row])
            except tf.errors.NotFoundError:
                reasons[str(source.names[row])] = "vanished"
            except (tf.errors.OpError, ValueError) as error:
                reasons[str(source.names[row])] = reason(error)
    for row in others:
        path = source.records[row]
        if not known[row] and b"://" not in path and not os.path.lexists(path):
            reasons[str(source.names[row])] = "vanished"
    if reasons:
        source.lost.add(reasons)
    return bool(reasons)


def lost_rows(source: Source | Stream) -> np.ndarray:
    """Which examples can no longer be read, as far as this process knows, bool [n]."""
    if not isinstance(source, Source) or source.lost is None:
        return np.zeros(source.num_examples, bool)
    return source.lost.rows(source.names)


def fingerprint(source: Source | Stream) -> dict[str, str | int]:
    """What tells a dataset from another one, so that processes find out whether they read the same."""
    known = {"size": source.num_examples, "classes": source.num_classes}
    if isinstance(source, Source):
        told = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
        for name in [] if source.names is None else source.names.tolist():
            told.update(os.fsencode(name) + b"\0")
        known["names and labels"] = told.hexdigest()[:12]
    return known


def few_labels(source: Source, labels_per_class: int, *, seed: int) -> np.ndarray:
    """Rows of `labels_per_class` labelled examples of every class, the same ones for the same seed; sorted.

    Raises:
        UserError: a class has fewer, there are no labels, or the source is a stream.
    """
    if isinstance(source, Stream):
        raise UserError(
            f"{source.name}: labels_per_class={labels_per_class} needs random access; "
            "set --config.dataset.in_memory=True"
        )
    if not source.num_classes:
        raise UserError(
            f"{source.name} has no labels, but labels_per_class={labels_per_class}; "
            "choose a labelled dataset or split"
        )
    order = np.random.default_rng([seed, 0]).permutation(source.num_examples)
    rows = []
    for label in range(source.num_classes):
        found = order[source.labels[order] == label][:labels_per_class]
        if len(found) < labels_per_class:
            which = source.class_names[label] if source.class_names else label
            raise UserError(
                f"{source.name}: class {which} has {len(found)} examples, but labels_per_class="
                f"{labels_per_class}; lower --config.labels_per_class"
            )
        rows.extend(found)
    return np.sort(rows)


def subset(source: Source, rows: np.ndarray) -> Source:
    """The examples of these rows; the index that pipelines yield counts positions in it."""
    rows = np.sort(rows)
    records = (
        source.records[rows]
        if isinstance(source.records, np.ndarray)
        else tf.Variable(tf.gather(source.records, rows), trainable=False)
    )
    names = None if source.names is None else source.names[rows]
    return source._replace(num_examples=len(rows), records=records, labels=source.labels[rows], names=names)


def span(source: Source | Stream, start: int, stop: int) -> Source | Stream:
    """The examples from `start` to `stop`, in order; the index that pipelines yield counts from `start`."""
    if isinstance(source, Source):
        return subset(source, np.arange(start, stop))

    def read(ranges):
        return source.read([(start + first, start + last) for first, last in ranges])

    return source._replace(num_examples=stop - start, read=read)


def check_size(wanted: int, size: int, name: str) -> None:
    """Raises a UserError if more examples are wanted than there are."""
    if wanted > size:
        raise UserError(
            f"dataset.num_examples={wanted}, but {name} has {size}; "
            "lower or unset --config.dataset.num_examples"
        )
