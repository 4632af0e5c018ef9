"""Any dataset in TensorFlow Datasets: undecoded examples, in memory or as a stream."""

import difflib
import functools
import operator

import numpy as np
import tensorflow as tf

from simclr_jax.data.decode import decode_bytes
from simclr_jax.data.source import Source, check_labels, check_size
from simclr_jax.process import UserError, say

FIRST = 64  # Labels of a stream that are read before it is used, to tell whether the split is labelled.


def load(config, split: str, **_) -> Source:
    """Opens a split; 'train' has the first `config.num_examples` examples only; see `datasets.load`."""
    import tensorflow_datasets as tfds  # The import takes seconds; digits and folders do not need it.

    specs = {"train": config.train_split, "eval": config.eval_split, "probe": config.probe_split}
    spec = config.validation_split if split == "validation" else specs[split]
    name = f"{config.name} ({spec})"
    builder = _make_builder(config)
    num_classes, class_names = _classes(config, spec, builder.info.features)
    # Files are read one after the other: the position in the split is the example's index.
    read_config = tfds.ReadConfig(
        interleave_cycle_length=1, num_parallel_calls_for_decode=1, try_autocache=False, skip_prefetch=True
    )

    def unpack(example):
        return example["image"], tf.cast(example["label"], tf.int32) if num_classes else tf.constant(-1)

    def open_split(instruction, num_examples):
        dataset = builder.as_dataset(
            split=instruction, read_config=read_config, decoders={"image": tfds.decode.SkipDecoding()}
        )
        # tfds.testing.mock_data ignores the range of examples, and so their number.
        return dataset.repeat().take(num_examples).map(unpack)

    num_examples, pieces = _extent(config, split, spec, builder)
    records = read = None
    labels = np.zeros(0, np.int32)
    if config.in_memory:
        records, labels = open_split(spec, num_examples).batch(num_examples).get_single_element()
        records, labels = tf.Variable(records, trainable=False), labels.numpy()
    else:
        if num_classes:
            first = open_split(spec, min(FIRST, num_examples))
            labels = np.array([label for _, label in first.as_numpy_iterator()])

        def read(ranges):
            instructions = [part for start, stop in ranges for part in _instructions(pieces, start, stop)]
            total = sum(stop - start for start, stop in ranges)
            return open_split(functools.reduce(operator.add, instructions), total)

    if num_classes and (labels < 0).any():
        which = "labels are below 0: the split is" if config.in_memory else "of the first labels are below 0:"
        say(f"{name}: {(labels < 0).sum()} {which} taken as without labels")
        num_classes, class_names, labels = 0, (), np.full_like(labels, -1)
    check_labels(name, num_classes, labels)
    return Source(
        name,
        num_examples,
        num_classes,
        decode_bytes,
        records,
        labels if config.in_memory else None,
        class_names=class_names,
        read=read,
        shuffle_buffer=0 if config.in_memory else config.shuffle_buffer,
    )


def _make_builder(config):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(config.name, data_dir=config.data_dir)
    except tfds.core.DatasetNotFoundError:
        close = difflib.get_close_matches(config.name.split("/")[0], tfds.list_builders())
        catalog = "see https://www.tensorflow.org/datasets/catalog"
        hint = f"did you mean {' or '.join(close)}?" if close else catalog
        expected = "expected 'digits', 'folder' or a name in TensorFlow Datasets"
        raise UserError(f"dataset.name={config.name!r}: {expected}; {hint}") from None
    except ValueError as error:  # An unknown configuration or version; TFDS lists those that exist.
        raise UserError(f"dataset.name={config.name!r}: {' '.join(str(error).split())}") from None


def _classes(config, spec, features):
    """Returns the number of classes, 0 without labels, and their names."""
    if "image" not in features:
        raise UserError(
            f"dataset.name={config.name!r} has the features {', '.join(features)}, and no 'image': choose a "
            "dataset of images"
        )
    if "label" not in features or "unlabelled" in spec:
        return 0, ()
    label = features["label"]
    num_classes = getattr(label, "num_classes", None) or 0
    if config.num_classes and config.num_classes < num_classes:
        raise UserError(
            f"dataset.num_classes={config.num_classes}, but {config.name} has labels of {num_classes} "
            "classes; unset --config.dataset.num_classes"
        )
    num_classes = config.num_classes or num_classes
    return num_classes, tuple(getattr(label, "names", None) or ()) if num_classes else ()


def _extent(config, split, spec, builder):
    """Returns the number of examples, and (split, start, stop) of TFDS for each piece of `spec`."""
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    num_requested = config.num_examples if split == "train" else None
    try:
        dataset = builder.as_dataset(split=spec, decoders={"image": tfds.decode.SkipDecoding()})
        size = int(dataset.cardinality())
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
            f"dataset.{split}_split={spec!r}: {' '.join(str(error).split())} {config.name} has the splits "
            f"{', '.join(splits)}; set --config.dataset.{split}_split"
        ) from None
    if size < 1:  # As under tfds.testing.mock_data.
        num_requested = num_requested or config.num_examples
    if size < 1 and num_requested is None:
        raise UserError(f"{config.name} ({spec}) has no known size; set --config.dataset.num_examples")
    if splits and num_requested is not None:
        check_size(num_requested, size, f"{config.name} ({spec})")
    size = size if num_requested is None else num_requested
    pieces = [
        (part.splitname, part.from_ or 0, part.to or splits[part.splitname].num_examples) for part in pieces
    ]
    return size, pieces or [(spec, 0, size)]


def _instructions(pieces, start, stop):
    """Yields the instructions that read examples `start` to `stop` of pieces laid end to end."""
    import tensorflow_datasets as tfds

    offset = 0
    for split, first, last in pieces:
        begin, end = max(start - offset, 0), min(stop - offset, last - first)
        if begin < end:
            yield tfds.core.ReadInstruction(split, from_=first + begin, to=first + end, unit="abs")
        offset += last - first
