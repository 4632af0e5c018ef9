"""The examples of a split, and operations on them: parts, few labels a class, lost files."""

import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from simclr_jax.data import tiles
from simclr_jax.process import RunError, UserError, escape, first_few, reason_of

MAX_LOST = 0.1  # Share of a folder's images that ends a run when it is lost; one image may always be lost.


class Source(NamedTuple):
    """The examples of a split, with random access (`records`, `labels`) or as a stream (`read`).

    Attributes:
      name: dataset and split, for messages.
      num_examples: n.
      num_classes: 0 where there are no labels.
      decode: record -> [h, w, c], uint8, or float32 in [0, 1] for the dtype float16; runs inside a tf.data
        graph, without AutoGraph: decorate it by `tf.function` for conditions in Python.
      records: n undecoded records, an array or a tf.Variable, since a graph holds at most 2 GB of constants;
        None of a stream.
      labels: int32 [n], -1 where an example has none; None of a stream.
      names: relative paths of the image files of a folder, also of one that `data.prepare` wrote as a
        dataset; None of other examples.
      class_names: empty where the dataset has none.
      label_sets: where images have several labels, the classes, and which of them the label i stands for,
        bool [labels, classes]; None where each has one.
      value_range: the values that become black and white in a folder of images of more than 8 bits, each a
        number or one for each channel.
      groups: str [n], the images of one of which are on one side of every split; None where each is by
        itself.
      channels: c.
      dtype: 'uint8', or 'float16' for images of more than 8 bits: the type of the views that pipelines make.
      lost: the files of a folder that can no longer be read.
      read: for a stream, list of (start, stop) -> tf.data.Dataset of (record, label int32), in order.
      fetch: for a stream from files with random access, index int64 -> (record, label int32), in a graph.
      read_names: for a stream of examples that have names, (start, stop) -> names.
      shuffle_buffer: for a stream without `fetch`, undecoded records held for shuffling, over all readers of
        all processes.
    """

    name: str
    num_examples: int
    num_classes: int
    decode: Callable[..., tf.Tensor]
    records: np.ndarray | tf.Variable | None = None
    labels: np.ndarray | None = None
    names: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    label_sets: tuple[tuple[str, ...], np.ndarray] | None = None
    value_range: tuple | None = None
    groups: np.ndarray | None = None
    channels: int = 3
    dtype: str = "uint8"
    lost: "LostFiles | None" = None
    read: Callable[[list[tuple[int, int]]], tf.data.Dataset] | None = None
    fetch: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]] | None = None
    read_names: Callable[[int, int], np.ndarray] | None = None
    shuffle_buffer: int = 0

    @property
    def random_access(self) -> bool:
        """Whether the records and labels of all rows are at hand."""
        return self.read is None

    @property
    def order(self) -> str | None:
        """The way a stream is shuffled, by a name that checkpoints keep; None if all of it at once."""
        return None if self.random_access or self.fetch else "blocks"


class LostFiles:
    """The files of a split that vanished or broke after the start; all subsets of the split share it."""

    def __init__(self, name: str, size: int):
        self._name, self._size, self._reasons = name, size, {}

    def add(self, reasons: dict[str, str]) -> str:
        """Adds {name: reason}; returns a line for the user.

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
        """Returns whether each of the names is lost, bool [n]."""
        return np.fromiter((name in self._reasons for name in names), bool, len(names))


def are_too_many(lost: int, total: int) -> bool:
    """Returns whether a folder has lost so many images that a run on the others would be another run."""
    return lost > 1 and lost >= MAX_LOST * total


def lost_rows(source: Source) -> np.ndarray:
    """Returns whether each example is lost, bool [n], as far as this process has noticed."""
    return source.lost.mask(source.names) if source.lost else np.zeros(source.num_examples, bool)


def readable_groups(source: Source) -> np.ndarray | None:
    """Returns the groups of the examples that are not lost, if there are groups."""
    return None if source.groups is None else source.groups[~lost_rows(source)]


def find_lost(source: Source, batch: np.ndarray, later: np.ndarray) -> bool:
    """Adds to `source.lost` the files that can no longer be read, after the pipeline has failed.

    Args:
      source: examples; only those of a folder have files.
      batch: rows whose files are decoded.
      later: rows whose files only have to exist.

    Returns:
      Whether there were any.
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
            reasons[str(source.names[row])] = reason_of(error, 100)
    for row in later[~lost[later]]:
        file = tiles.file_of(os.fsdecode(source.records[row]))
        if "://" not in file and not os.path.lexists(file):
            reasons[str(source.names[row])] = "vanished"
    if reasons:
        # Every process prints this, since each reads its own files.
        print(source.lost.add(reasons), flush=True)
    return bool(reasons)


