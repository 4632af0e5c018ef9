"""Writes images as a dataset of TensorFlow Datasets, once, for runs that read it by its name:

    python -m simclr_jax.data.prepare PHOTOS --name=NAME --data_dir=DIR --max_side=512
    python -m simclr_jax.main --config=configs/folder.py --config.dataset.name=NAME \\
        --config.dataset.data_dir=DIR --workdir=RUN

PHOTOS is a folder of images, with the splits, classes and groups that a run on it would have; several folders
and images, which are taken as parts of the folder around them; a CSV file with the columns `name`, relative
to its folder, and `label`; tar files of WebDataset, as train-000.tar (KEY.jpg beside KEY.cls, KEY.json or
KEY.txt); or a dataset that Hugging Face's `save_to_disk` wrote. The last two are unpacked in DIR/NAME first.

Files are copied as they are, but for --max_side, and for types that TensorFlow does not read, which become
PNG. Damaged images and images of one colour are left out; DIR/NAME/left_out.csv lists them. A start after a
kill writes the same bytes. --runner=DirectRunner, DataflowRunner, FlinkRunner or SparkRunner prepares by
Apache Beam, on other machines than this one; further flags are options of Beam.
"""

import concurrent.futures
import functools
import itertools
import json
import os
import re
import shlex
import tarfile
import time

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath, epy
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from simclr_jax.data import CORES, datasets, decode
from simclr_jax.data.sources import folder
from simclr_jax.process import UserError, errors, escape, files, first_few, reason_of, say, workers

with epy.lazy_imports(error_callback=workers.refuse_missing):
    import apache_beam as beam
    import datasets as huggingface

# Protobuf writes the features of an example in the order of addresses in memory unless it is asked.
ExampleSerializer.serialize_example = lambda serializer, example: serializer.get_tf_example(
    example
).SerializeToString(deterministic=True)

_VERSION = "1.0.0"
_JPEG = b"\xff\xd8\xff"
_KEPT = (_JPEG, b"\x89PNG", b"BM")  # How files begin that are copied as they are.
_ONE_COLOUR = 2 / 255  # The largest difference of values in an image that shows nothing.
_IN_MEMORY = 2**32  # Bytes from which the next command reads the dataset as a stream.


def main(argv: list[str]) -> None:
    parser = errors.command_parser(__doc__)
    parser.add_argument("sources", nargs="+", help="a folder, folders and images, a CSV file, or tar files")
    parser.add_argument("--name", required=True, help="of the dataset, as my_photos")
    parser.add_argument("--data_dir", required=True, help="folder of datasets; gs:// too")
    parser.add_argument("--labels", help="CSV file of labels of the folder, as --config.dataset.labels")
    parser.add_argument("--group", help="keeps images of one group on one side, as --config.dataset.group")
    parser.add_argument("--max_side", type=int, help="reduces larger images, once, to this many pixels")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG files that --max_side reduces (90)")
    parser.add_argument("--num_shards", type=int, help="files of a split; by default of 64 to 128 MB each")
    parser.add_argument("--runner", help="of Apache Beam; else this process works alone")
    args, beam_flags = parser.parse_known_args(argv)
    args.data_dir, start = os.path.expanduser(args.data_dir), time.monotonic()
    home, config = epath.Path(args.data_dir) / args.name, _check(args, beam_flags)
    temporary = home / "temporary"
    with files.storage(home):
        path, parts, labels = _open(args, temporary)
        listed = folder.catalogue(path, seed=0, labels=labels, group=args.group, parts=parts)
        splits, features, decoding = _plan(listed, path, only_labelled=labels != args.labels)
        make = functools.partial(load, path, (args.max_side, args.quality, decoding))
        damaged = dict(listed["skipped"])
        write = functools.partial(_by_beam, temporary) if args.runner else functools.partial(_here, damaged)
        for unfinished in home.glob("incomplete.*"):  # A killed start has left them.
            unfinished.rmtree()
        examples = {split: write(split, rows, make) for split, rows in splits.items()}
        store = functools.partial(tfds.dataset_builders.store_as_tfds_dataset, args.name, _VERSION)
        info = store(features, examples, data_dir=args.data_dir, download_config=config).info
        for file in temporary.glob("*.damaged.json"):
            damaged |= files.read_json(file)
        temporary.rmtree(missing_ok=True)
        files.write_csv(home / "left_out.csv", [("name", "reason"), *sorted(damaged.items())])
    _report(args, info, len(damaged), time.monotonic() - start)


