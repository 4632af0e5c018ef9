import importlib.util
import io
import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

import simclr_jax
from simclr_jax.data import datasets, decode, pipeline
from simclr_jax.data.sources import folder
from simclr_jax.process import console
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow


def config(name, **overrides):
    keys = dict(
        name=name,
        path=None,
        classes=True,
        labels=None,
        several_labels=False,
        group=None,
        tile=None,
        tile_overlap=0,
        split_seed=None,
        max_pixels=decode.MAX_PIXELS,
        value_range=None,
        channels=None,
        data_dir=None,
        train_split="train",
        eval_split="test",
        probe_split=None,
        num_examples=None,
        num_classes=None,
        in_memory=True,
        shuffle_buffer=16,
    )
    return ConfigDict({**keys, **overrides})


def write_image(path, value=100, mode="RGB", size=(9, 7), **options):
    """A noisy image, so that a truncated file has lost something."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 256, [size[1], size[0], 3], np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)


def write_folder(root, files):
    for number, name in enumerate(files):
        write_image(root / name, number)
    return root


def names(root, source):
    return [os.path.relpath(os.fsdecode(path), root) for path in source.records]


def load_folder(root, split="train", workdir=None, seed=0):
    return datasets.load(config("folder", path=str(root)), split, seed=seed, workdir=workdir)


class Shards(tfds.core.GeneratorBasedBuilder):
    """Every pixel of an image is the image's number."""

    VERSION = tfds.core.Version("1.0.0")
    label, numbers = tfds.features.ClassLabel(num_classes=5), {"train": range(103), "validation": range(20)}

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": self.label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {split: self._generate_examples(numbers) for split, numbers in self.numbers.items()}

    def _generate_examples(self, numbers):
        for number in numbers:
            yield number, {"image": np.full([2, 3, 3], number % 256, np.uint8), "label": number % 5}


class Half(Shards):
    """Some labels are -1, as in stl10's unlabelled split."""

    label, numbers = tf.int64, {"train": range(10)}

    def _generate_examples(self, numbers):
        for number, example in super()._generate_examples(numbers):
            yield number, {**example, "label": example["label"] - 1}


def prepare(builder, data_dir, file_format="tfrecord"):
    config = tfds.download.DownloadConfig(num_shards=4)  # longer than the 16 examples TFDS interleaves
    builder(data_dir=data_dir, file_format=file_format).download_and_prepare(download_config=config)
    return str(data_dir)


