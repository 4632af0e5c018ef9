"""Writes images as a dataset of TensorFlow Datasets, once, for runs that read it by its name:

    python -m simclr_jax.data.prepare PHOTOS --name=NAME --data_dir=DIR --max_side=512
    python -m simclr_jax.main --config=configs/folder.py --config.dataset.name=NAME \\
        --config.dataset.data_dir=DIR --workdir=RUN

PHOTOS is a folder of images, with the splits, classes and groups that a run on it would have; several folders
and images, which are taken as parts of the folder that holds them all; a CSV file with the columns `name`,
relative to its folder, and `label`; tar files of WebDataset, as train-000.tar (KEY.jpg beside KEY.cls,
KEY.json or KEY.txt); or a dataset that Hugging Face's `save_to_disk` wrote.

Files are copied as they are, but for --max_side, and for types that TensorFlow does not read, which become
PNG. Damaged images and images of one colour are left out; DIR/NAME/left_out.csv lists them. A start after a
kill writes the same bytes. --runner=DirectRunner, DataflowRunner, FlinkRunner or SparkRunner prepares by
Apache Beam, on other machines than this one; further flags are options of Beam.
"""

import collections
import concurrent.futures
import functools
import importlib
import json
import os
import re
import tarfile
import time
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from etils import epath, epy

from simclr_jax.data import CORES, datasets, decode
from simclr_jax.data.sources import folder
from simclr_jax.process import UserError, errors, escape, files, first_few, reason_of, say

with epy.lazy_imports():  # The import takes seconds.
    import tensorflow_datasets as tfds

_VERSION = "1.0.0"
_JPEG = b"\xff\xd8\xff"
_KEPT = (_JPEG, b"\x89PNG", b"BM")  # How files begin that are copied as they are.
_ONE_COLOUR = 2  # The largest difference of values, of 255, in an image that shows nothing.
_IN_MEMORY = 2**32  # Bytes from which the next command reads the dataset as a stream.
_SAMPLE = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # Key and type of a member, in WebDataset's words.


class Row(NamedTuple):
    """An image that is to be written: its place is a key of `READERS` and arguments."""

    name: str
    label: int  # -1 without one
    group: str
    place: tuple


class Collection(NamedTuple):
    """The images of all sources: {split: rows}, the names of classes, and what is known of the folder."""

    splits: dict[str, list[Row]]
    classes: list[str]
    damaged: dict[str, str] = {}
    is_deep: bool = False  # whether images are stored with 16 bits
    value_range: tuple | None = None  # the values that become black and white then


def main(argv: list[str]) -> None:
    parser = errors.command_parser(__doc__)
    parser.add_argument("sources", nargs="+", help="a folder, folders and images, a CSV file, or tar files")
    parser.add_argument("--name", required=True, help="of the dataset, as my_photos")
    parser.add_argument("--data_dir", required=True, help="folder of datasets; gs:// too")
    parser.add_argument("--labels", help="CSV file of labels of the folder, as --config.dataset.labels")
    parser.add_argument("--group", help="keeps images of one group on one side, as --config.dataset.group")
    parser.add_argument("--max_side", type=int, help="reduces larger images, once, to this many pixels")
    parser.add_argument("--quality", type=int, help="of JPEG files that --max_side reduces (90)")
    parser.add_argument("--num_shards", type=int, help="files of a split; by default of 64 to 128 MB each")
    parser.add_argument("--runner", help="of Apache Beam; without it, this process prepares all")
    args, beam_flags = parser.parse_known_args(argv)
    args.data_dir = os.path.expanduser(args.data_dir)
    config, start, home = _check(args, beam_flags), time.monotonic(), epath.Path(args.data_dir) / args.name
    collection = _collect(args)
    features = {"image": tfds.features.Image(dtype=np.uint16 if collection.is_deep else np.uint8)}
    features["name"] = tfds.features.Text()
    if collection.classes:
        features["label"] = tfds.features.ClassLabel(names=collection.classes)
    if args.group:
        features["group"] = tfds.features.Text()
    options = {"max_side": args.max_side, "quality": args.quality or 90, "columns": tuple(features)}
    options |= {"is_deep": collection.is_deep, "value_range": collection.value_range}
    make, damaged = functools.partial(load, **options), dict(collection.damaged)
    write = functools.partial(_by_beam, home) if args.runner else functools.partial(_here, damaged)
    with files.storage(home):
        home.mkdir(parents=True, exist_ok=True)
        for unfinished in home.glob("incomplete.*"):  # A killed start has left them.
            unfinished.rmtree()
        builder = tfds.dataset_builders.store_as_tfds_dataset(
            args.name,
            _VERSION,
            tfds.features.FeaturesDict(features),
            {split: write(split, rows, make) for split, rows in collection.splits.items()},
            data_dir=args.data_dir,
            description="Images, by simclr_jax.data.prepare.",
            download_config=config,
        )
        for split in collection.splits if args.runner else ():
            damaged |= files.read_json(home / f"{split}.damaged.json")
            for kind in ("damaged.json", "jsonl"):
                (home / f"{split}.{kind}").unlink()
        files.write_csv(home / "left_out.csv", [("name", "reason"), *sorted(damaged.items())])
    _report(args, builder.info, home, len(damaged), time.monotonic() - start)