def _check(args, beam_flags):
    """Refuses wrong flags; returns the configuration of TFDS."""
    taken = args.name in (*datasets.SOURCES, *tfds.list_builders())
    if taken or not re.fullmatch(r"[a-z][a-z0-9_]*", args.name):
        raise UserError(f"--name={escape(args.name)}: expected a new name of a-z, 0-9 and _, as my_photos")
    if files.exists(prepared := os.path.join(args.data_dir, args.name, _VERSION)):
        raise UserError(f"{escape(prepared)} exists already: choose another --name, or remove it")
    for flag, high in (("max_side", 2**16), ("quality", 100), ("num_shards", 2**16)):
        if (value := getattr(args, flag)) is not None and not 1 <= value <= high:
            raise UserError(f"--{flag}={value}: expected a whole number from 1 to {high}")
    if beam_flags and not args.runner:
        raise UserError(f"{first_few(map(escape, beam_flags))}: unknown; options of Beam need --runner")
    config = tfds.download.DownloadConfig(num_shards=args.num_shards, beam_runner=args.runner)
    if args.runner:
        config.beam_options = workers.make_options(shlex.join([f"--runner={args.runner}", *beam_flags]))
    return config


def _open(args, temporary):
    """Returns a folder, its parts that are wanted, and the CSV file of labels; unpacks what is no folder."""
    paths = [os.path.expanduser(path).rstrip("/") or "/" for path in args.sources]
    types = ["" if epath.Path(path).is_dir() else os.path.splitext(path)[1].lower() for path in paths]
    allowed = [".tar"] if types[0] == ".tar" else ["", *decode.IMAGE_TYPES, *[".csv"][: len(paths) == 1]]
    for path, kind in zip(paths, types):
        if not files.exists(path) or kind not in allowed:
            raise UserError(f"{escape(path)}: expected folders and images, one CSV file, or tar files")
    if types[0] == ".csv":
        return os.path.dirname(paths[0]) or ".", ("",), paths[0]
    temporary.rmtree(missing_ok=True)
    is_saved = any(files.exists(os.path.join(paths[0], name)) for name in ("state.json", "dataset_dict.json"))
    # Labels become sub-folders.
    if is_saved or types[0] == ".tar":
        for split, label, name, contents in _rows(paths[0]) if is_saved else _samples(paths):
            file = temporary / split / str(label).replace("/", "_").lstrip(".") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(contents)
        return os.fspath(temporary), ("",), args.labels
    names = [f"{path}/" if kind == "" else path for path, kind in zip(paths, types)]
    path = os.path.dirname(os.path.commonprefix(names))  # noqa: RUF071
    return path or ".", [name.removeprefix(path).strip("/") for name in names], args.labels


def _samples(paths):
    """Yields split, label, name and contents of the images in tar files of WebDataset.

    A text of several words is a caption, and no label. Without labels, the folders inside are taken for them.
    """
    for path in paths:
        stem, labels = os.path.basename(path)[:-4], {}
        split = re.search(r"(?<![a-z])(val|test)|$", stem)[0] or "train"
        try:
            with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                members = [(*os.path.splitext(member.name), member) for member in tar if member.isfile()]
                for key, kind, member in members:
                    if kind in (".cls", ".json", ".txt"):
                        text = tar.extractfile(member).read().decode().strip()
                        label = json.loads(text).get("label") if kind == ".json" else text
                        if label is not None and not (kind == ".txt" and " " in text):
                            labels.setdefault(key, label)
                for key, kind, member in members:
                    if kind.lower() in decode.IMAGE_TYPES:
                        name = os.path.normpath(member.name)
                        label = labels.get(key, os.path.dirname(name))
                        contents = tar.extractfile(member).read()
                        yield split, label, f"{stem}-{name.replace('/', '-')}", contents
        except (tarfile.TarError, ValueError, AttributeError) as error:
            raise UserError(f"{escape(path)}: {reason_of(error)}: expected a tar file of samples") from None


