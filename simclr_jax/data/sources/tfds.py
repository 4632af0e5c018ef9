"""Any dataset in TensorFlow Datasets: undecoded examples, in memory, by index from files or as a stream."""

import difflib
import functools
import importlib.util
import operator
import os

import numpy as np
import tensorflow as tf
from etils import epy

from simclr_jax.data import CORES
from simclr_jax.data.decode import decode_bytes
from simclr_jax.data.source import Source, check_labels, check_size
from simclr_jax.process import UserError, reason_of, say, trial

with epy.lazy_imports():  # The import takes seconds; digits and folders do not need it.
    import tensorflow_datasets as tfds

_TEXTS = ("name", "group")  # Features that `data.prepare` writes.
FIRST = 64  # Labels of a stream that are read before it is used, to tell whether the split is labelled.


def load(config, split: str, **_) -> Source:
    """Opens a split; 'train' has the first `config.num_examples` examples only; see `datasets.load`."""
    specs = {"train": config.train_split, "eval": config.eval_split, "probe": config.probe_split}
    spec = config.validation_split if split == "validation" else specs[split]
    name = f"{config.name} ({spec})"
    builder = _make_builder(config)
    _check_images(config, name, builder)
    num_classes, class_names = _classes(config, spec, name, builder.info.features)
    is_array_record = builder.info.as_proto.file_format == "array_record" and builder.is_prepared()
    num_examples, pieces = _extent(config, split, spec, builder, is_array_record)
    # Files are read one after the other: the position in the split is the example's index.
    read_config = tfds.ReadConfig(
        interleave_cycle_length=1, num_parallel_calls_for_decode=1, try_autocache=False, skip_prefetch=True
    )

    texts = [key for key in _TEXTS if key in builder.info.features]
    fetch_example = _make_fetch(builder, spec, num_classes, texts) if is_array_record else None

    def read_examples(ranges):
        if fetch_example:
            parts = [tf.data.Dataset.range(start, stop) for start, stop in ranges]
            index = functools.reduce(tf.data.Dataset.concatenate, parts)
            return index.map(fetch_example, num_parallel_calls=CORES)
        instructions = [part for start, stop in ranges for part in _instructions(pieces, start, stop)]
        instruction = functools.reduce(operator.add, instructions)
        decoders = {"image": tfds.decode.SkipDecoding()}
        dataset = builder.as_dataset(split=instruction, read_config=read_config, decoders=decoders)
        # tfds.testing.mock_data ignores the range of examples, and so their number.
        return dataset.repeat().take(sum(stop - start for start, stop in ranges))

    def unpack(example):
        return example["image"], tf.cast(example["label"], tf.int32) if num_classes else tf.constant(-1)

    def read(ranges):
        return read_examples(ranges).map(unpack)

    def unpack_all(example):
        return unpack(example), tuple(example[key] for key in texts)

    def read_names(start, stop):
        names = read_examples([(start, stop)]).map(lambda example: example["name"])
        return _decode_texts(names.batch(stop - start).get_single_element())

    in_memory = config.in_memory and not trial.active
    num_read = num_examples if in_memory else min(FIRST, num_examples)
    try:
        examples = read_examples([(0, num_read)]).map(unpack_all)
        (records, labels), columns = examples.batch(num_read).get_single_element()
    except tf.errors.OpError as error:
        raise UserError(f"{name} cannot be read: {reason_of(error)}; restore {builder.data_path}") from None
    labels = labels.numpy()
    if num_classes and (labels < 0).any():
        which = "labels are below 0: the split is" if config.in_memory else "of the first labels are below 0:"
        say(f"{name}: {(labels < 0).sum()} {which} taken as without labels")
        num_classes, class_names, labels = 0, (), np.full_like(labels, -1)
    check_labels(name, num_classes, labels)
    source = Source(name, num_examples, num_classes, decode_bytes, class_names=class_names)
    if trial.active and config.in_memory:  # Labels that are not read are taken to be of each class.
        labels = np.resize(np.arange(num_classes) if num_classes else -1, num_examples).astype(np.int32)
        return source._replace(records=np.resize(records.numpy(), num_examples), labels=labels)
    if config.in_memory:
        columns = {f"{key}s": _decode_texts(column) for key, column in zip(texts, columns)}
        return source._replace(records=tf.Variable(records, trainable=False), labels=labels, **columns)
    fetch = fetch_example and (lambda index: unpack(fetch_example(index)))
    source = source._replace(read=read, fetch=fetch, read_names=read_names if "name" in texts else None)
    return source._replace(shuffle_buffer=0 if fetch else config.shuffle_buffer)


def _decode_texts(texts):
    return np.array([os.fsdecode(text) for text in texts.numpy()])


