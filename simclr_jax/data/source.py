"""The examples of a split, and operations on them: parts, few labels a class, lost files."""

import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from simclr_jax.data.decode import describe_failure
from simclr_jax.process import RunError, UserError, escape, first_few

MAX_LOST = 0.1  # Share of a folder's images that may get lost after it was listed; one image always may.


class Source(NamedTuple):
    """Examples of one split: with random access by `records` and `labels`, else a stream by `read`.

    Attributes:
      name: dataset and split, for messages.
      num_examples: n.
      num_classes: 0 where there are no labels.
      decode: record -> uint8 [h, w, 3]; runs inside a tf.data graph.
      records: n undecoded records, an array or a tf.Variable, since a graph holds at most 2 GB of constants;
        None of a stream.
      labels: int32 [n], -1 where an example has none; None of a stream.
      names: relative paths of the image files of a folder; None of other examples.
      class_names: empty where they are not known.
      value_range: of a folder of images with 16 bits, the values that become black and white.
      lost: of a folder, the files that can no longer be read.
      read: of a stream, list of (start, stop) -> tf.data.Dataset of (record, label int32), in order.
      shuffle_buffer: of a stream, undecoded records held for shuffling, over all readers of all processes.
    """

    name: str
    num_examples: int
    num_classes: int
    decode: Callable[..., tf.Tensor]
    records: np.ndarray | tf.Variable | None = None
    labels: np.ndarray | None = None
    names: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    value_range: tuple[int, int] | None = None
    lost: "LostFiles | None" = None
    read: Callable[[list[tuple[int, int]]], tf.data.Dataset] | None = None
    shuffle_buffer: int = 0

    @property
    def random_access(self) -> bool:
        """Whether any row can be read at once."""
        return self.read is None

    @property
    def order(self) -> str | None:
        """The way a stream is shuffled, by a name that checkpoints keep; None with random access."""
        return None if self.random_access else "blocks"


class LostFiles:
    """The files of a split that vanished or broke after it was listed; all parts of the split share it."""

    def __init__(self, name: str, size: int):
        self._name, self._size, self._reasons = name, size, {}

    def add(self, reasons: dict[str, str]) -> str:
        """Takes in {name: reason}; returns a line that tells the user.

        Raises:
          RunError: a tenth of the split or more is lost.
        """
        self._reasons |= reasons
        count = len(self._reasons)
        files = first_few(f"{escape(name)} ({reason})" for name, reason in reasons.items())
        line = f"{self._name}: {count} of {self._size} images can no longer be read: {files}"
        if are_too_many(count, self._size):
            raise RunError(f"{line}; restore them, or start with a new --workdir")
        return f"{line}; they are left out, and in training others take their place"

    def mask(self, names: np.ndarray) -> np.ndarray:
        """Whether each of the names is lost, bool [n]."""
        if not self._reasons:
            return np.zeros(len(names), bool)
        return np.array([name in self._reasons for name in names.tolist()], bool)


def are_too_many(lost: int, total: int) -> bool:
    """Whether a folder has lost so many images that a run on the others would be another run."""
    return lost > 1 and lost >= MAX_LOST * total


def lost_rows(source: Source) -> np.ndarray:
    """Whether each example can no longer be read, as far as this process knows, bool [n]."""
    return source.lost.mask(source.names) if source.lost else np.zeros(source.num_examples, bool)


def find_lost(source: Source, batch: np.ndarray, others: np.ndarray) -> bool:
    """Looks for files that can no longer be read, after the pipeline has failed.

    Args:
      source: examples; only those of a folder are looked at.
      batch: rows that are decoded.
      others: rows whose files only have to be there.

    Returns:
      Whether there are any that `source.lost` did not have.
    """
    if source.lost is None:
        return False
    reasons = {}
    lost = lost_rows(source)
    for row in np.unique(batch[~lost[batch]]):
        try:
            source.decode(source.records[row])
        except tf.errors.NotFoundError:
            reasons[str(source.names[row])] = "vanished"
        except (tf.errors.OpError, ValueError) as error:
            reasons[str(source.names[row])] = describe_failure(error)
    for row in others[~lost[others]]:
        if b"://" not in source.records[row] and not os.path.lexists(source.records[row]):
            reasons[str(source.names[row])] = "vanished"
    if reasons:
        print(source.lost.add(reasons), flush=True)  # Not `say`: other processes may not have read the file.
    return bool(reasons)