def _rows(path):
    """Yields the same of a dataset with a column of images, and one of `ClassLabel` for labels."""
    loaded = huggingface.load_from_disk(path)
    for split, table in (loaded if isinstance(loaded, dict) else {"train": loaded}).items():
        columns = {type(feature).__name__: column for column, feature in table.features.items()}
        if "Image" not in columns:
            raise UserError(f"{escape(path)} has the columns {', '.join(table.features)}, and none of images")
        image, label = columns["Image"], columns.get("ClassLabel")
        names = [*table.features[label].names, ""] if label else [""]
        for number, row in enumerate(table.cast_column(image, huggingface.Image(decode=False))):
            contents = row[image]["bytes"] or epath.Path(row[image]["path"]).read_bytes()
            yield split, names[row[label] if label else -1], f"{number:09d}.png", contents


def _plan(listed, path, only_labelled):
    """Returns {split: rows of name, label and group}, the features, and options of `decode.decode_bytes`.

    Images without a label are in splits of their own, whose names let runs take them as without labels.
    """
    if listed["channels"] != 3:
        raise UserError(f"{escape(path)}: PNG has no {listed['channels']} channels: train from the folder")
    splits, classes, groups, is_deep = {}, listed["classes"], listed["groups"], listed["dtype"] != "uint8"
    features = {"image": tfds.features.Image(dtype=np.uint16 if is_deep else np.uint8)}
    features |= {"name": tfds.features.Text()}
    features |= {"label": tfds.features.ClassLabel(names=classes)} if classes else {}
    features |= {"group": tfds.features.Text()} if groups else {}
    for split, entries in (("train", "train"), ("test", "eval"), ("left", "left")):
        for name, label in listed[entries]:
            if label >= 0 or not only_labelled:
                row = {"name": name, "label": label, "group": groups.get(name)}
                rows = splits.setdefault(f"{split}_unlabelled" if classes and label < 0 else split, [])
                rows.append({key: row[key] for key in features if key != "image"})
    suffixes = {os.path.splitext(row["name"])[1].lower() for row in itertools.chain(*splits.values())}
    kinds = {decode.IMAGE_TYPES[suffix] for suffix in suffixes}
    if is_deep:
        ends = listed["value_range"] or "those of their types"
        say(f"{escape(path)}: all images become PNG of 16 bits, where black and white are {ends}")
    elif kinds := sorted(kinds.difference(["JPEG", "PNG", "BMP"])):
        say(f"{escape(path)}: {', '.join(kinds)} files are stored as PNG, without loss")
    decoding = {"dtype": "float32", "value_range": listed["value_range"]} if is_deep else {}
    return splits, tfds.features.FeaturesDict(features), decoding


def load(path: str, options: tuple, row: dict) -> tuple[str, dict | str]:
    """Returns the name of an image in a folder, and its example, or the reason that leaves it out.

    Args:
      path: the folder.
      options: arguments of `convert`.
      row: the features without the image.
    """
    try:
        image = convert(epath.Path(os.path.join(path, row["name"])).read_bytes(), *options)
    except (tf.errors.OpError, ValueError, OSError) as error:
        return row["name"], reason_of(error, 100)
    return row["name"], row | {"image": image, "name": os.fsencode(row["name"])}