def _check(args, beam_flags):
    """Refuses wrong flags; returns the configuration of TFDS."""
    taken = (*datasets.SOURCES, *tfds.list_builders())
    if not re.fullmatch(r"[a-z][a-z0-9_]*", args.name) or args.name in taken:
        raise UserError(f"--name={escape(args.name)}: expected a new name of a-z, 0-9 and _, as my_photos")
    if files.exists(prepared := os.path.join(args.data_dir, args.name, _VERSION)):
        raise UserError(f"{escape(prepared)} exists already: choose another --name, or remove it")
    for flag, high in (("max_side", 2**16), ("quality", 100), ("num_shards", 2**16)):
        if (value := getattr(args, flag)) is not None and not 1 <= value <= high:
            raise UserError(f"--{flag}={value}: expected a whole number from 1 to {high}")
    if args.quality and not args.max_side:
        raise UserError(f"--quality={args.quality} is that of reduced images: set --max_side, too")
    if beam_flags and not args.runner:
        raise UserError(f"{first_few(map(escape, beam_flags))}: unknown; options of Beam need --runner")
    config = tfds.download.DownloadConfig(num_shards=args.num_shards)
    if args.runner:
        beam = _package("apache_beam", "simclr-jax[beam]")
        all_cores = ["--direct_num_workers=0", "--direct_running_mode=multi_processing"]
        beam_flags = all_cores * (args.runner == "DirectRunner") + beam_flags
        try:
            config.beam_runner = beam.runners.create_runner(args.runner)
        except ValueError as error:
            raise UserError(f"--runner={escape(args.runner)}: {reason_of(error)}") from None
        config.beam_options = beam.options.pipeline_options.PipelineOptions(beam_flags)
    return config


def _package(name, install):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"needs {name}: pip install '{install}'") from None


def _collect(args):
    """Lists the images of all sources."""
    paths = [os.path.expanduser(path).rstrip("/") or "/" for path in args.sources]
    types = [None if epath.Path(path).is_dir() else os.path.splitext(path)[1].lower() for path in paths]
    for path, kind in zip(paths, types):
        if kind is not None and (not files.exists(path) or kind not in (".csv", ".tar", *decode.IMAGE_TYPES)):
            raise UserError(
                f"{escape(path)}: expected a folder, an image, a CSV file or a tar file, unpacked"
            )
    if len(paths) > 1 and {".csv", ".tar"} & {*types} and {*types} != {".tar"}:
        raise UserError(f"{first_few(map(escape, paths))}: give one CSV file alone, or tar files alone")
    is_saved = any(files.exists(os.path.join(paths[0], name)) for name in ("state.json", "dataset_dict.json"))
    if not is_saved and types[0] != ".tar":
        return _of_folder(paths, types, args)
    if args.labels or args.group:
        raise UserError("--labels and --group are for images in a folder: unset them")
    return _of_huggingface(paths[0]) if is_saved else _of_tars(paths)


def _of_folder(paths, types, args):
    """Lists a folder as a run would; of the folder around several sources, or a CSV file, these images alone."""
    is_csv = types[0] == ".csv"
    path = os.path.dirname(
        os.path.commonprefix([f"{p}/" if kind is None else p for p, kind in zip(paths, types)])
    )
    parts = [""] if is_csv else [source.removeprefix(path).strip("/") for source in paths]
    labels, path = paths[0] if is_csv else args.labels, path or "."
    listed = folder.catalogue(path, seed=0, labels=labels, group=args.group, parts=parts)
    if listed["channels"] != 3:
        raise UserError(f"{escape(path)}: PNG has no {listed['channels']} channels: train from the folder")
    splits = {}
    for split, entries in (("train", "train"), ("test", "eval"), ("left", "left")):
        for name, label in listed[entries]:
            if label >= 0 or not is_csv:
                row = Row(name, label, listed["groups"].get(name, ""), ("file", os.path.join(path, name)))
                splits.setdefault(_split_of(split, label, listed["classes"]), []).append(row)
    bounds = listed["value_range"] and tuple(listed["value_range"])
    return Collection(splits, listed["classes"], listed["skipped"], listed["dtype"] != "uint8", bounds)


