"""A folder of image files: which files, labels and splits, fixed at the first start in a workdir."""

import collections
import concurrent.futures
import functools
import hashlib
import heapq
import itertools
import os
import stat
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np
import tensorflow as tf
from etils import epath

from simclr_jax.data import CORES, tiles
from simclr_jax.data import decode as decoder
from simclr_jax.data import labels as label_files
from simclr_jax.data.readers import PackageMissing
from simclr_jax.data.source import LostFiles, Source, are_too_many
from simclr_jax.process import UserError, escape, first_few, reason_of, say, trial
from simclr_jax.process.files import StorageError, exists, read_json, set_aside, storage, write_json

_TRAIN_FOLDERS = ("train", "training")
_EVAL_FOLDERS = ("val", "valid", "validation", "test", "testing")
_UNLABELLED = ("unlabeled", "unlabelled")
# Folders that storage and archives keep beside photographs, in lower case.
_NO_PHOTOGRAPHS = ("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "__macosx")
# `catalogue` takes these keys of `dataset` as they are.
_KEYS = ("classes", "max_pixels", "value_range", "channels", "group", "tile")
_LISTS = ("train", "eval", "left")  # The lists of names and labels in images.json.
_HELD_OUT = 0.1
_GLANCE = 8  # Images that a trial of a run decodes.
_DEPTHS = (8, 10, 12, 14, 16)  # Bits of cameras, one of which the range of a folder of 16-bit files has.
_PERCENTILES = (0.1, 99.9)  # Black and white where no depth fits.
_SAMPLED, _PIXELS = 256, 4096  # Images, and pixels of each, from which the range is told.
_QUIET = 10  # Seconds between lines on how many files have been looked at.
_COMMON = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF")  # Types that go without saying where they have 8 bits.
_SPECIAL_FILES = {
    stat.S_IFLNK: "symbolic links",
    stat.S_IFIFO: "named pipes",
    stat.S_IFSOCK: "sockets",
    stat.S_IFCHR: "devices",
    stat.S_IFBLK: "devices",
}


def load(config, split: str, *, seed: int, workdir=None) -> Source:
    """Opens the images of 'train', 'eval' or 'all'; see `datasets.load`."""
    bounds = config.value_range
    if bounds is not None and not (len(bounds) == 2 and np.all(np.less(*bounds))):
        raise UserError(
            f"dataset.value_range={bounds}: expected two numbers, the lower one first, as in "
            "--config.dataset.value_range='(0, 4095)'; without it, the images decide"
        )
    if config.tile_overlap and config.tile_overlap >= (config.tile or 0):
        raise UserError(
            f"dataset.tile_overlap={config.tile_overlap}: expected less than dataset.tile={config.tile}: "
            "lower --config.dataset.tile_overlap, or set --config.dataset.tile=256"
        )
    path = os.path.expanduser(config.path or "")
    listed = catalogue(
        path,
        seed=seed if config.split_seed is None else config.split_seed,
        workdir=workdir,
        labels=config.labels and os.path.expanduser(config.labels),
        whole=split == "all",
        overlap=config.tile_overlap,
        several=config.several_labels,
        **{key: config[key] for key in _KEYS},
    )
    entries = listed[split] if split != "all" else sorted(_entries(listed))
    names, labels = [name for name, _ in entries], np.array([label for _, label in entries], np.int32)
    del entries, listed["train"], listed["eval"], listed["left"]  # Those of a million images take 90 MB.
    num_classes = len(listed["classes"])
    if config.num_classes is not None and config.num_classes < num_classes:
        raise UserError(
            f"dataset.num_classes={config.num_classes}, but {escape(path)} has the {num_classes} classes "
            f"{first_few(map(escape, listed['classes']))}; unset --config.dataset.num_classes, or set "
            "--config.dataset.classes=False for no labels"
        )
    value_range = listed["value_range"] and tuple(bounds or listed["value_range"])
    # A CSV file need not label all images; sub-folders label all or none.
    is_labelled = len(labels) and (config.labels or (labels >= 0).all())
    name = escape(path) if split == "all" else f"{escape(path)} ({split})"
    lost = LostFiles(name, len(names))
    if vanished := sorted(set(listed["lost"]).intersection(names)):
        say(lost.add(dict.fromkeys(vanished, "vanished")))
    return Source(
        name=name,
        num_examples=len(names),
        num_classes=(config.num_classes or num_classes) if is_labelled else 0,
        decode=functools.partial(
            decoder.decode,
            tile=config.tile,
            value_range=value_range,
            max_pixels=config.max_pixels,
            channels=listed["channels"],
            dtype="uint8" if listed["dtype"] == "uint8" else "float32",
        ),
        records=np.asarray([os.fsencode(os.path.join(path, name)) for name in names], object),
        labels=labels,
        names=np.array(names, object),
        class_names=tuple(listed["classes"]),
        label_sets=label_sets(listed["classes"]) if is_labelled and config.several_labels else None,
        value_range=value_range,
        groups=np.asarray([listed["groups"][name] for name in names], str) if listed["groups"] else None,
        channels=listed["channels"],
        dtype=listed["dtype"],
        lost=lost,
    )


def label_sets(labels: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the classes in labels such as `a;b`, and which of them each has, bool [labels, classes]."""
    sets = [label_files.split(label) for label in labels]
    names = sorted(set().union(*sets))
    return tuple(names), np.array([[name in members for name in names] for members in sets])


def catalogue(
    path,
    *,
    seed,
    workdir=None,
    classes=True,
    labels=None,
    whole=False,
    max_pixels=decoder.MAX_PIXELS,
    value_range=None,
    channels=None,
    group=None,
    parts=("",),
    tile=None,
    overlap=0,
    several=False,
) -> dict:
    """Lists the images of a folder that can be decoded, and prints how it understood the folder.

    `train/` (or training) and `val/` (or valid, validation, test, testing) sub-folders are the splits.
    Without the latter, the images whose hash of (seed, relative path) is in the lowest tenth are held out: an
    image keeps its split when others come or go. Two or more sub-folders of the (training) folder, and no
    image beside them, are the classes. Symbolic links and special files are ignored.

    Args:
      path: the folder; any file system that TensorFlow reads.
      seed: decides which images are held out.
      workdir: keeps the list in images.json, which the next start reads instead: it does not decode
        again, and no index moves when files are added. A damaged one is set aside and made anew.
      classes: whether sub-folders are classes; if not, the images beside `train/` are trained on too.
      labels: CSV file of labels, see `data.labels`; it wins over sub-folders. Its labels are kept with the
        list: a start with a changed file is an error, a start without the file is none.
      whole: prints no notes on splits, since the caller uses all images.
      max_pixels: larger images are refused by their header.
      value_range: values that become black and white in images of more than 8 bits; None: see `_tell_range`.
      group: a level of sub-folders, below the folder of a split, or a column of `labels`, whose images are on
        one side; None: each image is by itself, with all its tiles.
      channels: of every image, see `decode.decode_bytes`; None: those that the images have, 3 for greys.
      parts: sub-folders and image files that are listed; the whole folder by default.
      tile, overlap: side and overlap of the tiles that images are cut into, in pixels; see `data.tiles`. Each
        is an image of its own; those of nearly one colour are left out.
      several: whether an image may have several labels, as in `labels.read`.

    Returns:
      {'classes': [name], 'train': [[path relative to the folder, label or -1]], 'eval': the same, 'left': the
      same of images in neither, 'value_range': [low, high], each a number or one for each channel, None
      without images of more than 8 bits; 'channels'; 'dtype': see `source.Source`; 'lost': [name] of
      images.json that are no longer there; 'skipped': {name: reason} of what this start has left out}.

    Raises:
      UserError: no folder, no images, unreadable, labels that are wrong or have changed, or too many files
        of images.json have vanished.
    """
    if not path:
        raise UserError("dataset.path is not set: give --config.dataset.path=PHOTOS, a folder of images")
    path = os.fspath(path).rstrip("/") or "/"
    listing = epath.Path(workdir) / "images.json" if workdir else None
    listed = listing and _read(listing, path)
    if listed:
        if labels and exists(labels) and _relabel(listed, labels, path, several)[0] != listed:
            raise UserError(f"dataset.labels={escape(labels)} has changed: start with a new --workdir")
        return listed | {"lost": _vanished(listed, listing, path), "skipped": {}}

    ignored, left_out = collections.Counter(), collections.defaultdict(collections.Counter)
    files = sorted({name for name, _ in _walk(path, ignored, left_out, parts=parts)})
    left_notes = []
    for reason, counts in left_out.items():
        images = f"{_images(counts.total())} in " if counts.total() else ""
        left_notes.append(f"left out, {reason}: {images}{first_few(counts)}")
    where = f"dataset.path='{escape(path)}'"
    if not files:
        remedy = "convert other image types to PNG, which keeps all bits"
        remedy = remedy if ignored else "set --config.dataset.path to a folder of images"
        if ignored["symbolic links"]:
            remedy = "links are not followed: set --config.dataset.path to their target, or copy it (cp -rL)"
        only = f"only {_counts(ignored)}" if ignored else "and no others"
        fault = "; ".join([f"found no {' '.join(decoder.IMAGE_TYPES)} files, {only}", *left_notes])
        raise UserError(f"{where}: {fault}; {remedy}")
    # Only where every image is read do tiles have their places.
    inspected = files[: _GLANCE if trial.active and not tile else None]
    facts, corrupt, too_large, deviations = _inspect(path, inspected, max_pixels, channels, tile, overlap)
    skipped = corrupt | too_large
    good = [name for name in files if name not in skipped]
    refusal = f"{len(too_large)} of more than dataset.max_pixels={max_pixels:,}: {_reasons(too_large)}"
    remedy = "raise --config.dataset.max_pixels to take them"
    if not good:
        faults = [f"{_reasons(corrupt)}; check that they open in an image viewer"] if corrupt else []
        faults += [f"{refusal}; {remedy}"] if too_large else []
        raise UserError(f"{where}: none of {len(files)} images can be decoded: {'; '.join(faults)}")
    num_channels = channels or _tell_channels(
        where, [name for name in inspected if name not in skipped], facts
    )
    bounds = None
    if deep := {name: fact.dtype for name, fact in facts.items() if fact.is_deep}:
        sampled = {part: dtype for name, dtype in deep.items() for part in deviations.get(name, [name])}
        bounds = value_range or _tell_range(path, sampled, num_channels, max_pixels, tile)
    if tile:
        good, note = _cut(where, good, deviations, deep, bounds)
        left_notes = [*left_notes, note]
    group_of = _groups(where, path, good, group, labels)
    listed, split_notes, class_notes = _assign(
        path, good, seed, classes and not labels, strict=not whole, group_of=group_of
    )
    if labels:
        listed, class_notes = _relabel(listed, labels, path, several)

    has_left_out = left_notes or (listed["left"] and not whole)
    count = f"{len(listed['train'])} training and {len(listed['eval'])} validation images"
    summary = [
        f"{_images(len(good)) if whole else count}, {len(listed['classes']) or 'no'} classes",
        f"ignored {_counts(ignored)}" + (" else" if not ignored and has_left_out else ""),
        f"skipped {len(corrupt)} corrupt{': ' if corrupt else ''}{_reasons(corrupt)}",
    ]
    notes = left_notes + (class_notes if whole else split_notes + class_notes)
    if too_large:
        notes.append(f"refused {refusal}; {remedy}")
    if ignored["symbolic links"]:
        notes.append("symbolic links to files and folders are not followed: copy their targets (cp -rL)")
    listed |= {"groups": group_of, "channels": num_channels, "value_range": bounds and list(bounds)}
    listed["dtype"] = "float16" if deep else "uint8"
    kinds = collections.Counter(
        str(fact) for fact in facts.values() if fact.is_deep or fact.kind not in _COMMON
    )
    words = [f"{count} {kind}" for kind, count in kinds.most_common()]
    counts = [sum(column) for column in zip(*(fact.traits for fact in facts.values()))]
    words += [f"{count} {trait}" for count, trait in zip(counts, decoder.TRAITS) if count]
    if deep:
        low, high = bounds or ("0", "65535 of 16 bits and 1 of floats")
        words.append(f"black is {low}, white {high} (--config.dataset.value_range)")
    if words:
        notes.append(f"images: {'; '.join(words)}")
    say("\n  ".join([f"{escape(path)}: {'; '.join(summary)}", *notes]))
    if listing:
        with storage(listing):
            listing.parent.mkdir(parents=True, exist_ok=True)
        write_json(listing, listed)  # Every process writes the same list.
    return listed | {"lost": [], "skipped": skipped}


def files_in(path) -> dict[str, int | str]:
    """Returns the number of image files in a folder, and a digest of their names and sizes.

    Raises:
      UserError: there is no such folder, or it cannot be read.
    """
    files = sorted(_walk(os.path.expanduser(path).rstrip("/") or "/"))
    facts = b"".join(os.fsencode(name) + f"\0{size}\0".encode() for name, size in files)
    return {"files": len(files), "digest": hashlib.sha256(facts).hexdigest()[:12]}


def _read(listing, path):
    """Returns the list of an earlier start, or None; sets a damaged one aside."""
    if not listing.exists():
        return None
    try:
        defaults = {"value_range": None, "channels": 3, "dtype": "uint8", "left": [], "groups": {}}
        listed = defaults | read_json(listing)
        _check_listed(listed)
    except (IsADirectoryError, KeyError, RecursionError, TypeError, ValueError) as error:
        fault = f"{type(error).__name__}: {reason_of(error)}"
    else:
        names = [name for name, _ in _entries(listed)]
        outside = [name for name in names if name.startswith("/") or "://" in name or ".." in name.split("/")]
        if outside:
            raise UserError(
                f"{escape(listing)}: {first_few(map(escape, outside))}: not inside of {escape(path)}; "
                "move the file away, and it is made anew"
            )
        return listed
    with suppress(StorageError):  # The one process that renames the file prints this: not `say`.
        aside = set_aside(listing).name
        print(f"{escape(listing)}: damaged ({fault[:100]}); moved to {aside} and made anew", flush=True)
    return None


def _entries(listed):
    return [entry for split in _LISTS for entry in listed[split]]


def _check_listed(listed):
    """Raises ValueError, TypeError or KeyError unless `catalogue` may have written this list."""
    classes = listed["classes"]
    low, high = listed["value_range"] or (0, 1)
    if not (listed["train"] and np.all(np.less(low, high)) and listed["channels"] > 0):
        raise ValueError("no training images, or a wrong value_range")
    for name, label in [*_entries(listed), *((name, -1) for name in classes)]:
        is_name = isinstance(name, str) and name and "\0" not in name
        if not is_name or type(label) is not int or not -1 <= label < len(classes):
            raise ValueError(f"there is an entry {[name, label]!r}")


def _vanished(listed, listing, path):
    names = [name for split in ("train", "eval") for name, _ in listed[split]]
    missing = set(map(tiles.file_of, names))
    missing.difference_update(name for name, _ in _walk(path, whole=True))
    vanished = sorted({name for name in names if tiles.file_of(name) in missing})
    if are_too_many(len(vanished), len(names)):
        raise UserError(
            f"{first_few(map(escape, vanished))}: listed in {escape(listing)} but no longer in "
            f"{escape(path)}, {len(vanished)} of {len(names)} images; restore them or use a new --workdir"
        )
    return vanished


def _walk(path, ignored=None, left_out=None, whole=False, parts=("",)):
    """Yields relative path and size of the image files of a folder, and counts the others.

    Args:
      path: the folder.
      ignored: gets counts of other files, {type: files}.
      left_out: gets counts of images that are left out, {reason: {folder: images}}.
      whole: takes those that earlier versions took.
      parts: as in `catalogue`.
    """
    ignored = collections.Counter() if ignored is None else ignored
    left_out = collections.defaultdict(collections.Counter) if left_out is None else left_out
    remote = "://" in path
    walk, is_folder = (tf.io.gfile.walk, tf.io.gfile.isdir) if remote else (os.walk, os.path.isdir)
    if not is_folder(path):
        raise UserError(f"dataset.path='{escape(path)}' is no folder; set --config.dataset.path=PHOTOS")
    reasons = {}

    def leave_out(folder, reason, count):
        left_out[reason][f"{escape(folder[len(path) :].lstrip('/')) or '.'}/"] += count

    def fail(error):
        place = getattr(error, "filename", None) or path
        if place == path:
            remedy = "set --config.dataset.path to a folder that can be read"
            raise UserError(f"{escape(place)}: {reason_of(error)}; {remedy}")
        leave_out(place, f"unreadable ({reason_of(error)})", 0)

    def walk_part(part):
        place = os.path.join(path, part).rstrip("/") or "/"
        if is_folder(place):
            return walk(place, onerror=fail)
        return [(os.path.dirname(place), [], [os.path.basename(place)])]

    for top, folders, names in itertools.chain.from_iterable(map(walk_part, parts)):
        links = [] if remote else [name for name in folders if os.path.islink(os.path.join(top, name))]
        if links:
            ignored["symbolic links"] += len(links)
        # Changed in place, so that `walk` does not descend into links.
        folders[:] = [name for name in folders if name not in links]
        # The reason that leaves a folder out leaves its sub-folders out, too.
        reasons[top] = reasons.get(os.path.dirname(top)) or (top != path and _reason(top, names, whole))
        for name in names:
            file, kind, size = os.path.join(top, name), os.path.splitext(name)[1].lower(), 0
            reason = reasons[top] or ("hidden" if name.startswith(".") else "")
            if not (remote or reason):
                try:
                    status = os.lstat(file)
                    kind, size = _SPECIAL_FILES.get(stat.S_IFMT(status.st_mode), kind), status.st_size
                except OSError as error:
                    reason = f"unreadable ({reason_of(error)})"
            if kind in decoder.IMAGE_TYPES and reason:
                leave_out(top, reason, 1)
            elif kind in decoder.IMAGE_TYPES:
                yield file[len(path) :].lstrip("/"), size
            elif not reason:
                ignored[kind or "files without a type"] += 1


def _reason(folder, names, whole):
    """Returns why the images of a folder are left out, in words; '' where they are taken."""
    parent, name = os.path.split(folder)
    if whole or name.startswith("."):
        return "hidden" if name.startswith(".") else ""
    if name.lower() in _NO_PHOTOGRAPHS:
        return "thumbnails and bins"
    config = os.path.join(parent if name == "plots" else folder, "config.json")
    with suppress(OSError, ValueError, tf.errors.OpError):
        if (name == "plots" or "config.json" in names) and {"dataset", "model"} <= {*read_json(config)}:
            return "written by runs"
    return ""


def _inspect(path, files, max_pixels, channels, tile, overlap):
    """Looks at both ends of every file, and decodes those that do not tell enough there.

    Returns:
      {name: `decode.Facts`} of images that are no plain photographs; {name: reason} of files that cannot be
      decoded; and of those that are too large. With `tile` also {name: {tile: deviation of each channel}}.
    """
    is_plain = tf.function(
        functools.partial(decoder.is_plain, max_pixels=max_pixels),
        input_signature=[tf.TensorSpec([], tf.string)],
        autograph=False,
    )
    max_bytes = 8 * max_pixels + 2**26  # The pixels with 16 bits and alpha, and tags.
    facts, corrupt, too_large, missing, deviations = {}, {}, {}, {}, {}

    def inspect(name):
        try:
            file = os.path.join(path, name)
            if tile:
                facts[name], at = decoder.survey(file, tile, overlap, max_pixels, channels)
                deviations[name] = {tiles.name_of(name, *place): value for place, value in at.items()}
                return
            size = 0 if "://" in file else os.path.getsize(file)
            if size > max_bytes * max(1, (channels or 0) // 4):
                raise decoder.TooLarge(f"{size:,} bytes")
            with (tf.io.gfile.GFile if "://" in path else open)(file, "rb") as stream:
                begin = stream.read(decoder.SEARCHED)
                stream.seek(max(0, len(begin) - 64, size - 64))
                fact = decoder.inspect_ends(begin, stream.read(), max_pixels)
            if not fact:
                contents = tf.io.read_file(os.fsencode(file))
                if is_plain(contents):
                    decoder.decode_plain(contents)
                else:
                    fact = decoder.inspect(contents.numpy(), max_pixels, channels)
            if fact and fact != decoder.PLAIN:
                facts[name] = fact
        except PackageMissing as error:
            missing[name] = str(error)
        except decoder.TooLarge as error:
            too_large[name] = reason_of(error, 100)
        except (tf.errors.OpError, ValueError, OSError) as error:
            corrupt[name] = reason_of(error, 100)

    chunks = [files[start : start + 256] for start in range(0, len(files), 256)]
    # Twice as many threads as cores, since some wait for the disk.
    with _silent_codecs(), concurrent.futures.ThreadPoolExecutor(2 * CORES) as pool:
        due = time.monotonic() + _QUIET
        for done, _ in enumerate(pool.map(lambda chunk: [inspect(name) for name in chunk], chunks)):
            if time.monotonic() > due:
                say(f"{escape(path)}: looked at {256 * done:,} of {_images(len(files))}")
                due += _QUIET
    if missing:
        name, reason = min(missing.items())
        raise UserError(f"{escape(path)}: {_images(len(missing))}, as {escape(name)}: {reason}")
    return facts, corrupt, too_large, deviations


def _cut(where, names, deviations, deep, value_range):
    """Returns the names of the tiles that show something, and a note on the others."""
    kept, count = [], sum(len(deviations[name]) for name in names)
    for name in names:
        full = decoder.FULL_RANGE[np.dtype(deep.get(name, "uint8"))]
        low, high = value_range if value_range and name in deep else full
        least = tiles.BACKGROUND * np.subtract(high, low)
        kept += [tile for tile, values in deviations[name].items() if np.any(values >= least)]
    text = f"{len(kept)} of {count} tiles of {_images(len(names))}; the others have nearly one colour"
    if not kept:
        raise UserError(f"{where}: {text}: set --config.dataset.value_range, or --config.dataset.tile=None")
    return kept, f"tiles: {text}"


def _tell_channels(where, names, facts):
    """Returns the channels of the images that were looked at, 3 without any; greys count as colours.

    Raises:
      UserError: they differ.
    """
    first = {}
    for name in names:
        count = facts[name].channels if name in facts else 3
        first.setdefault(3 if count == 1 else count, name)
    if len(first) > 1:
        images = " and ".join(
            f"{escape(name)} has {count}" for count, name in itertools.islice(first.items(), 2)
        )
        raise UserError(
            f"{where}: {images} channels: move one kind away, or set --config.dataset.channels={min(first)}, "
            "which takes the first ones"
        )
    return next(iter(first), 3)


def _tell_range(path, deep, channels, max_pixels, tile):
    """Tells the values that become black and white, of all channels or of each, from some images.

    They are 0 and the highest value of 8, 10, 12, 14 or 16 bits, or 0 and 1 of floats, where the values are
    within and fill a quarter; else percentiles. Greys and colours have one range for all channels. Where some
    images are whole numbers and some floats, there is no range: they have those of `decode.FULL_RANGE`.
    """
    if len(set(deep.values())) > 1:
        return None
    values = []
    for name in list(deep)[:: -(-len(deep) // _SAMPLED)]:
        _, raw = decoder.read_file(os.path.join(path, name), max_pixels, channels, tile)
        pixels = decoder.with_channels(raw.pixels, channels).reshape(-1, channels)
        if pixels.dtype != np.uint8:
            values.append(pixels[:: -(-len(pixels) // _PIXELS)].astype(np.float32))
    values = np.concatenate(values)
    low, high = np.percentile(values, _PERCENTILES, axis=0)
    if channels in (1, 3):
        low[:], high[:] = low.min(), high.max()
    depth = next((2**bits - 1 for bits in _DEPTHS if values.max() < 2**bits), 0)
    depth = depth if "uint16" in deep.values() else 1
    fills = (values.min() >= 0) & (values.max() <= depth) & (high >= depth / 4)
    bounds = np.where(fills, 0, low), np.where(fills, depth, np.where(high > low, high, low + 1))
    bounds = [[float(f"{value:.5g}") for value in bound] for bound in bounds]
    bounds = [[int(value) if value == int(value) else value for value in bound] for bound in bounds]
    return [bound[0] if len(set(bound)) == 1 else bound for bound in bounds]


@contextmanager
def _silent_codecs():
    """Drops the lines that libjpeg and libpng print about damaged files, whose failures are errors, too."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _relabel(listed, labels, path, several):
    """Returns the list with the labels of a CSV file in place of its own, and notes on them."""
    names = (name for name, _ in _entries(listed))
    label_of = label_files.read(labels, names, path, several=several, predicted=True)
    classes = sorted(set(label_of.values()))
    counts = collections.Counter(
        part for label in label_of.values() for part in (label_files.split(label) if several else [label])
    )
    notes = [
        f"labels: {len(label_of)} images of {escape(labels)} in {len(counts)} classes, {_span(counts)} in "
        f"each: {first_few(map(escape, sorted(counts)))}; other images have no label"
    ]
    notes += label_files.notes(label_of, several)
    numbers = {label: number for number, label in enumerate(classes)}
    entries = {
        split: [[name, numbers.get(label_of.get(name), -1)] for name, _ in listed[split]] for split in _LISTS
    }
    return listed | entries | {"classes": classes}, notes


def _groups(where, path, names, group, labels):
    """Returns {name: group}, empty where there are no groups; an image without a row is a group by itself."""
    if not group:
        return {name: file for name in names if (file := tiles.file_of(name)) != name}
    if not group.isdecimal():
        if not labels:
            raise UserError(
                f"dataset.group={group} is a column of a CSV file: set --config.dataset.labels to it"
            )
        groups = dict(zip(names, map(tiles.file_of, names)))
        return groups | label_files.read_column(labels, group.casefold(), names, path)
    group_of, splits = {}, (*_TRAIN_FOLDERS, *_EVAL_FOLDERS)
    for name in names:
        folders = name.split("/")[:-1]
        folders = folders[1:] if folders and folders[0].lower() in splits else folders
        if not 0 < int(group) <= len(folders):
            raise UserError(
                f"{where}: {escape(name)} has no sub-folder of level dataset.group={group}: move it into one"
            )
        group_of[name] = folders[int(group) - 1]
    return group_of


def _assign(path, files, seed, with_classes, strict, group_of):
    """Gives every file a split and a label.

    Returns:
      The list of `catalogue` without 'value_range', notes on splits and notes on classes.

    Raises:
      UserError: `strict`, and there is a class that only held-out images have.
    """
    folders = _sub_folders(files)
    train, held_out = _split_folders(files, folders)
    # Beside a folder of held-out images, no other folder of such a name is trained on.
    never = [name for name in folders if name.lower() in _EVAL_FOLDERS] if held_out else []
    base = f"{train}/" if train and with_classes else ""
    training = [name for name in files if name.startswith(base) and name.split("/")[0] not in never]
    classes = _classes([name.removeprefix(base) for name in training]) if with_classes else []
    class_notes = [_note_on_classes(path, training, base, classes, with_classes)]
    if held_out:
        held_out_base = f"{held_out}/"
        validation = [name for name in files if name.startswith(held_out_base)]
        split_notes = [f"splits: {escape(train)}/ and {escape(held_out)}/"]
        unknown = set(_classes([name.removeprefix(held_out_base) for name in validation])).difference(classes)
        if classes and unknown and strict:
            raise UserError(
                f"{escape(path)}/{escape(held_out)}/{escape(min(unknown))}: a class without images in "
                f"{escape(path)}/{escape(train)}/; give both splits the same sub-folders, or set "
                "--config.dataset.classes=False"
            )
    else:
        held_out_base = base
        chosen = hold_out(training, seed, group_of)
        validation = [name for name in training if name in chosen]
        training = [name for name in training if name not in chosen]
        split_notes = [
            f"splits: about a tenth of {escape(train)}/ is held out: no {_EVAL_FOLDERS[0]}/ beside it"
        ] * bool(train)
    both = {group_of.get(name) for name in training} & {group_of.get(name) for name in validation} - {None}
    if both:
        raise UserError(
            f"{escape(path)}: the group {escape(min(both))} has training and held-out images: keep it on one "
            "side"
        )
    left = sorted(set(files).difference(training, validation))
    if left:
        counts = collections.Counter(name.split("/")[0] if "/" in name else "" for name in left)
        places = [
            f"{_images(count)} {f'in {escape(top)}/' if top else 'beside them'}"
            for top, count in counts.items()
        ]
        remedy = f"--config.dataset.path takes one folder alone, as {escape(path)}/{escape(max(counts))}/"
        if with_classes and not set(counts) <= set(never):
            remedy = "--config.dataset.classes=False trains on them too, without labels"
        split_notes.append(f"left out: {first_few(places)}; {remedy}")
    listed = {
        "classes": classes,
        "train": _label(training, base, classes),
        "eval": _label(validation, held_out_base, classes),
        "left": [[name, -1] for name in left],
    }
    missing = sum(label < 0 for _, label in listed["eval"])
    if classes and missing:
        class_notes.append(f"no labels in {escape(held_out)}/: {_images(missing)} in no class's sub-folder")
    return listed, split_notes, list(filter(None, class_notes))


def _split_folders(files, folders):
    """Returns the sub-folders of training and of held-out images; None where there is none."""
    spelling = {name.lower(): name for name in folders}
    train = next((spelling[name] for name in _TRAIN_FOLDERS if name in spelling), None)
    held_out = next((spelling[name] for name in _EVAL_FOLDERS if name in spelling), None)
    if train is None or held_out:
        return train, held_out if train else None
    # A folder train/ among others may be a class too, beside bus/ and car/.
    inside = [name.removeprefix(f"{train}/") for name in files if name.startswith(f"{train}/")]
    is_split = len(folders) == 1 or _sub_folders(inside) or set(_UNLABELLED).intersection(spelling)
    return train if is_split else None, None


def _note_on_classes(path, files, base, classes, with_classes):
    """Returns a note on which sub-folders became classes, or why none did."""
    inside = [name.removeprefix(base) for name in files]
    sizes = _sub_folders(inside)
    where = f"{escape(path)}/{escape(base)}".rstrip("/")
    if classes:
        return (
            f"classes: the {len(classes)} sub-folders of {where}, {_span(sizes)} images in each: "
            f"{first_few(map(escape, classes))}; --config.dataset.classes=False takes them as no classes"
        )
    if not with_classes:
        return f"no classes: --config.dataset.classes=False; {len(sizes)} sub-folders" if sizes else ""
    beside = [name for name, short in zip(files, inside) if "/" not in short]
    if sizes and beside:
        return (
            f"no classes: {_images(len(beside))} beside the {len(sizes)} sub-folders of {where}: "
            f"{first_few(map(escape, beside))}; move what is beside them away to have them as classes"
        )
    if len(sizes) == 1 and len(_sub_folders([name.partition("/")[2] for name in inside])) > 1:
        inner = escape(next(iter(sizes)))
        return f"no classes: all is in {inner}/; --config.dataset.path={where}/{inner} has classes"
    return ""


def hold_out(files, seed, group_of) -> set[str]:
    """Returns the names whose hash is in the lowest tenth: an image keeps its split when others come or go.

    At least one of two or more images is held out, and at least one is trained on. Groups stay together, by
    the hash of their names.
    """
    groups = {group_of.get(name, name) for name in files}

    def rank(name):
        return hashlib.sha256(f"{seed}/".encode() + os.fsencode(name)).digest()

    in_lowest = sum(int.from_bytes(rank(name)[:8], "big") < _HELD_OUT * 2**64 for name in groups)
    chosen = set(heapq.nsmallest(max(0, min(max(in_lowest, 1), len(groups) - 1)), groups, key=rank))
    return {name for name in files if group_of.get(name, name) in chosen}


def _span(counts):
    """Returns '5' or '5 to 9' for the smallest and the largest of {key: count}."""
    smallest, largest = min(counts.values()), max(counts.values())
    return f"{smallest}" if smallest == largest else f"{smallest} to {largest}"


def _sub_folders(names):
    """Counts the names by the folder that they begin with."""
    return collections.Counter(name.split("/")[0] for name in names if "/" in name)


def _classes(names):
    """Returns the sub-folders, sorted, if there are two or more and no image is beside them."""
    classes = sorted(_sub_folders(names))
    return classes if len(classes) > 1 and all("/" in name for name in names) else []


def _label(files, prefix, classes):
    numbers = {name: number for number, name in enumerate(classes)}
    return [[name, numbers.get(name.removeprefix(prefix).split("/")[0], -1)] for name in files]


def _images(count):
    return f"{count} image{'' if count == 1 else 's'}"


def _reasons(errors):
    return first_few(f"{escape(name)} ({reason})" for name, reason in errors.items())


def _counts(kinds):
    return ", ".join(f"{count} {escape(kind)}" for kind, count in kinds.most_common(5)) or "nothing"
