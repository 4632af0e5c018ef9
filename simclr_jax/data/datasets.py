"""Dataset name -> examples: digits, a folder of images, arrays, or anything in TensorFlow Datasets."""

import difflib
import functools
import hashlib
import operator
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from simclr_jax.console import shown
from simclr_jax.data import decode, folder
from simclr_jax.errors import RunError, UserError

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
        lost: of a folder, what cannot be read any more.
    """

    name: str
    num_examples: int
    num_classes: int
    decode: Callable[[tf.Tensor], tf.Tensor]
    records: np.ndarray | tf.Variable
    labels: np.ndarray
    names: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    value_range: tuple[int, int] | None = None
    lost: "Lost | None" = None


class Lost:
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
        told = [f"{shown(name)} ({reason})" for name, reason in list(reasons.items())[:3]]
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        line = f"{self._name}: {count} of {self._size} images can no longer be read: {', '.join(told)}{more}"
        if folder.too_many_lost(count, self._size):
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
        name, num_examples, num_classes, decode, names, class_names, value_range: as in `Source`.
        read: list of (start, stop) -> tf.data.Dataset of examples, in order; `unpack` takes them apart.
        shuffle_buffer: undecoded records held for shuffling, over all readers of all processes.
    """

    name: str
    num_examples: int
    num_classes: int
    decode: Callable[[tf.Tensor], tf.Tensor]
    read: Callable[[list[tuple[int, int]]], tf.data.Dataset]
    shuffle_buffer: int
    names: None = None
    class_names: tuple[str, ...] = ()
    value_range: None = None


def load(config, split, *, seed, workdir=None) -> Source | Stream:
    """Opens one split; downloads nothing.

    Args:
        config: `config.dataset`: name, path, data_dir, train_split, eval_split, probe_split, num_examples,
            num_classes, in_memory, shuffle_buffer.
        split: 'train', 'eval', 'probe', the labelled examples to judge features on, or 'validation'.
        seed: chooses the validation images of a folder that has none of its own, and which
            `config.num_examples` digits or images are trained on (of TFDS it is the first ones).
        workdir: where a folder's list of good images is kept, so that indices survive a restart.

    Returns:
        `Source`, or `Stream` for a TFDS dataset with `in_memory=False`.

    Raises:
        UserError: unknown or unprepared dataset, unknown split, empty or changed folder.
    """
    if split not in ("train", "eval", "probe", "validation"):
        raise UserError(f"split {split!r}: expected 'train', 'eval', 'probe' or 'validation'")
    wanted = config.num_examples if split == "train" else None
    if wanted is not None and wanted < 1:
        raise UserError(
            f"dataset.num_examples={wanted}: expected at least 1; "
            "raise or unset --config.dataset.num_examples"
        )
    if config.name not in ("digits", "folder", "arrays"):
        return _tfds(config, split, wanted)
    if split == "validation":
        raise UserError(
            f"dataset.validation_split={config.validation_split!r}: {config.name} has no such split; unset it"
        )
    if config.name == "arrays":
        from simclr_jax.data import arrays  # which needs `Source`

        source = arrays.load(split)
    else:
        source = _digits(split) if config.name == "digits" else _folder(config, split, seed, workdir)
    if wanted is None:
        return source
    _check_size(wanted, source.num_examples, source.name)
    return sample(source, wanted, seed=seed)


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
                reasons[str(source.names[row])] = folder.reason(error)
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


def _check_size(wanted, size, name):
    if wanted > size:
        raise UserError(
            f"dataset.num_examples={wanted}, but {name} has {size}; "
            "lower or unset --config.dataset.num_examples"
        )


def _digits(split):
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


def _folder(config, split, seed, workdir):
    ends = config.value_range
    if ends is not None and not (len(ends) == 2 and 0 <= ends[0] < ends[1] <= 65535):
        raise UserError(
            f"dataset.value_range={ends}: expected two numbers of 16 bits, the lower one first; set "
            "--config.dataset.value_range='(0, 4095)', or leave it out to have it told from the folder"
        )
    path = os.path.expanduser(config.path or "")
    listed = folder.catalogue(
        path,
        seed=seed if config.split_seed is None else config.split_seed,
        workdir=workdir,
        classes=config.classes,
        max_pixels=config.max_pixels,
        value_range=ends,
    )
    # A single image is for training, or for its features: then nothing is held out.
    names, labels = zip(*listed[split]) if listed[split] else ((), ())
    labels = np.asarray(labels, np.int32)
    paths = np.asarray([os.fsencode(os.path.join(path, name)) for name in names], object)
    found = len(listed["classes"])
    if config.num_classes is not None and config.num_classes < found:
        raise UserError(
            f"dataset.num_classes={config.num_classes}, but {shown(path)} has the {found} classes "
            f"{', '.join(map(shown, listed['classes'][:3]))}{', ...' if found > 3 else ''}; unset "
            "--config.dataset.num_classes, or set --config.dataset.classes=False for no labels"
        )
    value_range = listed["value_range"] and tuple(ends or listed["value_range"])
    source = Source(
        name=f"{shown(path)} ({split})",
        num_examples=len(names),
        num_classes=0 if (labels < 0).any() or not len(labels) else config.num_classes or found,
        decode=functools.partial(
            decode.decode, value_range=value_range or decode.FULL_RANGE, max_pixels=config.max_pixels
        ),
        records=paths,
        labels=labels,
        names=np.asarray(names, str),
        class_names=tuple(listed["classes"]),
        value_range=value_range,
        lost=Lost(f"{shown(path)} ({split})", len(names)),
    )
    vanished = set(listed["lost"]).intersection(names)
    if vanished:
        source.lost.add(dict.fromkeys(sorted(vanished), "vanished"))
    return source