def _split_of(split, label, classes):
    """Returns the split of an image; runs take those of a name with `unlabelled` as without labels."""
    return f"{split}_unlabelled" if classes and label < 0 else split


def _of_tars(paths):
    """Lists the samples of WebDataset, those of train-000.tar in the split train."""
    splits = collections.defaultdict(dict)
    for path in paths:
        places, texts = {}, collections.defaultdict(dict)
        try:
            with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    key, kind = re.fullmatch(_SAMPLE, member.name).groups()
                    if kind in ("cls", "json", "txt"):
                        texts[key][kind] = tar.extractfile(member).read().decode().strip()
                    elif os.path.splitext(kind)[1].lower() in decode.IMAGE_TYPES:
                        places[key] = member.name, ("file", path, member.offset_data, member.size)
            images = {name: (_label(texts[key]), place) for key, (name, place) in places.items()}
        except (tarfile.TarError, ValueError, AttributeError) as error:
            raise UserError(f"{escape(path)}: {reason_of(error)}: expected a tar file, unpacked") from None
        split = splits[re.sub(r"\W*\d*$", "", os.path.basename(path)[:-4])]
        if twice := split.keys() & images.keys():
            raise UserError(f"{escape(path)}: {escape(min(twice))} is in another file, too: rename one")
        split.update(images)
    return _divide(splits, paths[0])


def _label(texts):
    """Returns the label of a sample: its .cls, `label` or `cls` in its .json, or its .txt; None without."""
    values = json.loads(texts.get("json", "{}"))
    labels = (texts.get("cls"), values.get("label"), values.get("cls"), texts.get("txt"))
    return next((str(label) for label in labels if label is not None), None)


def _of_huggingface(path):
    """Lists the rows of a dataset with a column of images, and one of `ClassLabel` for labels."""
    _package("datasets", "datasets")
    splits = {}
    for split, table in _tables(path).items():
        columns = {type(feature).__name__: column for column, feature in table.features.items()}
        if "Image" not in columns:
            raise UserError(f"{escape(path)} has the columns {', '.join(table.features)}, and none of images")
        labels = table[columns["ClassLabel"]] if "ClassLabel" in columns else [None] * len(table)
        names = table.features[columns["ClassLabel"]].names if "ClassLabel" in columns else []
        splits[split] = {
            f"{split}/{row}": (
                None if label in (None, -1) else names[label],
                ("row", path, split, columns["Image"], row),
            )
            for row, label in enumerate(labels)
        }
    return _divide(splits, path)


@functools.cache
def _tables(path):
    loaded = importlib.import_module("datasets").load_from_disk(path)
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _divide(splits, where):
    """Makes the collection of {split: {name: (label or None, place)}}; holds a tenth out where one is all."""
    images = {name: image for split in splits.values() for name, image in split.items()}
    if not images:
        raise UserError(f"{escape(where)}: no images inside")
    if "train" not in splits or len(splits) == 1:
        test = folder.hold_out(images, 0, {})
        splits = {"train": images.keys() - test, "test": test}
    labels = [label for label, _ in images.values() if label is not None]
    classes = sorted(set(labels), key=lambda text: (int(text) if text.isdecimal() else -1, text))
    if len(classes) > max(2, len(labels) / 2):
        say(f"{escape(where)}: {len(classes)} texts of {len(labels)} images are taken as no labels")
        classes = []
    rows = collections.defaultdict(list)
    for split, names in splits.items():
        for name in sorted(names):
            text, place = images[name]
            label = classes.index(text) if text in classes else -1
            rows[_split_of(split, label, classes)].append(Row(name, label, "", place))
    return Collection(dict(rows), classes)


def _read_file(path, start=0, size=-1):
    with epath.Path(path).open("rb") as file:
        file.seek(start)
        return file.read(size)


def _read_row(path, split, column, row):
    decoded = importlib.import_module("datasets").Image(decode=False)
    image = _tables(path)[split].select([row]).cast_column(column, decoded)[0][column]
    return image["bytes"] or _read_file(image["path"])


READERS = {"file": _read_file, "row": _read_row}


def load(row: Row, columns: tuple[str, ...], **options) -> tuple[bytes, dict[str, Any] | str]:
    """Returns the key of an image, and its example with these columns, or the reason that leaves it out."""
    kind, *arguments = row.place
    name, group = os.fsencode(row.name), os.fsencode(row.group)
    try:
        image = convert(READERS[kind](*arguments), **options)
    except (tf.errors.OpError, ValueError, OSError) as error:
        return name, reason_of(error, 100)
    example = {"image": image, "name": name, "label": row.label, "group": group}
    return name, {column: example[column] for column in columns}