def subset(source: Source, rows: np.ndarray) -> Source:
    """Returns the examples of these rows, sorted; pipelines then yield positions in the subset as index."""
    rows = np.sort(rows)
    if isinstance(source.records, tf.Variable):
        records = tf.Variable(tf.gather(source.records, rows), trainable=False)
    else:
        records = source.records[rows]
    columns = {name: getattr(source, name) for name in ("labels", "names", "groups")}
    columns = {name: None if column is None else column[rows] for name, column in columns.items()}
    return source._replace(num_examples=len(rows), records=records, **columns)


def span(source: Source, start: int, stop: int) -> Source:
    """Returns the examples from `start` to `stop`; the index that pipelines yield counts from `start`."""
    if source.random_access:
        return subset(source, np.arange(start, stop))

    def read(ranges):
        return source.read([(start + first, start + last) for first, last in ranges])

    fetch = source.fetch and (lambda index: source.fetch(start + index))
    names = source.read_names and source.read_names(start, stop)
    return source._replace(num_examples=stop - start, read=read, fetch=fetch, names=names)


def sample(source: Source, size: int, *, seed: int) -> Source:
    """Returns at most `size` random examples; the first ones of a stream, which is shuffled on disk."""
    if size >= source.num_examples:
        return source
    if not source.random_access:
        return source._replace(num_examples=size)
    return subset(source, np.random.default_rng([seed, 0]).permutation(source.num_examples)[:size])


def labelled(source: Source) -> Source:
    """Returns the examples that have a label; a stream as a whole, since only reading it shows labels."""
    if not source.random_access or (source.labels >= 0).all():
        return source
    return subset(source, np.flatnonzero(source.labels >= 0))


def class_counts(source: Source, setting: str) -> np.ndarray:
    """Returns the number of examples of each class, int [classes].

    Raises:
      UserError: the source is a stream, or its images have several labels; the message names the `setting`
        that needs the counts.
    """
    if source.label_sets:
        raise UserError(f"{source.name}: {setting} is not made for several labels an image: leave it out")
    if not source.random_access:
        raise UserError(
            f"{source.name}: {setting} needs all labels at the start; set --config.dataset.in_memory=True"
        )
    return np.bincount(source.labels[source.labels >= 0], minlength=source.num_classes)


def balanced(source: Source, *, seed: int) -> Source:
    """Returns labelled examples in which all classes have as many rows as the largest one.

    Examples of a smaller class come equally often, but for a random rest that comes once more.
    """
    counts = class_counts(source, "balanced_draws=True")
    rng = np.random.default_rng([seed, 1])
    rows = [
        np.resize(rng.permutation(np.flatnonzero(source.labels == label)), counts.max())
        for label in np.flatnonzero(counts)
    ]
    return subset(source, np.concatenate(rows))


def few_labels(source: Source, labels_per_class: int, *, seed: int) -> np.ndarray:
    """Draws labelled examples of every class, the same ones for the same seed.

    Returns:
      Rows, sorted, int [num_classes * labels_per_class].

    Raises:
      UserError: a class has fewer, there are no labels, or the source is a stream.
    """
    class_counts(source, f"labels_per_class={labels_per_class}")
    if not source.num_classes:
        raise UserError(f"{source.name} has no labels: choose one that has, or unset labels_per_class")
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
    """Returns facts by which processes check that all read the same dataset."""
    facts = {"size": source.num_examples, "classes": source.num_classes}
    if source.random_access:
        digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
        for name in [] if source.names is None else source.names.tolist():
            digest.update(os.fsencode(name) + b"\0")
        facts["names and labels"] = digest.hexdigest()[:12]
    return facts


def check_labels(name: str, num_classes: int, labels: np.ndarray) -> None:
    """Raises a UserError unless labels, int [n], are from 0 to `num_classes` - 1, or there are no classes."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if num_classes and len(wrong):
        raise UserError(
            f"{name}: a label is {wrong[0]}, but dataset.num_classes={num_classes}: set "
            "--config.dataset.num_classes to more than the highest label, or choose a labelled split"
        )


def check_size(num_examples: int, size: int, name: str) -> None:
    """Raises a UserError if `dataset.num_examples` is more than the size of the split."""
    if num_examples > size:
        raise UserError(f"dataset.num_examples={num_examples}, but {name} has {size}; lower or unset it")