def convert(contents: bytes, max_side: int | None, quality: int, decoding: dict) -> bytes:
    """Returns the contents of an image file as they are stored: unchanged, reduced, or as PNG.

    Args:
      contents: those of the file.
      max_side: larger images are reduced to this many pixels; each becomes the mean of its area.
      quality: of a JPEG file that is reduced.
      decoding: options of `decode.decode_bytes` for images that are stored with 16 bits; else empty.

    Raises:
      ValueError, tf.errors.OpError: it is damaged, or of one colour.
    """
    facts = decode.inspect_ends(contents[: decode.SEARCHED], contents[-64:], decode.MAX_PIXELS)
    is_plain = facts == decode.PLAIN and not decoding  # It is decoded in a sixth of the time.
    pixels = decode.decode_plain(contents) if is_plain else decode.decode_bytes(contents, **decoding)
    if np.ptp(pixels) <= _ONE_COLOUR * (1 if decoding else 255):
        raise ValueError("of one colour")
    scale = min(1, (max_side or np.inf) / max(pixels.shape))
    if scale == 1 and contents.startswith(_KEPT) and not decoding:
        return contents
    if scale < 1:
        sides = [max(1, round(scale * side)) for side in pixels.shape[:2]]
        pixels = tf.image.resize(pixels, sides, method="area")
    pixels = tf.cast(tf.round(pixels * 65535 if decoding else pixels), tf.uint16 if decoding else tf.uint8)
    if contents.startswith(_JPEG) and not decoding:
        return tf.io.encode_jpeg(pixels, quality=quality).numpy()
    return tf.io.encode_png(pixels).numpy()


def _here(damaged, split, rows, make):
    """Yields the examples of a split, made by the cores of this machine; adds {name: reason} to `damaged`."""
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        for first in range(0, len(rows), 256):
            for name, example in pool.map(make, rows[first : first + 256]):
                if isinstance(example, str):
                    damaged[name] = example
                else:
                    yield os.fsencode(name), example
    if all(row["name"] in damaged for row in rows):
        raise UserError(f"{split}: all images are left out, as {first_few(damaged.items(), 1)}")


def _by_beam(temporary, split, rows, make):
    """Returns a transform of Beam that makes the examples of a split, from a list that all workers read."""
    temporary.mkdir(parents=True, exist_ok=True)
    (temporary / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    @beam.ptransform_fn
    def examples(root):
        lines = root | beam.io.ReadFromText(os.fspath(temporary / f"{split}.jsonl")) | beam.Reshuffle()
        made = lines | beam.Map(lambda line: make(json.loads(line)))
        good, damaged = made | beam.Partition(lambda pair, _: int(isinstance(pair[1], str)), 2)
        file = temporary / f"{split}.damaged.json"
        _ = damaged | beam.combiners.ToList() | beam.Map(lambda pairs: files.write_json(file, dict(pairs)))
        return good | beam.MapTuple(lambda name, example: (os.fsencode(name), example))

    return examples()


def _report(args, info, left_out, seconds):
    """Prints what was written, and the next command."""
    counts, size = {split: part.num_examples for split, part in info.splits.items()}, info.dataset_size
    say(
        f"{args.name}: {', '.join(f'{split} {count:,}' for split, count in counts.items())} images, "
        f"{size / 1e6:,.1f} MB; {seconds:,.1f} s, {sum(counts.values()) / seconds:,.0f} images/s; "
        f"{left_out} left out: {escape(args.data_dir)}/{args.name}/left_out.csv"
    )
    train, test = (
        [split for split in sorted(counts) if split.startswith(side)] for side in ("train", "test")
    )
    flags = {"name": args.name, "data_dir": args.data_dir, "in_memory": size < _IN_MEMORY}
    flags |= {"train_split": "+".join(train), "probe_split": train[0], "eval_split": (test or train)[0]}
    words = " ".join(f"--config.dataset.{key}={value}" for key, value in flags.items())
    say(f"next: python -m simclr_jax.main --config=configs/folder.py {words} --workdir=runs/{args.name}")


if __name__ == "__main__":
    from simclr_jax.data import prepare  # Workers of Beam import what they run by this name.

    errors.run(prepare.main)
