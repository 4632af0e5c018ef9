import hashlib
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from test_datasets import Shards, config, prepare, write_folder

from simclr_jax.data import datasets, pipeline
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow

N, BATCH = 103, 8  # 12 whole batches an epoch and 7 examples left over
STEPS = N // BATCH


def transform(image, seed):
    """The image's number, and noise that shows the seed."""
    number = tf.cast(image[:1, :1], tf.float32) / 255
    return {"number": number, "noise": tf.random.stateless_uniform([2, 2, 3], seed)}


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_tensorflow_keeps_its_memory_and_one_core_an_image():
    asked = "tf.config.threading.get_intra_op_parallelism_threads()"
    done = python(
        f"import os; from simclr_jax.data import tf; print({asked}, os.environ['TF_CPU_ALLOCATOR_USE_BFC'])"
    )
    assert done.stdout.split() == ["1", "true"], done.stderr


def test_programs_that_have_used_tensorflow_before_are_not_refused():
    done = python(
        "import tensorflow as tf; tf.ones(3) + 1; from simclr_jax.data import augment; print('well')"
    )
    assert done.stdout == "well\n", done.stderr


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare(Shards, tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def sources(data_dir):
    keys = dict(data_dir=data_dir, shuffle_buffer=32)
    return {
        in_memory: datasets.load(config("shards", **keys, in_memory=in_memory), "train", seed=0)
        for in_memory in (True, False)
    }


@pytest.fixture(params=[True, False], ids=["random_access", "streamed"])
def source(request, sources):
    return sources[request.param]


def train(source, steps, *, batch_size=BATCH, seed=0, transform=transform, **keys):
    batches = pipeline.train_batches(source, transform, batch_size=batch_size, seed=seed, **keys)
    return list(itertools.islice(batches, steps))


def evaluate(source, **keys):
    return list(pipeline.eval_batches(source, image_size=2, **keys))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def joined(batches, name):
    return np.concatenate([batch[name] for batch in batches])


class TestTrainBatches:
    def test_shapes_and_types(self, source):
        (batch,) = train(source, 1)
        assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
            "number": ((BATCH, 1, 1, 3), "uint8"),
            "noise": ((BATCH, 2, 2, 3), "uint8"),
            "label": ((BATCH,), "int32"),
            "index": ((BATCH,), "int64"),
        }

    def test_rows_belong_together(self, source):
        """Number, label and index of a row are those that eval_batches gives for that index."""
        numbers = joined(evaluate(source, batch_size=N), "image")[:, 0, 0, 0]
        for batch in train(source, 2 * STEPS + 1):
            np.testing.assert_array_equal(batch["number"][:, 0, 0, 0], numbers[batch["index"]])
            np.testing.assert_array_equal(batch["label"], batch["number"][:, 0, 0, 0] % 5)

    @pytest.mark.parametrize("count", [2, 4])
    def test_the_global_batch_is_the_same_for_any_number_of_processes(self, source, count):
        steps = 2 * STEPS + 3
        parts = [train(source, steps, process_index=index, process_count=count) for index in range(count)]
        assert all(len(batch["index"]) == BATCH // count for part in parts for batch in part)
        whole = [
            {name: np.concatenate([batch[name] for batch in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_equal(whole, train(source, steps))

    @pytest.mark.parametrize("start_step", [1, STEPS, STEPS + 5])
    def test_resume_is_exact(self, source, start_step):
        steps = 2 * STEPS + 3
        resumed = train(source, steps - start_step, start_step=start_step)
        assert_equal(resumed, train(source, steps)[start_step:])

    def test_array_records_on_disk_give_the_batches_of_memory(self, sources, tmp_path):
        data_dir = prepare(Shards, tmp_path, "array_record")
        on_disk = datasets.load(config("shards", data_dir=data_dir, in_memory=False), "train", seed=0)
        whole = train(sources[True], STEPS + 5)
        assert_equal(train(on_disk, 8, start_step=STEPS - 3), whole[STEPS - 3 :])
        second = [{name: value[BATCH // 2 :] for name, value in batch.items()} for batch in whole]
        assert_equal(train(on_disk, STEPS + 5, process_index=1, process_count=2), second)
        assert_equal(evaluate(on_disk, batch_size=BATCH), evaluate(sources[True], batch_size=BATCH))
        assert len(train(on_disk, 1, batch_size=2 * N)[0]["index"]) == 2 * N

    def test_resume_decodes_no_skipped_record(self, source):
        def counting():
            """The source, and the records that it decodes: of each run its own, since a run reads ahead."""
            decoded = []

            def decode(record):
                def note(record):
                    decoded.append(record.numpy())
                    return record

                return source.decode(tf.ensure_shape(tf.py_function(note, [record], tf.string), []))

            return source._replace(decode=decode), decoded

        counted, decoded = counting()
        train(counted, STEPS)
        assert len(decoded) >= STEPS * BATCH
        counted, decoded = counting()
        train(counted, 1, start_step=STEPS - 1)
        assert BATCH <= len(decoded) <= 5 * BATCH + pipeline._CALLS  # the batch, those ahead, and in flight

    def test_seed_chooses_order_and_augmentation(self, source):
        first, same, other = (train(source, STEPS, seed=seed) for seed in (0, 0, 1))
        assert_equal(first, same)
        assert (joined(first, "index") != joined(other, "index")).any()
        noise = [dict(zip(joined(run, "index"), joined(run, "noise"), strict=True)) for run in (first, other)]
        assert all((noise[0][i] != noise[1][i]).any() for i in noise[0].keys() & noise[1].keys())

    def test_order_and_augmentation_change_with_the_epoch(self, source):
        run = train(source, 3 * STEPS)
        epochs = [run[start : start + STEPS] for start in range(0, 3 * STEPS, STEPS)]
        for one, two in itertools.combinations(epochs, 2):
            assert (joined(one, "index") != joined(two, "index")).mean() > 0.5
        # No two equal examples are augmented alike, wherever they come in the run.
        noise = joined(run, "noise").reshape(3 * STEPS * BATCH, -1)
        assert len(np.unique(noise, axis=0)) == len(noise)

    def test_augmentation_depends_on_nothing_but_seed_epoch_and_index(self, sources):
        """Batch size and the kind of source change the order, not what an example looks like."""
        runs = [
            train(sources[True], STEPS),
            train(sources[True], N // 20, batch_size=20),
            train(sources[False], STEPS),
        ]
        noise = [dict(zip(joined(run, "index"), joined(run, "noise"), strict=True)) for run in runs]
        for other in noise[1:]:
            common = noise[0].keys() & other.keys()
            assert len(common) > 80
            assert all((noise[0][i] == other[i]).all() for i in common)

    def test_views_are_rounded_to_uint8(self, source):
        def views(image, seed):
            return {
                "low": tf.fill([1, 1, 3], 0.4 / 255),
                "high": tf.fill([1, 1, 3], 254.6 / 255),
                "over": tf.fill([1, 1, 3], 1.01),
                "under": tf.fill([1, 1, 3], -0.01),
                "already": tf.cast(tf.fill([1, 1, 3], 77), tf.uint8),
            }

        (batch,) = train(source, 1, transform=views)
        assert np.unique(batch["low"]) == np.unique(batch["under"]) == 0
        assert np.unique(batch["high"]) == np.unique(batch["over"]) == 255
        assert np.unique(batch["already"]) == 77


class TestRandomAccess:
    @pytest.mark.parametrize("batch_size", [BATCH, N, 3 * N + 5])
    def test_every_example_once_an_epoch_and_nothing_dropped(self, sources, batch_size):
        steps = -(-4 * N // batch_size)
        index = joined(train(sources[True], steps, batch_size=batch_size), "index")
        epochs = [index[start : start + N] for start in range(0, 4 * N, N)]
        assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
        assert all((one != two).mean() > 0.5 for one, two in itertools.combinations(epochs, 2))

    def test_long_runs_and_late_starts(self, monkeypatch, sources):
        monkeypatch.setattr(pipeline, "BLOCK", 3 * BATCH)
        run = train(sources[True], 20)
        monkeypatch.undo()
        assert_equal(run, train(sources[True], 20))
        (late,) = train(sources[True], 1, start_step=10**9)
        assert len(late["index"]) == BATCH

    def test_digits_and_folders(self, tmp_path):
        digits = datasets.load(config("digits"), "train", seed=0)
        write_folder(tmp_path, [f"{i}.png" for i in range(9)])
        images = datasets.load(config("folder", path=str(tmp_path)), "train", seed=0)
        for source in (digits, images):
            (batch,) = train(source, 1, transform=lambda image, seed: {"image": image[:4, :4] / 255})
            expected = np.stack([source.decode(record)[:4, :4] for record in source.records[batch["index"]]])
            np.testing.assert_array_equal(batch["image"], expected)
            np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])

    def test_batch_and_processes(self, sources):
        with pytest.raises(UserError, match="batch_size=10 cannot be shared by 4 processes; .*multiple of 4"):
            pipeline.train_batches(sources[True], transform, batch_size=10, seed=0, process_count=4)


class TestStreamed:
    @pytest.mark.parametrize("batch_size", [BATCH, 12, 5, 100])
    def test_an_epoch_has_every_example_at_most_once_and_only_whole_batches(self, sources, batch_size):
        steps = N // batch_size
        run = train(sources[False], 2 * steps, batch_size=batch_size)
        for epoch in (run[:steps], run[steps:]):
            numbers = joined(epoch, "number")[:, 0, 0, 0]
            assert len(set(numbers)) == len(numbers) == steps * batch_size

    def test_every_reader_fills_its_rows_from_its_range(self, sources):
        for batch in train(sources[False], STEPS):
            for reader, index in enumerate(batch["index"]):  # 8 readers, one row each
                assert reader * N // 8 <= index < (reader + 1) * N // 8
        for batch in train(sources[False], 4, batch_size=24):
            for row, index in enumerate(batch["index"]):  # 8 readers, three rows each
                assert row // 3 * N // 8 <= index < (row // 3 + 1) * N // 8

    def test_other_examples_are_left_out_in_every_epoch(self, sources):
        unshuffled = sources[False]._replace(shuffle_buffer=1)
        run = train(unshuffled, 5 * STEPS)
        left_out = [
            set(range(N)) - set(joined(run[start : start + STEPS], "index"))
            for start in range(0, 5 * STEPS, STEPS)
        ]
        assert all(len(out) == N - STEPS * BATCH for out in left_out)
        assert not set.intersection(*left_out)
        assert set.union(*left_out) > left_out[0]

    def test_reads_in_order_from_a_rotated_start_and_shuffles(self, sources):
        unshuffled, shuffled = (sources[False]._replace(shuffle_buffer=size) for size in (1, 1000))
        order = joined(train(unshuffled, N, batch_size=1), "index")
        np.testing.assert_array_equal((order - order[0]) % N, np.arange(N))
        assert order[0] != 0
        assert (joined(train(shuffled, N, batch_size=1), "index") != order).mean() > 0.9

    @pytest.mark.parametrize("step", [0, 7, 50, N + 90])
    def test_a_restart_reads_one_block_before_its_place(self, sources, step):
        reads = []

        def read(ranges):
            reads.append(sum(stop - start for start, stop in ranges))
            return sources[False].read(ranges)

        stream = sources[False]._replace(read=read)
        fresh = train(stream, step + 2, batch_size=1)[step:]
        reads.clear()
        assert_equal(train(stream, 2, batch_size=1, start_step=step), fresh)
        left = N - step % N
        assert left <= reads[0] <= left + 32  # left of the epoch's 103, and at most the buffer's 32 more

    def test_blocks_of_the_buffers_size_are_shuffled(self, sources):
        order = joined(train(sources[False], N, batch_size=1), "index")
        begins = [begin for begin in range(N) if ((order[:24] - begin) % N < 32).all()]
        assert begins and len(set(order)) == N  # 24 to 32 in a block
        assert np.median(np.abs(np.diff(order))) > 5  # about ten, if every place is equally likely

    def test_mocked(self):
        with tfds.testing.mock_data(num_examples=3):
            source = datasets.load(config("cifar10", num_examples=20, in_memory=False), "train", seed=0)
            run = train(source, 6, batch_size=10)
            resumed = train(source, 3, batch_size=10, start_step=3)
            held_out = datasets.load(config("cifar10", in_memory=False), "eval", seed=0)
            masks = joined(evaluate(held_out, batch_size=2), "mask")
        for start in (0, 2, 4):
            index = joined(run[start : start + 2], "index")
            assert len(set(index)) == 20 and max(index) < 20
        assert_equal(run[3:], resumed)
        assert masks.sum() == 3

    def test_batch_and_processes(self, sources):
        stream = sources[False]
        with pytest.raises(UserError, match="batch_size=12: 3 processes cannot share 4 readers"):
            pipeline.train_batches(stream, transform, batch_size=12, seed=0, process_count=3)
        with pytest.raises(UserError, match=r"batch_size=104 exceeds the 103 examples of shards \(train\)"):
            pipeline.train_batches(stream, transform, batch_size=104, seed=0)


class TestEvalBatches:
    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("batch_size", [8, 100])
    def test_every_example_once_in_order_over_all_processes(self, source, count, batch_size):
        parts = [
            evaluate(source, batch_size=batch_size, process_index=index, process_count=count)
            for index in range(count)
        ]
        assert len({len(part) for part in parts}) == 1
        batches = list(itertools.chain(*parts))
        assert {batch["image"].shape for batch in batches} == {(batch_size // count, 2, 2, 3)}
        mask = joined(batches, "mask")
        assert mask.dtype == bool
        np.testing.assert_array_equal(joined(batches, "index")[mask], np.arange(N))
        numbers = joined(batches, "image")[mask][:, 0, 0, 0]
        assert sorted(numbers) == list(range(N))
        np.testing.assert_array_equal(joined(batches, "label")[mask], numbers % 5)
        assert set(joined(batches, "index")[~mask]) <= {-1} and set(joined(batches, "label")[~mask]) <= {-1}
        assert not joined(batches, "image")[~mask].any()

    def test_more_processes_than_examples(self, source):
        few = source._replace(num_examples=5)
        parts = [evaluate(few, batch_size=8, process_index=index, process_count=8) for index in range(8)]
        assert [joined(part, "mask").tolist() for part in parts] == [[True]] * 5 + [[False]] * 3

    def test_batch_and_processes(self, source):
        with pytest.raises(UserError, match="batch_size=10 cannot be shared by 4 processes; .*multiple of 4"):
            pipeline.eval_batches(source, image_size=2, batch_size=10, process_count=4)


def digest(data_dir):
    """The digest of two epochs of both kinds of source."""
    total = hashlib.sha256()
    for in_memory in (True, False):
        keys = config("shards", data_dir=data_dir, in_memory=in_memory, shuffle_buffer=32)
        for batch in train(datasets.load(keys, "train", seed=0), 2 * STEPS):
            for name in sorted(batch):
                total.update(batch[name].tobytes())
    return total.hexdigest()


@pytest.mark.journey
def test_python_processes_agree(data_dir):
    here = pathlib.Path(__file__).parent
    script = f"import test_pipeline; print(test_pipeline.digest({data_dir!r}))"
    path = os.pathsep.join([str(here), str(here.parent)])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        )
        for seed in "12"
    ]
    assert {run.communicate()[0].split()[-1] for run in runs} == {digest(data_dir)}


def test_tensorflow_sees_no_accelerator():
    assert not tf.config.get_visible_devices("GPU")