def _make_builder(config):
    try:
        return tfds.builder(config.name, data_dir=config.data_dir)
    except tfds.core.DatasetNotFoundError:
        close = difflib.get_close_matches(config.name.split("/")[0], tfds.list_builders())
        catalog = "see https://www.tensorflow.org/datasets/catalog"
        hint = f"did you mean {' or '.join(close)}?" if close else catalog
        expected = "expected 'digits', 'folder' or a name in TensorFlow Datasets"
        raise UserError(f"dataset.name={config.name!r}: {expected}; {hint}") from None
    except (ValueError, AssertionError) as error:  # An unknown configuration or version; TFDS lists all.
        raise UserError(f"dataset.name={config.name!r}: {' '.join(str(error).split())}") from None


def _prepare(config, data_dir, options="", download=""):
    """Returns a command that prepares a dataset; `tfds build` needs a package that TFDS does not ask for."""
    options = (f", data_dir={data_dir!r}" if data_dir else "") + options
    builder = f"tfds.builder({config.name!r}{options})"
    return f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare({download})"'


def _check_images(config, name, builder):
    """Raises a UserError unless a dataset has images, and its files can be read; notes what is changed."""
    features, file_format = builder.info.features, builder.info.as_proto.file_format
    image = dict(features).get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype == np.float32:
        raise UserError(
            f"dataset.name={config.name!r} has the features {' '.join(repr(features).split())}, and no "
            "'image' of 8 or 16 bits: choose a dataset of images"
        )
    if image.np_dtype == np.uint16:
        say(f"note: {name}: images have 16 bits; 0 becomes black, 65535 white")
    if image.shape[-1] in (2, 4):
        say(f"note: {name}: what is transparent in an image becomes white")
    if file_format in ("array_record", "riegeli") and not importlib.util.find_spec(file_format):
        install = "pip install array_record, or " if file_format == "array_record" else ""
        command = _prepare(config, "<another folder>", ", file_format='tfrecord'")
        raise UserError(
            f"dataset.name={config.name!r} comes in {file_format} files, whose package is not installed: "
            f"{install}run {command}, and set --config.dataset.data_dir to that folder"
        )


def _classes(config, spec, name, features):
    """Returns the number of classes, 0 without labels, and their names."""
    if "label" not in features or "unlabelled" in spec:
        return 0, ()
    label = features["label"]
    is_class = label.shape == () and np.dtype(label.np_dtype).kind in "iub"
    num_classes = getattr(label, "num_classes", None) or 0
    if is_class and config.num_classes and config.num_classes < num_classes:
        raise UserError(
            f"dataset.num_classes={config.num_classes}, but {config.name} has labels of {num_classes} "
            "classes; unset --config.dataset.num_classes"
        )
    num_classes = config.num_classes or num_classes
    if not is_class or not num_classes:
        reason = "of which --config.dataset.num_classes gives the number" if is_class else "not one class"
        label = " ".join(repr(label).split())
        say(f"note: {name}: the label is {label}, {reason}: taken as without labels")
        return 0, ()
    return num_classes, tuple(getattr(label, "names", None) or ())


def _make_fetch(builder, spec, num_classes, texts):
    """Builds index -> example, from ArrayRecord files, which no tf.data.Dataset opens."""
    examples = builder.as_data_source(spec, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    features = {key: tf.io.FixedLenFeature([], tf.string) for key in ("image", *texts)}
    if num_classes:
        features["label"] = tf.io.FixedLenFeature([], tf.int64)

    def fetch(index):
        example = tf.numpy_function(examples.__getitem__, [index], tf.string, stateful=False)
        return tf.io.parse_single_example(example, features)

    return fetch


def _extent(config, split, spec, builder, is_array_record):
    """Returns the number of examples, and (split, start, stop) of TFDS for each piece of `spec`."""
    splits = builder.info.splits
    num_requested = config.num_examples if split == "train" else None
    try:
        if is_array_record:
            size = splits[spec].num_examples
            if not size:
                raise ValueError("It corresponds to no data.")
        else:
            dataset = builder.as_dataset(split=spec, decoders={"image": tfds.decode.SkipDecoding()})
            size = int(dataset.cardinality())
        pieces = tfds.core.ReadInstruction.from_spec(spec).to_absolute(splits) if splits else []
    except AssertionError:
        download = after = ""
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            download = "download_config=tfds.download.DownloadConfig(manual_dir='<folder>')"
            instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
            after = f", after a manual download to <folder>: {instructions}"
        command = _prepare(config, config.data_dir, download=download) + after
        raise UserError(f"{config.name} is not prepared in {builder.data_path}; run: {command}") from None
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
    offset = 0
    for split, first, last in pieces:
        begin, end = max(start - offset, 0), min(stop - offset, last - first)
        if begin < end:
            yield tfds.core.ReadInstruction(split, from_=first + begin, to=first + end, unit="abs")
        offset += last - first