def prepare_features(name, data_dir, **features):
    """A dataset of four examples, whose features are `features`: {name: (feature, value)}."""

    def info(self):
        types = {key: feature for key, (feature, _) in features.items()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(types))

    def generate(self, numbers):
        return ((number, {key: value for key, (_, value) in features.items()}) for number in numbers)

    keys = {"_info": info, "_generate_examples": generate, "numbers": {"train": range(4)}}
    return prepare(type(name, (Shards,), keys), data_dir)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """data_dir of a prepared TFDS dataset of 103 + 20 examples in several files."""
    return prepare(Shards, tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """data_dir of the same dataset in other formats than TFRecord."""
    return {
        file_format: prepare(Shards, tmp_path_factory.mktemp(file_format), file_format)
        for file_format in ("array_record", "parquet")
    }


class TestDigits:
    def test_holds_out_the_same_fifth_of_every_class_whatever_the_seed(self):
        train, held_out = (datasets.load(config("digits"), split, seed=0) for split in ("train", "eval"))
        other = datasets.load(config("digits"), "eval", seed=1)
        assert (train.num_examples, held_out.num_examples) == (1437, 360)
        assert train.num_classes == held_out.num_classes == 10
        np.testing.assert_array_equal(held_out.records, other.records)
        np.testing.assert_allclose(np.bincount(held_out.labels) / np.bincount(train.labels), 0.25, atol=0.02)

    def test_images_are_uint8_over_the_whole_range(self):
        source = datasets.load(config("digits"), "train", seed=0)
        assert source.records.shape == (1437, 8, 8, 3) and source.records.dtype == np.uint8
        assert source.records.min() == 0 and source.records.max() == 255
        assert source.labels.dtype == np.int32

    def test_num_examples_trains_on_fewer(self):
        whole, few, held_out = (
            datasets.load(config("digits", num_examples=size), split, seed=0)
            for size, split in ((None, "train"), (100, "train"), (100, "eval"))
        )
        assert (few.num_examples, len(few.records), held_out.num_examples) == (100, 100, 360)
        assert {image.tobytes() for image in few.records} < {image.tobytes() for image in whole.records}
        assert len(set(few.labels)) == 10
        with pytest.raises(UserError, match=r"num_examples=2000, but digits \(train\) has 1437; lower"):
            datasets.load(config("digits", num_examples=2000), "train", seed=0)
        with pytest.raises(
            UserError, match="num_examples=0: set --config.dataset.num_examples to a number above 0"
        ):
            datasets.load(config("digits", num_examples=0), "train", seed=0)

    def test_no_other_split(self):
        with pytest.raises(UserError, match="'test': expected 'train', 'eval', 'probe' or 'validation'"):
            datasets.load(config("digits"), "test", seed=0)


class TestSources:
    def test_another_one_is_one_entry(self, monkeypatch):
        def load(config, split, *, seed, workdir):
            records = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
            labels = np.arange(12, dtype=np.int32) % 3
            return datasets.Source(split, 12, 3, lambda record: tf.repeat(record, 3, -1), records, labels)

        monkeypatch.setitem(datasets.SOURCES, "numbers", load)
        whole, few = (
            datasets.load(config("numbers", num_examples=size), "train", seed=0) for size in (None, 5)
        )
        assert (whole.num_examples, few.num_examples, len(few.labels)) == (12, 5, 5)
        (batch,) = pipeline.eval_batches(few, image_size=1, batch_size=5)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 2], few.records[:, 0, 0, 0])
        with pytest.raises(UserError, match="numbers has no such split"):
            datasets.load(config("numbers", validation_split="v"), "validation", seed=0)

    def test_another_one_may_read_the_path(self, monkeypatch):
        keys = {"dataset.name": "numbers", "dataset.path": "there", "dataset.value_range": (0, 12)}
        with pytest.raises(UserError, match="dataset.path='there' is not read where dataset.name=numbers"):
            simclr_jax.get_config("folder", keys)
        monkeypatch.setitem(datasets.SOURCES, "numbers", None)
        assert simclr_jax.get_config("folder", keys).dataset.path == "there"

    def test_random_access_and_streams_are_of_one_type(self, shards):
        memory, stream = (
            datasets.load(config("shards", data_dir=shards, in_memory=in_memory), "train", seed=0)
            for in_memory in (True, False)
        )
        assert type(memory) is type(stream) and memory.random_access and not stream.random_access
        assert (stream.records, stream.labels, stream.lost) == (None, None, None)
        assert (memory.order, stream.order) == (None, "blocks")
        assert datasets.labelled(stream) is stream and not datasets.lost_rows(stream).any()


class TestSample:
    def test_is_a_subset_of_its_examples_that_depends_on_the_seed(self):
        source = datasets.load(config("digits"), "eval", seed=0)
        one, same, other = (datasets.sample(source, 50, seed=seed) for seed in (1, 1, 2))
        assert one.num_examples == len(one.records) == len(one.labels) == 50
        assert (one.records == same.records).all() and (one.records != other.records).any()
        assert {image.tobytes() for image in one.records} <= {image.tobytes() for image in source.records}

    def test_of_as_many_or_more_is_the_source(self):
        source = datasets.load(config("digits"), "eval", seed=0)
        assert datasets.sample(source, 360, seed=0) is source


class TestSpan:
    def test_of_a_source_are_its_rows_with_their_names(self):
        source = datasets.load(config("digits"), "eval", seed=0)
        source = source._replace(names=np.array([str(row) for row in range(360)]))
        part = datasets.span(source, 100, 130)
        assert part.num_examples == 30 and part.names[0] == "100" and part.class_names == tuple("0123456789")
        np.testing.assert_array_equal(part.records, source.records[100:130])
        np.testing.assert_array_equal(part.labels, source.labels[100:130])

    def test_of_a_stream_reads_the_same_examples(self, shards):
        keys = config("shards", data_dir=shards, in_memory=False)
        source = datasets.load(keys, "train", seed=0)
        part = datasets.span(source, 40, 60)
        assert part.num_examples == 20
        ranges = [(3, 7)], [(43, 47)]
        records, expected = (
            [record.numpy() for record, _ in stream.read(ranges)]
            for stream, ranges in zip((part, source), ranges)
        )
        assert records == expected and len(records) == 4