def subset(source: Source, rows: np.ndarray) -> Source:
    """The examples of these rows, sorted; pipelines then yield positions in the subset as the index."""
    rows = np.sort(rows)
    if isinstance(source.records, tf.Variable):
        records = tf.Variable(tf.gather(source.records, rows), trainable=False)
    else:
        records = source.records[rows]
    names = None if source.names is None else source.names[rows]
    return source._replace(num_examples=len(rows), records=records, labels=source.labels[rows], names=names)


def span(source: Source, start: int, stop: int) -> Source:
    """The examples from `start` to `stop`, in order; the index that pipelines yield counts from `start`."""
    if source.random_access:
        return subset(source, np.arange(start, stop))

    def read(ranges):
        return source.read([(start + first, start + last) for first, last in ranges])

    return source._replace(num_examples=stop - start, read=read)


def sample(source: Source, size: int, *, seed: int) -> Source:
    """At most `size` random examples; the first ones of a stream, which is shuffled on disk."""
    if size >= source.num_examples:
        return source
    if not source.random_access:
        return source._replace(num_examples=size)
    return subset(source, np.random.default_rng([seed, 0]).permutation(source.num_examples)[:size])


def labelled(source: Source) -> Source:
    """The examples that have a label; all of a stream, whose labels are not known before it is read."""
    if not source.random_access or (source.labels >= 0).all():
        return source
    return subset(source, np.flatnonzero(source.labels >= 0))


def few_labels(source: Source, labels_per_class: int, *, seed: int) -> np.ndarray:
    """Draws labelled examples of every class, the same ones for the same seed.

    Returns:
      Rows, sorted, int [num_classes * labels_per_class].

    Raises:
      UserError: a class has fewer, there are no labels, or the source is a stream.
    """
    if not source.random_access:
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
        rows_of_class = order[source.labels[order] == label][:labels_per_class]
        if len(rows_of_class) < labels_per_class:
            class_name = source.class_names[label] if source.class_names else label
            raise UserError(
                f"{source.name}: class {class_name} has {len(rows_of_class)} examples, but labels_per_class="
                f"{labels_per_class}; lower --config.labels_per_class"
            )
        rows.extend(rows_of_class)
    return np.sort(rows)


def fingerprint(source: Source) -> dict[str, str | int]:
    """Facts that tell a dataset from others, for processes to find out whether all read the same one."""
    facts = {"size": source.num_examples, "classes": source.num_classes}
    if source.random_access:
        digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
        for name in [] if source.names is None else source.names.tolist():
            digest.update(os.fsencode(name) + b"\0")
        facts["names and labels"] = digest.hexdigest()[:12]
    return facts


def check_labels(name: str, num_classes: int, labels: np.ndarray) -> None:
    """Checks that labels, int [n], are from 0 to `num_classes` - 1; without classes, labels may be anything.

    Raises:
      UserError: one is not.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)] if num_classes else labels[:0]
    if len(wrong):
        raise UserError(
            f"{name}: a label is {wrong[0]}, but dataset.num_classes={num_classes}: expected 0 to "
            f"{num_classes - 1}; set --config.dataset.num_classes to more than the highest label, or choose "
            "a split that is labelled"
        )


def check_size(num_examples: int, size: int, name: str) -> None:
    """Raises a UserError if `dataset.num_examples` is more than the size of the split."""
    if num_examples > size:
        raise UserError(
            f"dataset.num_examples={num_examples}, but {name} has {size}; "
            "lower or unset --config.dataset.num_examples"
        )