def convert(
    contents: bytes, *, max_side: int | None, quality: int, is_deep: bool, value_range: tuple | None
) -> bytes:
    """Returns the contents of an image file as they are stored: unchanged, reduced, or as PNG.

    Args:
      contents: those of the file.
      max_side: larger images are reduced to this many pixels; each becomes the mean of its area.
      quality: of a JPEG file that is reduced.
      is_deep: whether 16 bits are stored, `value_range` from black to white.
      value_range: see `decode.decode_bytes`.

    Raises:
      ValueError, tf.errors.OpError: it is damaged, of one colour, or of more than 8 bits where `is_deep` is
        False.
    """
    is_kept = contents.startswith(_KEPT) and not is_deep
    if not is_kept and not is_deep and decode.inspect(contents).is_deep:
        raise ValueError("more than 8 bits: unpack it, and prepare the folder")
    pixels = _decoder(value_range, "float32" if is_deep else "uint8")(contents)
    if np.ptp(pixels) * (255 if is_deep else 1) <= _ONE_COLOUR:
        raise ValueError("of one colour")
    height, width, _ = pixels.shape
    if is_large := max_side is not None and max(height, width) > max_side:
        size = [max(1, round(side * max_side / max(height, width))) for side in (height, width)]
        pixels = tf.image.resize(pixels, size, method="area")
    if is_kept and not is_large:
        return contents
    if is_deep:
        return tf.io.encode_png(tf.cast(tf.round(pixels * 65535), tf.uint16)).numpy()
    pixels = tf.cast(tf.round(pixels), tf.uint8)
    is_jpeg = contents.startswith(_JPEG)
    return (tf.io.encode_jpeg(pixels, quality=quality) if is_jpeg else tf.io.encode_png(pixels)).numpy()


@functools.cache  # Without it, every image would trace the function again.
def _decoder(value_range, dtype):
    decoder = functools.partial(decode.decode_bytes, value_range=value_range, dtype=dtype)
    return tf.function(decoder, input_signature=[tf.TensorSpec([], tf.string)])


def _here(damaged, split, rows, make):
    """Yields the examples of a split, made by the cores of this machine; adds {name: reason} to `damaged`."""
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        for first in range(0, len(rows), 256):
            for name, example in pool.map(make, rows[first : first + 256]):
                if isinstance(example, str):
                    damaged[os.fsdecode(name)] = example
                else:
                    yield name, example
    if all(row.name in damaged for row in rows):
        raise UserError(f"{split}: none of {len(rows)} images is good: {first_few(damaged.values())}")


def _by_beam(home, split, rows, make):
    """Returns a transform of Beam that makes the examples of a split, from a list that all workers read."""
    import apache_beam as beam

    with (home / f"{split}.jsonl").open("w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)

    def write(pairs):
        damaged = {os.fsdecode(name): reason for name, reason in pairs}
        files.write_json(home / f"{split}.damaged.json", damaged)

    @beam.ptransform_fn
    def examples(root):
        lines = root | beam.io.ReadFromText(os.fspath(home / f"{split}.jsonl")) | beam.Reshuffle()
        made = lines | beam.Map(lambda line: make(Row(*json.loads(line))))
        damaged = made | "damaged" >> beam.Filter(lambda pair: isinstance(pair[1], str))
        _ = damaged | beam.combiners.ToList() | beam.Map(write)
        return made | beam.Filter(lambda pair: not isinstance(pair[1], str))

    return examples()


def _report(args, info, home, left_out, seconds):
    """Prints what was written, and the next command."""
    splits = {split: part.num_examples for split, part in info.splits.items()}
    counts = ", ".join(f"{split} {count:,}" for split, count in splits.items())
    say(
        f"{escape(home)}: {counts} images, {info.dataset_size / 1e6:,.1f} MB; {seconds:,.1f} s, "
        f"{sum(splits.values()) / seconds:,.0f} images/s; {left_out} left out: {escape(home)}/left_out.csv"
    )
    train = "+".join(split for split in splits if split.startswith("train"))
    flags = {"name": args.name, "data_dir": args.data_dir, "train_split": train}
    flags["eval_split"] = next((split for split in splits if not split.startswith("train")), train)
    flags |= {"probe_split": "train"} if "+" in train else {}
    flags |= {"in_memory": False} if info.dataset_size > _IN_MEMORY else {}
    words = " ".join(f"--config.dataset.{key}={value}" for key, value in flags.items())
    say(f"next: python -m simclr_jax.main --config=configs/folder.py {words} --workdir=runs/{args.name}")


if __name__ == "__main__":
    from simclr_jax.data import prepare  # Workers of Beam import what they run by this name.

    errors.run(prepare.main)