class TestProbeSplit:
    def test_is_the_labelled_split(self):
        with tfds.testing.mock_data(num_examples=4):
            keys = config("stl10", train_split="unlabelled", probe_split="train", num_examples=4)
            unlabelled, probe = (datasets.load(keys, split, seed=0) for split in ("train", "probe"))
        assert unlabelled.num_classes == 0 and probe.num_classes == 10
        assert probe.name == "stl10 (train)" and (probe.labels >= 0).all()


class TestFewLabels:
    def test_draws_as_many_of_every_class_by_seed(self):
        digits = datasets.load(config("digits"), "train", seed=0)
        few, same, other = (datasets.few_labels(digits, 5, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(np.bincount(digits.labels[few]), [5] * 10)
        np.testing.assert_array_equal(few, same)
        assert (few != other).any() and (np.diff(few) > 0).all()

    def test_from_records_in_memory(self, shards):
        source = datasets.load(config("shards", data_dir=shards), "train", seed=0)
        few = datasets.subset(source, datasets.few_labels(source, 2, seed=0))
        values = [int(few.decode(record)[0, 0, 0]) for record in few.records.numpy()]
        np.testing.assert_array_equal(np.asarray(values) % 5, few.labels)

    def test_says_which_class_is_too_small(self):
        digits = datasets.load(config("digits"), "eval", seed=0)
        with pytest.raises(UserError, match=r"class 0 has 36 examples, but labels_per_class=37; lower"):
            datasets.few_labels(digits, 37, seed=0)

    def test_needs_labels(self):
        digits = datasets.load(config("digits"), "eval", seed=0)._replace(num_classes=0)
        with pytest.raises(UserError, match=r"digits \(eval\) has no labels"):
            datasets.few_labels(digits, 2, seed=0)

    def test_needs_random_access(self, shards):
        source = datasets.load(config("shards", data_dir=shards, in_memory=False), "train", seed=0)
        with pytest.raises(UserError, match="set --config.dataset.in_memory=True"):
            datasets.few_labels(source, 2, seed=0)


class TestTfds:
    @pytest.mark.parametrize(
        "name, split, size, classes",
        [
            ("cifar10", "train", (32, 32, 3), 10),
            ("stl10", "unlabelled", (96, 96, 3), 0),
            ("imagenet2012", "train", None, 1000),
            ("imagenet2012_subset/1pct", "train", None, 1000),
        ],
    )
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_mocked(self, name, split, size, classes, in_memory):
        with tfds.testing.mock_data(num_examples=4):
            keys = config(name, train_split=split, num_examples=6, in_memory=in_memory)
            source = datasets.load(keys, "train", seed=0)
            examples = (
                zip(source.records.numpy(), source.labels, strict=True)
                if in_memory
                else source.read([(0, 6)])
            )
            images, labels = zip(
                *[(source.decode(record), int(label)) for record, label in examples], strict=True
            )
        assert source.num_examples == len(images) == 6
        assert source.num_classes == classes
        assert all(image.dtype == tf.uint8 and image.shape[-1] == 3 for image in images)
        assert size is None or all(image.shape == size for image in images)
        assert all(label == -1 if classes == 0 else 0 <= label < classes for label in labels)

    def test_mocked_eval_takes_the_size_of_the_mock(self):
        with tfds.testing.mock_data(num_examples=4):
            assert datasets.load(config("cifar10", num_examples=6), "eval", seed=0).num_examples == 4

    def test_in_memory_holds_the_split_in_order(self, shards):
        source = datasets.load(config("shards", data_dir=shards), "train", seed=0)
        stream = datasets.load(config("shards", data_dir=shards, in_memory=False), "train", seed=0)
        assert isinstance(source.records, tf.Variable)  # a constant in the graph would end at 2 GB
        values = [int(source.decode(record)[0, 0, 0]) for record in source.records.numpy()]
        assert sorted(values) == list(range(103))
        np.testing.assert_array_equal(np.asarray(values) % 5, source.labels)
        streamed = [stream.decode(record) for record, _ in stream.read([(0, 103)])]
        assert values == [int(image[0, 0, 0]) for image in streamed]

    @pytest.mark.parametrize(
        "spec", ["train", "train[10:90]", "validation+train", "train[:10%]+validation[5:]"]
    )
    def test_reads_any_ranges_of_any_split_in_order(self, shards, spec):
        keys = dict(data_dir=shards, train_split=spec)
        source = datasets.load(config("shards", **keys), "train", seed=0)
        stream = datasets.load(config("shards", in_memory=False, **keys), "train", seed=0)
        n = source.num_examples
        assert stream.num_examples == n
        records = source.records.numpy()
        for ranges in ([(0, n)], [(5, n), (0, 5)], [(n - 1, n), (3, 9)]):
            expected = [record for start, stop in ranges for record in records[start:stop]]
            assert [record.numpy() for record, _ in stream.read(ranges)] == expected

    def test_negative_labels_are_no_labels(self, tmp_path, capsys):
        data_dir = prepare(Half, tmp_path)
        capsys.readouterr()
        source = datasets.load(config("half", data_dir=data_dir, num_classes=4), "train", seed=0)
        assert source.num_classes == 0
        np.testing.assert_array_equal(source.labels, [-1] * 10)
        assert "half (train): 2 labels are below 0" in capsys.readouterr().out
        keys = config("half", data_dir=data_dir, num_classes=4, in_memory=False)
        stream = datasets.load(keys, "train", seed=0)
        assert stream.num_classes == 0 and {int(label) for _, label in stream.read([(0, 10)])} == {-1}
        assert "half (train): 2 of the first labels are below 0" in capsys.readouterr().out

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_only_process_0_tells(self, tmp_path, monkeypatch, capsys, in_memory):
        keys = config("half", data_dir=prepare(Half, tmp_path), num_classes=4, in_memory=in_memory)
        capsys.readouterr()
        monkeypatch.setattr(console, "_silent", True)  # as on the other processes
        datasets.load(keys, "train", seed=0)
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_num_examples_takes_the_first(self, shards, in_memory):
        keys = config(
            "shards", data_dir=shards, eval_split="validation", num_examples=30, in_memory=in_memory
        )
        assert datasets.load(keys, "train", seed=0).num_examples == 30
        assert datasets.load(keys, "eval", seed=0).num_examples == 20

    @pytest.mark.parametrize(
        "overrides, message",
        [
            (dict(num_examples=104), r"num_examples=104, but shards \(train\) has 103; lower or unset"),
            (
                dict(train_split="trian"),
                r"train_split='trian': Unknown split.* train, validation; set --config",
            ),
            (dict(train_split="train[:200]"), r"train\[:200\].*incompatible with 103 examples"),
            (dict(train_split="train[5:5]"), r"train\[5:5\].*no data"),
            (
                dict(name="shardz"),
                r"dataset.name='shardz': expected 'digits', 'folder' or a name in TensorFlow",
            ),
            (dict(name="cifar11"), r"dataset.name='cifar11'.* did you mean .*cifar10"),
            (
                dict(name="cifar10"),
                r"not prepared in .*cifar10/.*; run: python -c .*'cifar10', data_dir='/.*_prepare\(\)",
            ),
            (
                dict(name="imagenet2012"),
                r"builder\('imagenet2012', .*manual_dir='<folder>'.*manual download to <folder>.*ILSVRC",
            ),
            (dict(name="shards:9.9.9"), "shards:9.9.9.*only: 1.0.0"),
            (dict(name="imagenet2012_subset/7pct"), r"7pct.* 10pct"),
        ],
    )
    def test_errors_are_one_line_that_says_what_to_do(self, shards, overrides, message):
        keys = {"name": "shards", "data_dir": shards, **overrides}
        with pytest.raises(UserError, match=message) as error:
            datasets.load(config(**keys), "train", seed=0)
        assert "\n" not in str(error.value)


F = tfds.features
IMAGE = F.Image(shape=(2, 3, 3)), np.full([2, 3, 3], 7, np.uint8)
LABELS = {  # (feature, value), settings, words of a note
    "vector": ((F.Tensor(shape=(3,), dtype=np.int64), [1, 0, 1]), {"num_classes": 3}, "not one class"),
    "several": ((F.Sequence(F.ClassLabel(num_classes=3)), [0, 2]), {}, "not one class"),
    "nested": ((F.FeaturesDict({"fine": np.int64}), {"fine": 1}), {}, "not one class"),
    "text": ((F.Text(), "cat"), {"num_classes": 3}, "not one class"),
    "float": ((F.Scalar(np.float32), 0.5), {"num_classes": 3}, "not one class"),
    "unknown": ((F.Scalar(np.int64), 1), {}, "--config.dataset.num_classes gives the number"),
    "bool": ((F.Scalar(np.bool_), True), {"num_classes": 2}, None),
    "int": ((F.Scalar(np.int32), 1), {"num_classes": 2}, None),
}
IMAGES = {  # feature, value, words of a note, pixels
    "grey": (F.Image(shape=(2, 3, 1)), np.full([2, 3, 1], 7, np.uint8), None, 7),
    "wide": (F.Image(shape=(2, 3, 1), dtype=np.uint16), np.full([2, 3, 1], 7 << 8, np.uint16), "16 bits", 7),
    "clear": (
        F.Image(shape=(2, 3, 4)),
        np.zeros([2, 3, 4], np.uint8),
        "transparent in an image becomes",
        255,
    ),
}
NO_IMAGES = {
    "absent": {"picture": IMAGE},
    "inside": {"data": (F.FeaturesDict({"image": IMAGE[0]}), {"image": IMAGE[1]})},
    "floats": {"image": (F.Image(shape=(2, 3, 1), dtype=np.float32), np.ones([2, 3, 1], np.float32))},
    "array": {"image": (F.Tensor(shape=(2, 3, 3), dtype=np.uint8), IMAGE[1])},
    "sequence": {"image": (F.Sequence(IMAGE[0]), [IMAGE[1]])},
}


class TestTfdsFeatures:
    @pytest.mark.parametrize("kind", LABELS)
    def test_a_label_is_one_class_or_said_to_be_none(self, tmp_path, capsys, kind):
        label, overrides, note = LABELS[kind]
        data_dir = prepare_features(f"Label{kind.title()}", tmp_path, image=IMAGE, label=label)
        for in_memory in (True, False):
            capsys.readouterr()
            keys = config(f"label_{kind}", data_dir=data_dir, in_memory=in_memory, **overrides)
            source = datasets.load(keys, "train", seed=0)
            assert source.num_classes == (0 if note else 2)
            labels = source.labels if in_memory else [int(label) for _, label in source.read([(0, 4)])]
            assert list(labels) == [-1 if note else 1] * 4
            printed = capsys.readouterr().out
            assert (f"{note}: taken as without labels" in printed) if note else printed == ""

    @pytest.mark.parametrize("kind", IMAGES)
    def test_images_of_any_channels_and_bits(self, tmp_path, capsys, kind):
        feature, value, note, pixel = IMAGES[kind]
        data_dir = prepare_features(f"Image{kind.title()}", tmp_path, image=(feature, value))
        capsys.readouterr()
        source = datasets.load(config(f"image_{kind}", data_dir=data_dir), "train", seed=0)
        np.testing.assert_array_equal(source.decode(source.records[0]), np.full([2, 3, 3], pixel))
        printed = capsys.readouterr().out
        assert (note in printed) if note else printed == ""

    @pytest.mark.parametrize("kind", NO_IMAGES)
    def test_refuses_what_is_no_image(self, tmp_path, kind):
        data_dir = prepare_features(f"No{kind.title()}", tmp_path, **NO_IMAGES[kind])
        message = rf"name='no_{kind}' has the features .*, and no 'image' of 8 or 16 bits"
        with pytest.raises(UserError, match=message) as error:
            datasets.load(config(f"no_{kind}", data_dir=data_dir), "train", seed=0)
        assert "\n" not in str(error.value)


class TestTfdsFormats:
    @pytest.mark.parametrize("file_format", ["array_record", "parquet"])
    @pytest.mark.parametrize("spec", ["train", "train[:50%]+validation[5:]"])
    def test_hold_the_same_examples_as_tfrecord(self, shards, formats, file_format, spec):
        expected = datasets.load(config("shards", data_dir=shards, train_split=spec), "train", seed=0)
        n, records = expected.num_examples, expected.records.numpy().tolist()
        source, stream = (
            datasets.load(
                config("shards", data_dir=formats[file_format], train_split=spec, in_memory=in_memory),
                "train",
                seed=0,
            )
            for in_memory in (True, False)
        )
        assert stream.num_examples == n and source.records.numpy().tolist() == records
        np.testing.assert_array_equal(source.labels, expected.labels)
        examples = list(stream.read([(5, n), (0, 5)]))
        assert [record.numpy() for record, _ in examples] == records[5:] + records[:5]
        assert [int(label) for _, label in examples] == [*expected.labels[5:], *expected.labels[:5]]

    def test_array_records_are_fetched_by_index(self, formats):
        keys = config("shards", data_dir=formats["array_record"], in_memory=False)
        source = datasets.load(keys, "train", seed=0)
        record, label = datasets.span(source, 40, 60).fetch(tf.constant(3, tf.int64))
        expected, expected_label = next(iter(source.read([(43, 44)])))
        assert record == expected and label == expected_label
        assert source.order is None and source.shuffle_buffer == 0

    @pytest.mark.parametrize("file_format", ["tfrecord", "array_record", "parquet"])
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_a_lost_file_is_one_line(self, shards, formats, tmp_path, file_format, in_memory):
        data_dir = tmp_path / "lost"
        shutil.copytree({"tfrecord": shards, **formats}[file_format], data_dir)
        next(data_dir.rglob("*train*00000-of-*")).unlink()
        with pytest.raises(UserError, match=r"shards \(train\) cannot be read: .*restore ") as error:
            datasets.load(config("shards", data_dir=str(data_dir), in_memory=in_memory), "train", seed=0)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("file_format", ["array_record", "riegeli"])
    def test_says_how_to_do_without_a_package(self, formats, tmp_path, monkeypatch, file_format):
        data_dir = tmp_path / "other"
        shutil.copytree(formats["array_record"], data_dir)
        info = next(data_dir.rglob("dataset_info.json"))
        info.write_text(info.read_text().replace("array_record", file_format))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        message = (
            r"in FORMAT files, .*not installed: (pip install array_record, or )?run python -c .*tfrecord"
        )
        with pytest.raises(UserError, match=message.replace("FORMAT", file_format)):
            datasets.load(config("shards", data_dir=str(data_dir)), "train", seed=0)


class TestFolder:
    @pytest.mark.parametrize(
        "name, mode, options",
        [
            ("a.jpg", "RGB", {}),
            ("a.jpg", "RGB", {"progressive": True}),
            ("a.JPEG", "L", {}),
            ("a.jpg", "CMYK", {}),
            ("a.png", "RGB", {}),
            ("a.PNG", "RGBA", {}),
            ("a.png", "L", {}),
            ("a.png", "LA", {}),
            ("a.png", "P", {}),
            ("a.png", "1", {}),
            ("a.webp", "RGB", {}),
            ("a.webp", "RGBA", {"lossless": True}),
            ("a.bmp", "RGB", {}),
            ("a.bmp", "L", {}),
            ("a.gif", "P", {}),
        ],
    )
    def test_decodes(self, tmp_path, name, mode, options):
        write_image(tmp_path / name, mode=mode, **options)
        image = decode.decode(str(tmp_path / name)).numpy()
        with Image.open(tmp_path / name) as opened:
            expected = np.asarray(opened.convert("RGBA" if mode in ("RGBA", "LA") else mode).convert("RGB"))
        assert image.dtype == np.uint8
        # Chroma upsampling and CMYK conversion differ between decoders.
        tolerance = 12 if mode == "CMYK" or name.endswith("webp") else 1
        assert np.abs(image.astype(int) - expected).mean() < tolerance

    def test_decodes_16_bits_and_the_first_frame(self, tmp_path):
        wide = np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000
        Image.fromarray(wide).save(tmp_path / "wide.png")
        np.testing.assert_array_equal(decode.decode(str(tmp_path / "wide.png"))[..., 0], wide >> 8)
        frames = [Image.fromarray(np.full([7, 9], value, np.uint8)) for value in (10, 200)]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode.decode(str(tmp_path / "moving.gif")), np.full([7, 9, 3], 10))

    def test_unlabelled_and_nested(self, tmp_path):
        files = [f"deep/er/{i}.jpg" for i in range(15)] + [f"{i}.PNG" for i in range(15)]
        root = write_folder(tmp_path, files)
        train, held_out = (load_folder(root, split) for split in ("train", "eval"))
        assert (train.num_examples, held_out.num_examples) == (25, 5)
        assert set(names(root, train)).isdisjoint(names(root, held_out))
        assert train.num_classes == 0 and set(train.labels) == {-1}

    def test_classes_are_sub_folders_and_some_of_each_are_held_out(self, tmp_path):
        root = write_folder(tmp_path, [f"{kind}/x/{i}.png" for kind in ("dog", "cat") for i in range(40)])
        train, held_out = (load_folder(root, split) for split in ("train", "eval"))
        assert train.num_classes == 2
        for source in (train, held_out):
            classes = [name.split("/")[0] for name in names(root, source)]
            assert classes == [["cat", "dog"][label] for label in source.labels]
        assert (np.bincount(held_out.labels) > 0).all()

    def test_a_single_image_is_for_training(self, tmp_path):
        root = write_folder(tmp_path, ["1.png"])
        assert [load_folder(root, split).num_examples for split in ("train", "eval")] == [1, 0]

    def test_one_sub_folder_or_an_image_beside_them_is_unlabelled(self, tmp_path, capsys):
        one = write_folder(tmp_path / "one", [f"all/{i}.png" for i in range(4)])
        beside = write_folder(tmp_path / "beside", ["cat/1.png", "dog/1.png", "stray.png"])
        for source in (load_folder(one), load_folder(beside)):
            assert source.num_classes == 0 and set(source.labels) == {-1}
        assert "no classes" in capsys.readouterr().out

    @pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
    def test_own_splits(self, tmp_path, val):
        files = [
            "train/cat/1.png",
            "train/dog/1.png",
            "train/dog/2.png",
            f"{val}/cat/3.png",
            f"{val}/dog/3.png",
        ]
        root = write_folder(tmp_path, files)
        train, held_out = (load_folder(root, split) for split in ("train", "eval"))
        assert names(root, train) == files[:3] and list(train.labels) == [0, 1, 1]
        assert names(root, held_out) == files[3:] and list(held_out.labels) == [0, 1]

    def test_unlabelled_validation_of_labelled_training(self, tmp_path):
        root = write_folder(tmp_path, ["train/cat/1.png", "train/dog/1.png", "test/1.png"])
        assert load_folder(root).num_classes == 2
        assert load_folder(root, "eval").num_classes == 0

    def test_validation_class_that_training_lacks(self, tmp_path):
        files = ["train/cat/1.png", "train/dog/1.png", "val/cow/1.png", "val/cat/1.png"]
        root = write_folder(tmp_path, files)
        with pytest.raises(UserError, match=r"val/cow: a class without images in .*train/; give both splits"):
            load_folder(root)

    def test_the_seed_alone_chooses_the_held_out_images(self, tmp_path):
        root = write_folder(tmp_path, [f"{i}.png" for i in range(40)])
        chosen = [names(root, load_folder(root, "eval", seed=seed)) for seed in (0, 0, 1)]
        assert chosen[0] == chosen[1] != chosen[2]

    def test_ignores_links_hidden_files_and_what_is_no_image(self, tmp_path, capsys):
        root = write_folder(tmp_path / "root", ["1.png", "2.png", ".hidden.png", ".hidden/3.png"])
        write_image(tmp_path / "elsewhere" / "4.png")
        (root / "link.png").symlink_to(root / "1.png")
        (root / "linked").symlink_to(tmp_path / "elsewhere")
        (root / "notes.txt").write_text("text")
        workdir = tmp_path / "run"
        load_folder(root, workdir=workdir)
        listed = json.loads((workdir / "images.json").read_text())
        assert sorted(name for name, _ in listed["train"] + listed["eval"]) == ["1.png", "2.png"]
        assert "ignored 2 symbolic links, 1 .txt" in capsys.readouterr().out

    def test_corrupt_images_are_counted_named_and_skipped(self, tmp_path, capsys):
        root = write_folder(tmp_path, [f"{i}.jpg" for i in range(5)] + ["cut.jpg", "cut.png", "cut.webp"])
        for name in ("cut.jpg", "cut.png", "cut.webp"):
            (root / name).write_bytes((root / name).read_bytes()[:-60])
        (root / "text.jpg").write_text("this is text")
        (root / "zero.jpg").write_bytes(b"")
        listed = [name for split in ("train", "eval") for name in names(root, load_folder(root, split))]
        assert sorted(listed) == [f"{i}.jpg" for i in range(5)]
        line = capsys.readouterr().out.splitlines()[0]
        assert "skipped 5 corrupt: cut.jpg (jpeg::Uncompress failed" in line
        assert "cut.png (Invalid PNG data" in line and line.endswith("and 2 more")

    def test_restart_does_not_scan_and_indices_stay_when_files_are_added(self, tmp_path, monkeypatch):
        root = write_folder(tmp_path / "root", [f"{i}.png" for i in range(20)])
        workdir = tmp_path / "run"
        before = load_folder(root, workdir=workdir)
        write_folder(root, ["00.png", "zz.png"])
        monkeypatch.setattr(folder, "_inspect", None)
        after = load_folder(root, workdir=workdir)
        np.testing.assert_array_equal(before.records, after.records)
        assert [path.name for path in workdir.iterdir()] == ["images.json"]

    def test_vanished_file(self, tmp_path):
        root = write_folder(tmp_path / "root", [f"{i}.png" for i in range(20)])
        load_folder(root, workdir=tmp_path / "run")
        for name in ("7.png", "8.png"):
            (root / name).unlink()
        with pytest.raises(UserError, match="7.png, 8.png: listed in .*images.json but no longer .*restore"):
            load_folder(root, workdir=tmp_path / "run")

    def test_names_need_not_be_text(self, tmp_path, capsys):
        for number, name in enumerate([b"\xff.png", "ü [1]*.png".encode()]):
            data = io.BytesIO()
            Image.fromarray(np.full([2, 2, 3], number, np.uint8)).save(data, "PNG")
            with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
                file.write(data.getvalue())
        (tmp_path / "run").mkdir()
        for _ in range(2):
            sources = [load_folder(tmp_path, split, tmp_path / "run") for split in ("train", "eval")]
        images = [source.decode(tf.gather(tf.Variable(source.records), 0)) for source in sources]
        assert sorted(int(image[0, 0, 0]) for image in images) == [0, 1]

    def test_a_remote_folder_is_walked_the_same_way(self, tmp_path):
        root = write_folder(tmp_path, [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(5)])
        write_folder(root, [".hidden/1.png"])
        here, there = load_folder(root), load_folder(f"file://{root}")
        assert names(root, here) == names(f"file://{root}", there)
        assert there.decode(there.records[0]).shape == (7, 9, 3)

    @pytest.mark.parametrize(
        "files, message",
        [
            ([], "found no .jpg .* files, and no others; set --config.dataset.path to a folder"),
            (
                ["a.psd", "b.PSD", "c.txt"],
                "found no .* only 2 .psd, 1 .txt; convert other image types to PNG",
            ),
            (["bad.jpg"], r"none of 1 images can be decoded: bad.jpg \(no JPEG, PNG, .*, DICOM file"),
        ],
    )
    def test_no_images(self, tmp_path, files, message):
        for name in files:
            (tmp_path / name).write_text("this is text")
        with pytest.raises(UserError, match=message):
            load_folder(tmp_path)

    def test_missing_unreadable_or_unset(self, tmp_path, monkeypatch):
        with pytest.raises(UserError, match="dataset.path is not set: give --config.dataset.path=PHOTOS"):
            datasets.load(config("folder"), "train", seed=0)
        with pytest.raises(UserError, match="nowhere.* is no folder; set --config.dataset.path"):
            load_folder(tmp_path / "nowhere")

        def denied(path):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(os, "scandir", denied)
        with pytest.raises(UserError, match=f"{tmp_path}: Permission denied; set --config.dataset.path"):
            load_folder(tmp_path)
