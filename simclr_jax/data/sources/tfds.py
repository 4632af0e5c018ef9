"""Anything in TensorFlow Datasets: undecoded examples, in memory or as a stream."""

import difflib
import functools
import operator

import numpy as np
import tensorflow as tf

from simclr_jax.data.datasets import FIRST, Source, Stream, check_labels, check_size, unpack
from simclr_jax.data.decode import decode_bytes
from simclr_jax.process.errors import UserError


def load(config, split: str, wanted: int | None) -> Source | Stream:
    """`wanted` examples of a split, all for None; see `datasets.load`."""
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
        source = Source(name, num_examples, classes, decode_bytes, records, labels)
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
    stream = Stream(name, num_examples, classes, decode_bytes, read, config.shuffle_buffer)
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
        check_size(wanted, size, f"{config.name} ({spec})")
    size = size if wanted is None else wanted
    return size, pieces or [(spec, 0, size)]
