"""Examples -> batches of numpy arrays, the same global batches for any number of processes."""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

from simclr_jax.data import CORES, augment
from simclr_jax.data.datasets import Source, Stream, check_labels, find_lost, lost_rows, unpack
from simclr_jax.process.errors import UserError

BLOCK = 8192  # examples that Python hands to tf.data at a time
MAX_READERS = 128  # of a streamed split, over all processes
_CALLS = 4 * CORES  # images at work at a time; on 2 cores one a core is 2 % slower, two are as fast


def train_batches(
    source: Source | Stream,
    transform: Callable,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    dtype: str = "uint8",
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of every global batch, from `start_step` on, without end.

    The order of examples depends on (seed, epoch) only, the seed of an augmentation on
    (seed, epoch, index) only. So the rows of all processes, in the order of the processes, are the same
    global batch for any number of them, and starting at step k yields what a fresh iterator yields after
    k steps. In the place of a file that a process finds it can no longer read comes another that (seed,
    epoch, index) chooses. From a `Source` every example comes once an epoch, and a batch may span epochs;
    from a `Stream` the few examples that fill no batch are left out, others in every epoch.

    Args:
        source: from `datasets.load`.
        transform: (image uint8 [h, w, 3], seed int32 [2]) -> {name: image [s, s, 3], float32 or `dtype`
            already, or a vector}.
        batch_size: rows of the global batch; may exceed the number of examples of a `Source`.
        seed: of the order and the augmentations.
        start_step: the first step to yield; records of earlier ones are not decoded.
        process_index, process_count: this process, and how many share every batch.
        dtype: of images: 'uint8', clipped to [0, 1] first, or 'float16' or 'float32', as they are.

    Returns:
        Iterator of dicts, b = batch_size // process_count: what `transform` returns, images as `dtype`
        [b, s, s, 3]; 'label' int32 [b], -1 where there is none; 'index' int64 [b].

    Raises:
        UserError: `batch_size` cannot be shared by the processes, or exceeds a `Stream`; while iterating, a
            label is out of range, or too many files can no longer be read.
    """
    rows = _rows(batch_size, process_count)
    augmented = functools.partial(
        _augmented,
        source=source,
        transform=transform,
        rows=rows,
        seed=seed,
        dtype=dtype,
    )
    if isinstance(source, Source):
        order = _order(source, batch_size, seed, process_index * rows, rows)
        fetch = _fetch(source)

        def start(step):
            return augmented(_random_access(order, step), lambda epoch, index: (epoch, index, *fetch(index)))

        everything = np.arange(source.num_examples)
        return _surviving(source, start, start_step, lambda step: (order(step, 1)[1], everything))

    readers = math.gcd(batch_size, MAX_READERS)
    if readers % process_count:
        raise UserError(
            f"batch_size={batch_size} divides a streamed split among {readers} readers, which "
            f"{process_count} processes cannot share; set --config.batch_size to a multiple of "
            f"{process_count} that is a power of two, or --config.dataset.in_memory=True"
        )
    if batch_size > source.num_examples:
        raise UserError(
            f"batch_size={batch_size} exceeds the {source.num_examples} examples of "
            f"{source.name}; lower --config.batch_size or set --config.dataset.in_memory=True"
        )
    mine = range(process_index * readers // process_count, (process_index + 1) * readers // process_count)
    epochs = _streamed(source, batch_size, seed, start_step, readers, mine)

    def read(epoch, row):
        index, example = row
        return epoch, index, *unpack(example, source.num_classes)

    return _checked(source, augmented(epochs, read))


def eval_batches(
    source: Source | Stream,
    *,
    image_size: int,
    batch_size: int,
    transform: Callable | None = None,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example exactly once over all processes, each process reading its own range in order.

    Files that can no longer be read are left out: they have no row.

    Args:
        source: from `datasets.load`.
        image_size: s.
        batch_size: rows over all processes.
        transform, seed: as in `train_batches`, in epoch 0; None: `augment.eval_view`, as 'image'.
        process_index, process_count: this process, and how many share the examples.

    Returns:
        Iterator of dicts, b = batch_size // process_count: 'image', or what `transform` returns, uint8
        [b, s, s, 3], 'label' int32 [b], 'index' int64 [b], 'mask' bool [b]. Where mask is False the row is
        padding (image 0, label and index -1): every process yields the same number of batches of the same
        shape.

    Raises:
        UserError: `batch_size` cannot be shared by the processes; while iterating, as of `train_batches`.
    """
    rows = _rows(batch_size, process_count)
    share = -(-source.num_examples // process_count)
    start, stop = (min(part * share, source.num_examples) for part in (process_index, process_index + 1))
    transform = transform or (lambda image, _: {"image": augment.eval_view(image, image_size)})
    view = functools.partial(_eval, source, transform, seed, rows)
    if isinstance(source, Stream):
        return _checked(source, view(np.arange(start, stop), -(-share // rows)))
    return _surviving_eval(source, view, np.arange(start, stop), -(-share // rows), rows)


def eval_views(
    images: Iterable[np.ndarray], image_size: int, proportion: float | None = None
) -> Iterator[np.ndarray]:
    """What `eval_batches` makes of images in memory, uint8 or floats in [0, 1], each [h, w, 3].

    `proportion` is that of `augment.eval_view`.
    """
    for image in images:
        yield _to_uint8(augment.eval_view(image, image_size, proportion=proportion)).numpy()


def _rows(batch_size, process_count):
    if batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes; "
            f"set --config.batch_size to a multiple of {process_count}"
        )
    return batch_size // process_count


def _surviving(source, start, step, rows_of):
    """The batches of `start(step)`, which starts again, without the lost files, where one cannot be read.

    Reading costs nothing more for it as long as all is well. `rows_of` a step are the rows that it decodes,
    and those that are still to come.
    """
    failed, failures = None, tf.errors.OpError  # a local name: modules are emptied before generators end
    while True:
        try:
            for batch in start(step):
                yield batch
                step += 1
            return
        except failures:
            if not find_lost(source, *rows_of(step)) and failed == step:  # once more: a disk may hiccup
                raise
            failed = step


def _surviving_eval(source, view, index, num_batches, rows):
    """All batches of `view`, as `_surviving`; of rows that have not come yet the lost ones are left out."""
    given, failed, failures = 0, None, tf.errors.OpError
    while given < num_batches:
        index = index[~lost_rows(source)[index]]
        try:
            for batch in view(index, num_batches - given):
                yield batch
                given, index = given + 1, index[rows:]
        except failures:
            if not find_lost(source, index[:rows], index) and failed == given:
                raise
            failed = given


def _checked(source, batches):
    for batch in batches:
        check_labels(source.name, source.num_classes, batch["label"][batch.get("mask", slice(None))])
        yield batch


def _order(source, batch_size, seed, first_row, rows):
    """Builds order(step, steps) -> epochs and indices, int64 [steps * rows], of these rows of the batches.

    Position p of the endless order of examples is example permutation(seed, p // n)[p % n].
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
            good = np.flatnonzero(~lost)
            for place in np.flatnonzero(lost[index]):
                index[place] = np.random.default_rng([seed, epoch[place], index[place]]).choice(good)
        return epoch, index

    return order


def _random_access(order, step):
    """Yields (steps, dataset of (epoch, index)), one dataset for all epochs."""

    def blocks():
        steps = max(1, BLOCK // len(order(step, 1)[0]))
        for begin in itertools.count(step, steps):
            yield order(begin, steps)

    spec = tf.TensorSpec([None], tf.int64)
    yield sys.maxsize, tf.data.Dataset.from_generator(blocks, output_signature=(spec, spec)).unbatch()


def _fetch(source):
    """index -> (record, label) in the graph, from variables: a graph holds no more than 2 GB of constants."""
    records = source.records
    if not isinstance(records, tf.Variable):
        records = tf.Variable(records, trainable=False)
    labels = tf.Variable(source.labels, trainable=False)
    return lambda index: (tf.gather(records, index), tf.gather(labels, index))


def _streamed(source, batch_size, seed, start_step, readers, mine):
    """Yields (steps, dataset of (epoch, (index, example))) for one epoch after the other.

    Not processes but readers own ranges of the split, and each fills its rows of every batch: so the
    global batch is the same for any number of processes.
    """
    rows = batch_size // readers
    steps = source.num_examples // batch_size
    epoch, first_step = divmod(start_step, steps)
    while True:
        parts = [
            _reader(source, reader, readers, seed, epoch, first_step * rows).prefetch(rows) for reader in mine
        ]
        turns = tf.data.Dataset.from_tensor_slices(np.repeat(np.arange(len(mine)), rows))
        examples = tf.data.Dataset.choose_from_datasets(parts, turns.repeat(steps - first_step))
        epochs = tf.data.Dataset.from_tensors(np.int64(epoch)).repeat()
        yield steps - first_step, tf.data.Dataset.zip(epochs, examples)
        epoch, first_step = epoch + 1, 0


def _reader(source, reader, readers, seed, epoch, first_row):
    """Dataset of (index, example): a reader's range of the split, shuffled, from `first_row` on.

    Blocks are shuffled, each by a seed of its own: so it is computed where a row comes from, and a run that
    goes on reads the rest of the epoch and the begin of one block.
    """
    start, stop = (part * source.num_examples // readers for part in (reader, reader + 1))
    rng = np.random.default_rng([seed, epoch, reader])
    # What fills no batch is read last: begin elsewhere in every epoch, and it is something else; and other
    # examples share a block.
    middle = int(rng.integers(start, stop))
    most = max(1, source.shuffle_buffer // readers)
    block = int(rng.integers(most - most // 4, most + 1))  # or all readers would fill theirs in the same step
    first_block = first_row // block
    begin = middle + first_block * block  # of a range that goes round
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
    """Reads, decodes, augments and batches one epoch after the other; `read` makes records of elements."""

    @tf.function  # or every epoch would trace it again
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
            # Shuffle buffers fill while the epoch before still has a tenth of its steps to go.
            if step == steps - 1 - steps // 10:
                following = start()
            yield next(batches)


def _eval(source, transform, seed, rows, index, num_batches):
    """`num_batches` of the examples `index`, int64 [m], and of padding; those of a `Stream` are a range."""

    def view(index, example):
        record, label = example if isinstance(source, Source) else unpack(example, source.num_classes)
        images = _transformed(source, transform, record, seed, 0, index)
        return images | {"label": label, "index": index, "mask": True}

    # A process without examples opens one and takes none: what a batch looks like, it knows of the dataset.
    opened = index if len(index) else np.zeros(1, np.int64)
    indices = tf.data.Dataset.from_tensor_slices(opened)
    fetch = _fetch(source) if isinstance(source, Source) else None  # a name keeps its variables alive
    examples = indices.map(fetch) if fetch else source.read([(opened[0], opened[-1] + 1)])
    examples = tf.data.Dataset.zip(indices, examples).take(len(index))
    examples = examples.map(view, num_parallel_calls=_CALLS)
    padding = {
        name: np.full([rows, *spec.shape], -1 if name in ("label", "index") else 0, spec.dtype.as_numpy_dtype)
        for name, spec in examples.element_spec.items()
    }
    batches = examples.batch(rows).prefetch(2).with_options(_options()).as_numpy_iterator()
    for _ in range(num_batches):
        batch = next(batches, {name: value[:0] for name, value in padding.items()})
        missing = rows - len(batch["mask"])
        yield {
            name: np.concatenate([value, padding[name][:missing]]) if missing else value
            for name, value in batch.items()
        }


def _transformed(source, transform, record, seed, epoch, index, dtype="uint8"):
    """The views of a record, images as `dtype`, augmented by a key of (seed, epoch, index)."""
    fold_in = tf.random.experimental.stateless_fold_in
    key = fold_in(fold_in(tf.constant([seed, 0]), tf.cast(epoch, tf.int32)), tf.cast(index, tf.int32))
    found = transform(source.decode(record), key)
    to_dtype = _to_uint8 if dtype == "uint8" else functools.partial(tf.cast, dtype=dtype)
    return {
        name: to_dtype(value) if value.shape.rank == 3 and value.dtype != dtype else value
        for name, value in found.items()
    }


def _to_uint8(image):
    return tf.cast(tf.clip_by_value(tf.round(image * 255), 0, 255), tf.uint8)


def _options():
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_warm_start = True
    # The map already keeps every core busy: no threads inside its operations.
    options.autotune.enabled = False
    options.experimental_optimization.map_and_batch_fusion = True
    options.threading.private_threadpool_size = CORES
    options.threading.max_intra_op_parallelism = 1
    return options
