"""Dataset name -> examples: digits, a folder of images, or anything in TensorFlow Datasets."""

import difflib
import functools
import operator
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from simclr_jax.data import decode, folder
from simclr_jax.errors import UserError


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
    """

    name: str
    num_examples: int
    num_classes: int
    decode: Callable[[tf.Tensor], tf.Tensor]
    records: np.ndarray | tf.Variable
    labels: np.ndarray
    names: np.ndarray | None = None
    class_names: tuple[str, ...] = ()


class Stream(NamedTuple):
    """Examples too big for memory, read in order from ranges of the split.

    Attributes:
        name, num_examples, num_classes, decode, names, class_names: as in `Source`.
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
    if config.name not in ("digits", "folder"):
        return _tfds(config, split, wanted)
    if split == "validation":
        raise UserError(
            f"dataset.validation_split={config.validation_split!r}: {config.name} has no such split; unset it"
        )
    source = _digits(split) if config.name == "digits" else _folder(config, split, seed, workdir)
    if wanted is None:
        return source
    _check_size(wanted, source.num_examples, source.name)
    return sample(source, wanted, seed=seed)


def unpack(example: dict[str, tf.Tensor], num_classes: int) -> tuple[tf.Tensor, tf.Tensor]:
    """An undecoded TFDS example -> (record, label int32, -1 where there are no classes)."""
    return example["image"], tf.cast(example["label"], tf.int32) if num_classes else tf.constant(-1)


def sample(source: Source | Stream, size: int, *, seed: int) -> Source | Stream:
    """At most `size` of the examples: random ones, or the first of a `Stream`, which is shuffled on disk."""
    if size >= source.num_examples:
        return source
    if isinstance(source, Stream):
        return source._replace(num_examples=size)
    return subset(source, np.random.default_rng([seed, 0]).permutation(source.num_examples)[:size])


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
    path = os.path.expanduser(config.path or "")
    listed = folder.catalogue(path, seed=seed, workdir=workdir)
    if not listed[split]:
        raise UserError(f"dataset.path={path!r}: no images for split {split!r}; add more images")
    names, labels = zip(*listed[split])
    labels = np.asarray(labels, np.int32)
    paths = np.asarray([os.fsencode(os.path.join(path, name)) for name in names], object)
    classes = 0 if (labels < 0).any() else config.num_classes or len(listed["classes"])
    source = Source(f"{path} ({split})", len(names), classes, folder.decode, paths, labels)
    return source._replace(names=np.asarray(names), class_names=tuple(listed["classes"]))


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
        if (labels < 0).any():
            classes, labels = 0, np.full_like(labels, -1)
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