def _tfds(config, split, wanted):
    import tensorflow_datasets as tfds  # takes seconds, and digits and folders do without

    specs = {"train": config.train_split, "eval": config.eval_split, "probe": config.probe_split}
    spec = config.validation_split if split == "validation" else specs[split]
    name = f"{config.name} ({spec})"
    builder = _builder(config)
    features = builder.info.features
    if "image" not in features:
        raise UserError(
            f"dataset.name={config.name!r} has the features {', '.join(features)}; "
            "expected 'image' among them; choose a dataset of images"
        )
    found = getattr(features["label"], "num_classes", None) if "label" in features else None
    classes = config.num_classes or found or 0
    if "label" not in features or "unlabelled" in spec:
        classes = 0
    class_names = tuple(getattr(features["label"], "names", None) or ()) if classes else ()
    if classes and found and classes < found:
        raise UserError(
            f"dataset.num_classes={classes}, but {config.name} has labels of {found} classes; "
            "unset --config.dataset.num_classes"
        )

    # One file after the other: the position in the split is the example's index.
    read_config = tfds.ReadConfig(
        interleave_cycle_length=1, num_parallel_calls_for_decode=1, try_autocache=False, skip_prefetch=True
    )

    def open_split(instruction, num_examples):
        dataset = builder.as_dataset(
            split=instruction, read_config=read_config, decoders={"image": tfds.decode.SkipDecoding()}
        )
        # tfds.testing.mock_data ignores which examples are asked for, and how many.
        return dataset.repeat().take(num_examples)

    num_examples, pieces = _extent(config, split, spec, builder, wanted)
    if config.in_memory:
        examples = open_split(spec, num_examples).map(lambda example: unpack(example, classes))
        records, labels = examples.batch(num_examples).get_single_element()
        labels = labels.numpy()
        if classes and (labels < 0).any():
            print(f"{name}: {(labels < 0).sum()} labels are below 0: the split is taken as without labels")
            classes, labels = 0, np.full_like(labels, -1)
        check_labels(name, classes, labels)
        records = tf.Variable(records, trainable=False)
        source = Source(name, num_examples, classes, decode.decode_bytes, records, labels)
        return source._replace(class_names=class_names)

    def read(ranges):
        parts = []
        for start, stop in ranges:
            for piece, first, last in pieces:
                if max(start, 0) < min(stop, last - first):
                    parts.append(
                        tfds.core.ReadInstruction(
                            piece, from_=first + max(start, 0), to=min(first + stop, last), unit="abs"
                        )
                    )
                start, stop = start - (last - first), stop - (last - first)
        return open_split(functools.reduce(operator.add, parts), sum(stop - start for start, stop in ranges))

    if classes:  # a split without labels tells it by its first ones
        first = open_split(spec, min(FIRST, num_examples)).map(lambda example: unpack(example, classes)[1])
        labels = np.array(list(first.as_numpy_iterator()))
        if (labels < 0).any():
            print(f"{name}: {(labels < 0).sum()} of the first labels are below 0: taken as without labels")
            classes, class_names = 0, ()
        check_labels(name, classes, labels)
    stream = Stream(name, num_examples, classes, decode.decode_bytes, read, config.shuffle_buffer)
    return stream._replace(class_names=class_names)


def _builder(config):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(config.name, data_dir=config.data_dir)
    except tfds.core.DatasetNotFoundError:
        close = difflib.get_close_matches(config.name.split("/")[0], tfds.list_builders())
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else "see https://www.tensorflow.org/datasets/catalog"
        )
        raise UserError(
            f"dataset.name={config.name!r}: expected 'digits', 'folder' or a name in TensorFlow "
            f"Datasets; {hint}"
        ) from None
    except ValueError as error:  # an unknown configuration or version; TFDS lists those that exist
        raise UserError(f"dataset.name={config.name!r}: {' '.join(str(error).split())}") from None


def _extent(config, split, spec, builder, wanted):
    """Returns the number of examples and, for ranges, the (split, first, last) that `spec` is made of."""
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    try:
        probe = builder.as_dataset(split=spec, decoders={"image": tfds.decode.SkipDecoding()})
        size = int(probe.cardinality())
        pieces = tfds.core.ReadInstruction.from_spec(spec).to_absolute(splits) if splits else []
    except AssertionError:
        command = f"tfds build {config.name}" + (f" --data_dir={config.data_dir}" if config.data_dir else "")
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
            command += f" --manual_dir=<folder>, after a manual download to <folder>: {instructions}"
        raise UserError(
            f"dataset.name={config.name!r} is not prepared in {builder.data_path}; run: {command}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"dataset.{split}_split={spec!r}: {' '.join(str(error).split())} "
            f"{config.name} has the splits {', '.join(splits)}; "
            f"set --config.dataset.{split}_split"
        ) from None
    pieces = [
        (part.splitname, part.from_ or 0, part.to or splits[part.splitname].num_examples) for part in pieces
    ]
    if size < 1:  # as under tfds.testing.mock_data
        wanted = wanted or config.num_examples
    if size < 1 and wanted is None:
        raise UserError(
            f"{config.name} does not tell the size of {spec!r}; set --config.dataset.num_examples"
        )
    if splits and wanted is not None:
        _check_size(wanted, size, f"{config.name} ({spec})")
    size = size if wanted is None else wanted
    return size, pieces or [(spec, 0, size)]
