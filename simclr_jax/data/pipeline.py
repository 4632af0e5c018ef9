"""Makes batches of numpy arrays from examples, the same global batches for any number of processes."""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from simclr_jax.data import CORES, augment
from simclr_jax.data.source import Source, check_labels, find_lost, lost_rows
from simclr_jax.process import UserError

BLOCK = 8192  # Examples that Python hands to tf.data at a time.
MAX_READERS = 128  # Readers of a stream, over all processes.
_CALLS = 4 * CORES  # Images that are decoded at a time; on 2 cores, one a core is 2 % slower.


def train_batches(
    source: Source,
    transform: Callable,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    dtype: str | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of every global batch, from `start_step` on, without end.

    With random access, to files too, the order of examples depends on (seed, epoch) only, every example comes
    once an epoch, and a batch may span epochs. The order of other streams depends on the batch size and the
    shuffle buffer, too; it drops the remainder that fills no batch, other examples in every epoch. The seed
    of an augmentation depends on (seed, epoch, index) only. So the rows of all processes, in the order of the
    processes, are the same global batch for any number of them, and an iterator that starts at step k yields
    the same batches as one that has made k steps. An example that (seed, epoch, index) chooses takes the
    place of a file that a process can no longer read.

    Args:
      source: from `datasets.load`.
      transform: (image [h, w, c], seed int32 [2]) -> {name: image [s, s, c], float32 or `dtype`, or a
        vector}, the image as `Source.decode` makes it.
      batch_size: rows of the global batch; may exceed the number of examples, but not of a stream.
      seed: decides the order and the augmentations.
      start_step: the first step to yield; records of earlier ones are not decoded.
      process_index: this process.
      process_count: number of processes that share every batch.
      dtype: type of images: 'uint8', clipped to [0, 1] first, or 'float16' or 'float32', as they are; None:
        that of the source.

    Returns:
      Iterator of dicts, b = batch_size // process_count: the values of `transform`, images as `dtype`
      [b, s, s, c]; 'label' int32 [b], -1 where there is none; 'index' int64 [b].

    Raises:
      UserError: `batch_size` cannot be shared by the processes, or exceeds a stream; while iterating, a
        label is out of range, or too many files can no longer be read.
    """
    rows = _rows_of_process(batch_size, process_count)
    augmented = functools.partial(
        _augmented, source=source, transform=transform, rows=rows, seed=seed, dtype=dtype
    )
    if source.random_access or source.fetch:
        order = example_order(source, batch_size, seed, process_index * rows, rows)
        fetch = _fetch(source)

        def start(step):
            epochs = _random_access(order, step)
            batches = augmented(epochs, read=lambda epoch, index: (epoch, index, *fetch(index)))
            return zip(batches, itertools.count(step + 1))

        all_rows = np.arange(source.num_examples)
        batches = _without_lost(source, start, start_step, lambda step: (order(step, 1)[1], all_rows))
        return _check_each(source, batches) if source.fetch else batches

    readers = math.gcd(batch_size, MAX_READERS)
    if readers % process_count:
        raise UserError(
            f"batch_size={batch_size}: {process_count} processes cannot share {readers} readers of a stream; "
            f"set --config.batch_size to a multiple of {process_count} that is a power of two, or "
            "--config.dataset.in_memory=True"
        )
    if batch_size > source.num_examples:
        raise UserError(
            f"batch_size={batch_size} exceeds the {source.num_examples} examples of "
            f"{source.name}; lower --config.batch_size or set --config.dataset.in_memory=True"
        )
    share = readers // process_count
    readers_here = range(process_index * share, (process_index + 1) * share)
    epochs = _streamed(source, batch_size, seed, start_step, readers, readers_here)
    return _check_each(source, augmented(epochs, read=lambda epoch, row: (epoch, row[0], *row[1])))


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    transform: Callable | None = None,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every example exactly once over all processes; each process reads its own range in order.

    Files that can no longer be read have no row.

    Args:
      source: from `datasets.load`.
      image_size: s.
      batch_size: rows over all processes.
      transform: as in `train_batches`, in epoch 0; None: `augment.eval_view`, as 'image'.
      seed: decides the random numbers of `transform`.
      process_index: this process.
      process_count: number of processes that share the examples.

    Returns:
      Iterator of dicts, b = batch_size // process_count: 'image', or the values of `transform`, as
      `source.dtype` [b, s, s, c], 'label' int32 [b], 'index' int64 [b], 'mask' bool [b]. Where mask is False
      the row is padding (image 0, label and index -1): every process yields the same number of batches of the
      same shape.

    Raises:
      UserError: `batch_size` cannot be shared by the processes; while iterating, as in `train_batches`.
    """
    rows = _rows_of_process(batch_size, process_count)
    share = -(-source.num_examples // process_count)
    num_batches = -(-share // rows)
    index = np.arange(source.num_examples)[process_index * share : (process_index + 1) * share]
    transform = transform or (lambda image, _: {"image": augment.eval_view(image, image_size)})
    view = functools.partial(_eval, source, transform, seed, rows)
    if not source.random_access:
        return _check_each(source, view(index, num_batches))

    def readable(index):
        return index[~lost_rows(source)[index]]

    def start(state):
        done, index = state[0], readable(state[1])
        for batch in view(index, num_batches - done):
            done, index = done + 1, index[rows:]
            yield batch, (done, index)

    return _without_lost(source, start, (0, index), lambda state: (readable(state[1])[:rows], state[1]))


def image_shape(source: Source) -> tuple[int, int, int]:
    """Returns the shape, [h, w, c], of the first image of a source with random access."""
    batches = eval_batches(
        source, image_size=0, batch_size=1, transform=lambda image, _: {"shape": tf.shape(image)}
    )
    return tuple(next(batches)["shape"][0].tolist())


def load_images(source: Source, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes all images of a source with random access.

    Returns:
      `source.dtype` [n, *shape]; black where a file can no longer be read.

    Raises:
      UserError: an image has another shape.
    """

    def transform(image, _):
        return {"image": tf.image.resize_with_crop_or_pad(image, *shape[:2]), "shape": tf.shape(image)}

    images = np.zeros((source.num_examples, *shape), source.dtype)
    for batch in eval_batches(source, image_size=0, batch_size=16, transform=transform):
        batch = {name: rows[batch["mask"]] for name, rows in batch.items()}
        other = batch["shape"][(batch["shape"] != shape).any(axis=1)]
        if len(other):
            raise UserError(
                f"dataset.on_device=True takes images of one size, but {source.name} has {shape[0]} x "
                f"{shape[1]} and {other[0][0]} x {other[0][1]} pixels: set --config.dataset.on_device=False"
            )
        images[batch["index"]] = batch["image"]
    return images


def eval_view(image: np.ndarray, image_size: int, proportion: float | None, dtype: str) -> np.ndarray:
    """Returns the view that `eval_batches` makes, [s, s, c], of an image in memory.

    Args:
      image: uint8 or floats in [0, 1], [h, w, c].
      image_size: s.
      proportion: as in `augment.eval_view`.
      dtype: as in `train_batches`.
    """
    return _cast(augment.eval_view(image, image_size, proportion=proportion), dtype).numpy()


def _rows_of_process(batch_size, process_count):
    if batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes; "
            f"set --config.batch_size to a multiple of {process_count}"
        )
    return batch_size // process_count


def _without_lost(source, start, state, rows_at):
    """Yields the batches of `start(state)`; starts again, without lost files, when one cannot be read.

    As long as all files can be read, this costs nothing.

    Args:
      source: the examples.
      start: state -> iterator of (batch, state behind the batch).
      state: the first state.
      rows_at: state -> the rows of the next batch, and all rows that may still come.
    """
    has_failed = False
    failures = tf.errors.OpError  # A local name, since modules are emptied before generators end.
    while True:
        try:
            for batch, following in start(state):
                yield batch
                state, has_failed = following, False
            return
        except failures:
            if not find_lost(source, *rows_at(state)) and has_failed:  # The first time, a disk may hiccup.
                raise
            has_failed = True


def _check_each(source, batches):
    for batch in batches:
        check_labels(source.name, source.num_classes, batch["label"][batch.get("mask", slice(None))])
        yield batch


def example_order(source: Source, batch_size: int, seed: int, first_row: int, rows: int) -> Callable:
    """Builds order(step, steps) -> epochs and indices, int64 [steps * rows], of these rows of the batches.

    Position p of the endless order of examples is example permutation(seed, p // n)[p % n]. A lost example is
    replaced by one that (seed, epoch, index) chooses.
    """

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(source.num_examples)

    def order(step, steps):
        position = (step + np.arange(steps))[:, None] * batch_size + first_row + np.arange(rows)
        epoch, offset = np.divmod(position.ravel(), source.num_examples)
        index = np.concatenate([permutation(e)[offset[epoch == e]] for e in np.unique(epoch)])
        lost = lost_rows(source)
        if lost.any():
            readable = np.flatnonzero(~lost)
            for place in np.flatnonzero(lost[index]):
                index[place] = np.random.default_rng([seed, epoch[place], index[place]]).choice(readable)
        return epoch, index

    return order


def _random_access(order, step):
    """Yields (steps, dataset of (epoch, index)) once: the dataset has no end."""

    def blocks():
        steps = max(1, BLOCK // len(order(step, 1)[0]))
        for begin in itertools.count(step, steps):
            yield order(begin, steps)

    spec = tf.TensorSpec([None], tf.int64)
    yield sys.maxsize, tf.data.Dataset.from_generator(blocks, output_signature=(spec, spec)).unbatch()


def _fetch(source):
    """Builds index -> (record, label), of variables, since a graph holds at most 2 GB of constants."""
    if source.fetch:
        return source.fetch
    records = source.records
    if not isinstance(records, tf.Variable):
        records = tf.Variable(records, trainable=False)
    labels = tf.Variable(source.labels, trainable=False)
    return lambda index: (tf.gather(records, index), tf.gather(labels, index))


def _streamed(source, batch_size, seed, start_step, readers, readers_here):
    """Yields (steps, dataset of (epoch, (index, (record, label)))) for one epoch after the other.

    Readers own ranges of the split, whatever process they are in, and each fills its rows of every batch: so
    the global batch is the same for any number of processes.
    """
    rows = batch_size // readers
    steps = source.num_examples // batch_size
    epoch, first_step = divmod(start_step, steps)
    while True:
        parts = [
            _reader(source, reader, readers, seed, epoch, first_step * rows).prefetch(rows)
            for reader in readers_here
        ]
        turns = tf.data.Dataset.from_tensor_slices(np.repeat(np.arange(len(parts)), rows))
        examples = tf.data.Dataset.choose_from_datasets(parts, turns.repeat(steps - first_step))
        epochs = tf.data.Dataset.from_tensors(np.int64(epoch)).repeat()
        yield steps - first_step, tf.data.Dataset.zip(epochs, examples)
        epoch, first_step = epoch + 1, 0


def _reader(source, reader, readers, seed, epoch, first_row):
    """Builds a dataset of (index, (record, label)): a reader's range, shuffled, from `first_row` on.

    Each block is shuffled by a seed of its own. So the block of a row is known without reading, and a resumed
    run reads the rest of the epoch and the rows of one block that come before.
    """
    start, stop = (part * source.num_examples // readers for part in (reader, reader + 1))
    rng = np.random.default_rng([seed, epoch, reader])
    # The examples that fill no batch are read last. Every epoch begins at another example, so that other
    # examples fill no batch and share a block.
    middle = int(rng.integers(start, stop))
    largest = max(1, source.shuffle_buffer // readers)
    # Blocks differ in size, or all readers would fill theirs in the same step.
    block = int(rng.integers(largest - largest // 4, largest + 1))
    first_block = first_row // block
    begin = middle + first_block * block  # The range continues at its start.
    ranges = [(begin, stop), (start + max(0, begin - stop), middle)]
    ranges = [(low, high) for low, high in ranges if low < high]
    index = functools.reduce(tf.data.Dataset.concatenate, [tf.data.Dataset.range(*pair) for pair in ranges])
    seeds = rng.integers(2**31, size=-(-(stop - start) // block))[first_block:]
    blocks = tf.data.Dataset.zip(
        tf.data.Dataset.from_tensor_slices(seeds),
        tf.data.Dataset.zip(index, source.read(ranges)).window(block),
    )
    shuffled = blocks.flat_map(lambda seed, part: tf.data.Dataset.zip(part).shuffle(block, seed=seed))
    return shuffled.skip(first_row - first_block * block)


def _augmented(epochs, read, source, transform, rows, seed, dtype):
    """Yields augmented batches of one epoch after the other.

    `read` turns an element of a dataset in `epochs` into (epoch, index, record, label).
    """

    # Without tf.function, every epoch would trace the function again; AutoGraph takes seconds to read it.
    @tf.function(autograph=False)
    def views(*element):
        epoch, index, record, label = read(*element)
        images = _transformed(source, transform, record, seed, epoch, index, dtype)
        return images | {"label": label, "index": index}

    def start():
        steps, examples = next(epochs)
        examples = examples.map(views, num_parallel_calls=_CALLS).batch(rows, drop_remainder=True)
        return steps, examples.prefetch(2).with_options(_options()).as_numpy_iterator()

    following = start()
    while True:
        steps, batches = following
        for step in range(steps):
            # The shuffle buffers of the next epoch fill during the last tenth of this one.
            if step == steps - 1 - steps // 10:
                following = start()
            yield next(batches)


def _eval(source, transform, seed, rows, index, num_batches):
    """Yields `num_batches` batches of the examples `index`, int64 [m], then of padding.

    The index of a stream is a range.
    """

    @tf.autograph.experimental.do_not_convert  # AutoGraph takes seconds to read it.
    def view(index, example):
        record, label = example
        images = _transformed(source, transform, record, seed, 0, index)
        return images | {"label": label, "index": index, "mask": True}

    # A process without examples opens one example, which tells it the shape of a batch, and reads none.
    opened = index if len(index) else np.zeros(1, np.int64)
    indices = tf.data.Dataset.from_tensor_slices(opened)
    fetch = _fetch(source) if source.random_access else None  # A name keeps its variables alive.
    examples = indices.map(fetch) if fetch else source.read([(opened[0], opened[-1] + 1)])
    examples = tf.data.Dataset.zip(indices, examples).take(len(index))
    examples = examples.map(view, num_parallel_calls=_CALLS)
    padding = {
        name: np.full([rows, *spec.shape], -1 if name in ("label", "index") else 0, spec.dtype.as_numpy_dtype)
        for name, spec in examples.element_spec.items()
    }
    batches = examples.batch(rows).prefetch(2).with_options(_options()).as_numpy_iterator()
    nothing = {name: value[:0] for name, value in padding.items()}
    for _ in range(num_batches):
        batch = next(batches, nothing)
        missing = rows - len(batch["mask"])
        yield {
            name: np.concatenate([value, padding[name][:missing]]) if missing else value
            for name, value in batch.items()
        }


def _transformed(source, transform, record, seed, epoch, index, dtype=None):
    """Returns the views of a record, images as `dtype`; their seed is folded from (seed, epoch, index)."""
    fold_in = tf.random.experimental.stateless_fold_in
    key = fold_in(fold_in(tf.constant([seed, 0]), tf.cast(epoch, tf.int32)), tf.cast(index, tf.int32))
    views = transform(source.decode(record), key)
    dtype = dtype or source.dtype
    return {
        name: _cast(value, dtype) if value.shape.rank == 3 and value.dtype != dtype else value
        for name, value in views.items()
    }


def _cast(image, dtype):
    return tf.cast(tf.clip_by_value(tf.round(image * 255), 0, 255) if dtype == "uint8" else image, dtype)


def _options():
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_warm_start = True
    # The map already keeps every core busy, so its operations get no threads of their own.
    options.autotune.enabled = False
    options.experimental_optimization.map_and_batch_fusion = True
    options.threading.private_threadpool_size = CORES
    options.threading.max_intra_op_parallelism = 1
    return options
