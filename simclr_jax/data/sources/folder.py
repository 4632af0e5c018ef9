"""A folder of image files: which files, labels and splits, fixed at the first start in a workdir."""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from etils import epath

from simclr_jax.data import CORES
from simclr_jax.data import decode as pictures
from simclr_jax.data import labels as label_files
from simclr_jax.data.datasets import LostFiles, Source, reason, too_many_lost
from simclr_jax.data.decode import MAX_PIXELS, decode, decode_bytes  # noqa: F401
from simclr_jax.process.console import escape
from simclr_jax.process.errors import UserError
from simclr_jax.process.files import StorageError, exists, set_aside, storage, write_json

IMAGE_TYPES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif")
_TRAIN_FOLDERS = ("train", "training")
_EVAL_FOLDERS = ("val", "valid", "validation", "test", "testing")
_UNLABELLED = ("unlabeled", "unlabelled")
_LISTS = ("train", "eval", "left")  # of images.json
_HELD_OUT = 0.1
_DEPTHS = (8, 10, 12, 14, 16)  # bits of cameras: what is told of a folder of 16-bit files
_KINDS = {
    stat.S_ISLNK: "symbolic links",
    stat.S_ISFIFO: "named pipes",
    stat.S_ISSOCK: "sockets",
    stat.S_ISCHR: "devices",
    stat.S_ISBLK: "devices",
}


def load(config, split: str, *, seed: int, workdir=None) -> Source:
    """The images of 'train', 'eval' or 'all'; see `datasets.load`."""
    ends = config.value_range
    if ends is not None and not (len(ends) == 2 and 0 <= ends[0] < ends[1] <= 65535):
        raise UserError(
            f"dataset.value_range={ends}: expected two numbers of 16 bits, the lower one first; set "
            "--config.dataset.value_range='(0, 4095)', or leave it out to have it told from the folder"
        )
    path = os.path.expanduser(config.path or "")
    listed = catalogue(
        path,
        seed=seed if config.split_seed is None else config.split_seed,
        workdir=workdir,
        classes=config.classes,
        labels=config.labels and os.path.expanduser(config.labels),
        whole=split == "all",
        max_pixels=config.max_pixels,
        value_range=ends,
    )
    # A single image is for training, or for its features: then nothing is held out.
    chosen = listed[split] if split != "all" else sorted(itertools.chain(*map(listed.get, _LISTS)))
    names, labels = zip(*chosen) if chosen else ((), ())
    labels = np.asarray(labels, np.int32)
    paths = np.asarray([os.fsencode(os.path.join(path, name)) for name in names], object)
    found = len(listed["classes"])
    if config.num_classes is not None and config.num_classes < found:
        raise UserError(
            f"dataset.num_classes={config.num_classes}, but {escape(path)} has the {found} classes "
            f"{', '.join(map(escape, listed['classes'][:3]))}{', ...' if found > 3 else ''}; unset "
            "--config.dataset.num_classes, or set --config.dataset.classes=False for no labels"
        )
    value_range = listed["value_range"] and tuple(ends or listed["value_range"])
    unknown = (labels < 0).any() and not config.labels  # by a file of labels, some are expected to be
    where = escape(path) if split == "all" else f"{escape(path)} ({split})"
    source = Source(
        name=where,
        num_examples=len(names),
        num_classes=0 if unknown or not len(labels) else config.num_classes or found,
        decode=functools.partial(
            decode, value_range=value_range or pictures.FULL_RANGE, max_pixels=config.max_pixels
        ),
        records=paths,
        labels=labels,
        names=np.asarray(names, str),
        class_names=tuple(listed["classes"]),
        value_range=value_range,
        lost=LostFiles(where, len(names)),
    )
    vanished = set(listed["lost"]).intersection(names)
    if vanished:
        source.lost.add(dict.fromkeys(sorted(vanished), "vanished"))
    return source


def catalogue(
    path,
    *,
    seed,
    workdir=None,
    classes=True,
    labels=None,
    whole=False,
    max_pixels=MAX_PIXELS,
    value_range=None,
) -> dict:
    """Lists the images of a folder that can be decoded, and says what it took for what.

    `train/` (or training) and `val/` (or valid, validation, test, testing) sub-folders are the splits. Else
    an image is held out, from training or from the whole folder, where a hash of (seed, relative path) is in
    the lowest tenth: it stays so when others come or go. Two or more sub-folders of the (training) folder,
    and no image beside them, are the classes. Symbolic links and what is no file are ignored.

    Args:
        path: the folder; any file system that TensorFlow reads.
        seed: of the held-out images.
        workdir: keeps the answer in images.json, which the next start reads instead: it does not decode
            again, and no index moves when files are added. A damaged one is set aside and made anew.
        classes: False: no labels, and what lies beside `train/` is trained on too.
        labels: CSV file of labels, see `data.labels`; it wins over sub-folders. Its labels are kept with the
            list: that it has changed since is an error, that it has gone is none.
        whole: says nothing of splits, since all images are wanted.
        max_pixels: larger images are refused by their header.
        value_range: of images of 16 bits, what becomes black and white; None: 0 and the highest value of as
            many bits (8, 10, 12, 14 or 16) as the images of the folder use.

    Returns:
        {'classes': [name], 'train': [[path relative to the folder, label or -1]], 'eval' and 'left', what is
        in neither: the same, 'value_range': [low, high], or None without images of 16 bits, 'lost': [name] of
        images.json that are no longer there}.

    Raises:
        UserError: no folder, no images, unreadable, labels that are wrong or have changed, or too many files
            of images.json have vanished.
    """
    if not path:
        raise UserError(
            "dataset.path is not set: expected a folder of images; set --config.dataset.path=<folder>"
        )
    path = os.fspath(path).rstrip("/") or "/"
    listing = epath.Path(workdir) / "images.json" if workdir else None
    files, ignored = _walk(path)
    if listed := listing and _read(listing, path):
        if labels and exists(labels) and _relabelled(listed, labels, path)[0] != listed:
            raise UserError(
                f"dataset.labels={escape(labels)} has changed since {escape(listing)} was made: start with a "
                "new --workdir"
            )
        return listed | {"lost": _vanished(listed, files, listing, path)}

    where = f"dataset.path='{escape(path)}'"
    if not files:
        remedy = "convert other image types to PNG, which keeps all bits"
        if ignored["symbolic links"]:
            remedy = (
                "links are not followed: set --config.dataset.path to what they point to, or copy it (cp -rL)"
            )
        raise UserError(f"{where}: found no {' '.join(IMAGE_TYPES)} files, only {_count(ignored)}; {remedy}")
    looked = _look(path, files, max_pixels)
    good = [name for name in files if looked[name].fault is None]
    large = [f"{name} ({looked[name].fault})" for name in files if looked[name].too_large]
    corrupt = [
        f"{name} ({looked[name].fault})"
        for name in files
        if looked[name].fault is not None and not looked[name].too_large
    ]
    refusal = f"{len(large)} of more than dataset.max_pixels={max_pixels:,}: {_some(large)}"
    raise_it = "raise --config.dataset.max_pixels to take them"
    if not good:
        reasons = [f"{_some(corrupt)}; check that they open in an image viewer"] if corrupt else []
        reasons += [f"{refusal}; {raise_it}"] if large else []
        raise UserError(f"{where}: none of {len(files)} images can be decoded: {'; '.join(reasons)}")
    listed, on_splits, notes = _assign(path, good, seed, classes and not labels, strict=not whole)
    listed["value_range"] = _value_range(looked.values(), value_range)
    if labels:
        listed, notes = _relabelled(listed, labels, path)
    parts = [
        _images(len(good))
        if whole
        else f"{len(listed['train'])} training and {len(listed['eval'])} validation images",
        f"ignored {_count(ignored)}" + (" else" if not ignored and listed["left"] and not whole else ""),
        f"skipped {len(corrupt)} corrupt{': ' if corrupt else ''}{_some(corrupt)}",
    ]
    parts[0] += f", {len(listed['classes']) or 'no'} classes"
    notes = notes if whole else on_splits + notes
    if large:
        notes.append(f"refused {refusal}; {raise_it}")
    if ignored["symbolic links"]:
        notes.append(
            "symbolic links, to files as to folders, are not followed: copy what they point to (cp -rL)"
        )
    taken = collections.Counter(
        manner for look in looked.values() if look.fault is None for manner in look.manners
    )
    told = [f"{taken[name]} {words}" for name, words in pictures.TRAITS.items() if taken[name]]
    if taken["16 bits"]:
        told[-1] += (
            f", {listed['value_range'][0]} to {listed['value_range'][1]} (--config.dataset.value_range)"
        )
    if told:
        notes.append(f"images: {'; '.join(told)}")
    print(f"{escape(path)}: {'; '.join(parts)}", *notes, sep="\n  ", flush=True)
    if listing:
        with storage(listing):
            listing.parent.mkdir(parents=True, exist_ok=True)
        write_json(listing, listed)  # every process the same list
    return listed | {"lost": []}


def _read(listing, path):
    """The list of an earlier start; None where there is none, or a damaged one, which it sets aside."""
    if not listing.exists():
        return None
    try:
        listed = json.loads(listing.read_bytes().decode())
        fault = _fault(listed)
    except (ValueError, IsADirectoryError, RecursionError) as error:  # what is no UTF-8 is a ValueError
        fault = (
            "it is a folder" if isinstance(error, IsADirectoryError) else f"{type(error).__name__}: {error}"
        )
    if fault is None:
        listed = {"value_range": None, "left": []} | listed
        names = [name for split in _LISTS for name, _ in listed[split]]
        outside = [name for name in names if name.startswith("/") or "://" in name or ".." in name.split("/")]
        if outside:
            raise UserError(
                f"{escape(listing)}: {_some(outside)}: not inside of {escape(path)}; "
                "move the file away, and it is made anew"
            )
        return listed
    with suppress(StorageError):  # another process was first
        aside = set_aside(listing)
        print(
            f"{escape(listing)}: damaged ({escape(fault)[:100]}); moved to {aside.name} and made anew",
            flush=True,
        )
    return None


def _fault(listed):
    """What is wrong with the parsed contents of images.json; None if nothing is."""

    def is_entry(entry):
        return (
            isinstance(entry, list)
            and [type(part) for part in entry] == [str, int]
            and entry[0]
            and "\0" not in entry[0]
            and -1 <= entry[1] < len(listed["classes"])
        )

    if not isinstance(listed, dict) or not all(
        isinstance(listed.get(key, [] if key == "left" else None), list) for key in ("classes", *_LISTS)
    ):
        return "lists of classes, train and eval are missing"
    if not all(isinstance(name, str) for name in listed["classes"]):
        return "class names are no text"
    for split in _LISTS:
        if wrong := [entry for entry in listed.get(split, []) if not is_entry(entry)]:
            return f"{split} has {wrong[0]!r}"
    if not listed["train"]:
        return "there are no training images"
    ends = listed.get("value_range")
    if ends is not None and not (
        isinstance(ends, list) and [type(end) for end in ends] == [int, int] and ends[0] < ends[1]
    ):
        return f"value_range is {ends!r}"
    return None


def _vanished(listed, files, listing, path):
    names = [name for split in ("train", "eval") for name, _ in listed[split]]
    vanished = sorted(set(names).difference(files))
    if too_many_lost(len(vanished), len(names)):
        raise UserError(
            f"{_some(vanished)}: listed in {escape(listing)} but no longer in {escape(path)}, "
            f"{len(vanished)} of {len(names)} images; restore what is missing, or start with a new --workdir"
        )
    return vanished


def _walk(path):
    """Returns {relative path: size} of the image files, sorted, and what else was seen as {type: count}."""

    def fail(error):
        reason = getattr(error, "strerror", None) or getattr(error, "message", None) or error
        raise UserError(
            f"{escape(getattr(error, 'filename', None) or path)}: {reason}; "
            "set --config.dataset.path to a folder that can be read"
        )

    remote = "://" in path
    walk = tf.io.gfile.walk if remote else os.walk
    if not (tf.io.gfile.isdir if remote else os.path.isdir)(path):
        raise UserError(
            f"dataset.path='{escape(path)}' is no folder; set --config.dataset.path=<folder of images>"
        )
    files, ignored = {}, collections.Counter()
    for top, folders, names in walk(path, onerror=fail):
        links = [] if remote else [name for name in folders if os.path.islink(os.path.join(top, name))]
        ignored["symbolic links"] += len(links)
        # In place: this is how walk is told not to descend.
        folders[:] = [name for name in folders if not name.startswith(".") and name not in links]
        for name in names:
            file, kind = os.path.join(top, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            status = None
            if not remote:
                try:
                    status = os.lstat(file)
                except OSError:  # it has just vanished
                    continue
                special = next((words for test, words in _KINDS.items() if test(status.st_mode)), None)
                kind = special or kind
            if kind in IMAGE_TYPES:
                files[file[len(path) :].lstrip("/")] = status.st_size if status else 0
            else:
                ignored[kind or "files without a type"] += 1
    return dict(sorted(files.items())), +ignored


class _Look(NamedTuple):
    """What decoding a file once has told of it."""

    fault: str | None  # why it cannot be decoded
    too_large: bool  # which is why
    manners: Iterable[str]  # how it is shown
    highest: int  # value of 16 bits


def _look(path, files, max_pixels):
    """Decodes every file once. Returns {relative path: _Look}."""
    is_plain = tf.function(
        functools.partial(pictures.is_plain, max_pixels=max_pixels),
        input_signature=[tf.TensorSpec([], tf.string)],
    )
    most = 8 * max_pixels + 2**26  # bytes: the pixels with 16 bits and alpha, and tags

    def look(name):
        try:
            if files[name] > most:
                raise pictures.TooLarge(f"{files[name]:,} bytes")
            contents = tf.io.read_file(os.fsencode(os.path.join(path, name)))
            if is_plain(contents):
                pictures.decode_plain(contents)
                return _Look(None, False, (), 0)
            contents = contents.numpy()
            pictures.decode_with_pillow(contents, max_pixels=max_pixels)
            return _Look(None, False, *pictures.display_traits(contents, max_pixels))
        except (tf.errors.OpError, ValueError, OSError) as error:
            return _Look(reason(error), isinstance(error, pictures.TooLarge), (), 0)

    names = list(files)
    chunks = [names[start : start + 256] for start in range(0, len(names), 256)]
    # Twice as many threads: some wait for the disk.
    with _hushed(), concurrent.futures.ThreadPoolExecutor(2 * CORES) as pool:
        looks = pool.map(lambda chunk: [look(name) for name in chunk], chunks)
        return dict(zip(names, (one for chunk in looks for one in chunk)))


@contextmanager
def _hushed():
    """Leaves out what libjpeg and libpng print of damaged files; what they fail of is raised besides."""
    sys.stderr.flush()
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


def _value_range(looked, wanted):
    highest = [look.highest for look in looked if look.fault is None and "16 bits" in look.manners]
    if not highest:
        return None
    return list(wanted or (0, next(2**bits - 1 for bits in _DEPTHS if max(highest) < 2**bits)))


def _relabelled(listed, labels, path):
    """The list with the labels of a CSV file in the place of its own, and notes on them."""
    found = label_files.read(labels, (name for split in _LISTS for name, _ in listed[split]), path)
    classes = sorted(set(found.values()))
    numbers = {label: number for number, label in enumerate(classes)}
    counts = collections.Counter(found.values())
    each = f"{min(counts.values())} to {max(counts.values())}"
    notes = [
        f"labels: {len(found)} of {escape(labels)} in {len(classes)} classes, {each} each: {_some(classes)}; "
        "what it does not name has no label"
    ]
    notes += [f"labels: {pair} are two classes" for pair in label_files.alike(classes)]
    entries = {
        split: [[name, numbers.get(found.get(name), -1)] for name, _ in listed[split]] for split in _LISTS
    }
    return listed | entries | {"classes": classes}, notes


def _assign(path, files, seed, with_classes, strict):
    """Gives every file a split and a label; returns them, notes on splits, and notes on classes.

    `strict`: classes that only held-out images have are an error.
    """
    tops = collections.Counter(name.split("/")[0] for name in files if "/" in name)
    named = {top.lower(): top for top in tops}
    train = next((named[name] for name in _TRAIN_FOLDERS if name in named), None)
    held_out = next((named[name] for name in _EVAL_FOLDERS if name in named), None) if train else None
    # A folder train/ among others may be a class too, beside bus/ and car/.
    inside = [name.removeprefix(f"{train}/") for name in files if name.startswith(f"{train}/")]
    is_split = held_out or len(tops) == 1 or _sub_folders(inside) or set(_UNLABELLED).intersection(named)
    if not (train and is_split):
        train = held_out = None
    notes = []
    never = [top for top in tops if top.lower() in _EVAL_FOLDERS] if held_out else []  # is trained on
    if train and with_classes:
        base = f"{train}/"
        training = [name for name in files if name.startswith(base)]
    else:
        base = ""
        training = [name for name in files if name.split("/")[0] not in never or "/" not in name]
    if held_out:
        validation = [name for name in files if name.startswith(f"{held_out}/")]
        notes.append(f"splits: {escape(train)}/ and {escape(held_out)}/")
    else:
        chosen = _hold_out(training, seed)
        validation = [name for name in training if name in chosen]
        training = [name for name in training if name not in chosen]
        if train:
            notes.append(
                f"splits: about a tenth of {escape(train)}/ is held out: no {_EVAL_FOLDERS[0]}/ beside it"
            )
    left = collections.Counter(
        name.split("/")[0] + "/" if "/" in name else ""
        for name in set(files).difference(training, validation)
    )
    if left:
        places = [
            f"{_images(count)} {f'in {top}' if top else 'beside them'}" for top, count in left.most_common()
        ]
        notes.append(
            f"left out: {_some(places)}; "
            + (
                "--config.dataset.classes=False trains on them too, without labels"
                if with_classes and not set(left) <= {f"{top}/" for top in never}
                else f"--config.dataset.path takes one folder alone, as {escape(path)}/{escape(max(left))}"
            )
        )
    whole = [name for name in files if name.startswith(base)] if not held_out else training
    classes = _classes(whole, base) if with_classes else []
    if held_out and classes:
        unknown = sorted(set(_classes(validation, f"{held_out}/")).difference(classes))
        if unknown and strict:
            raise UserError(
                f"{escape(path)}/{escape(held_out)}/{escape(unknown[0])}: a class without images in "
                f"{escape(path)}/{escape(train)}/; give both splits the same sub-folders, or set "
                "--config.dataset.classes=False"
            )
    listed = {
        "classes": classes,
        "train": _labelled(training, base, classes),
        "eval": _labelled(validation, f"{held_out}/" if held_out else base, classes),
        "left": [[name, -1] for name in sorted(set(files).difference(training, validation))],
    }
    on_splits, notes = notes, [_on_classes(path, whole, base, classes, with_classes)]
    if classes and any(label < 0 for _, label in listed["eval"]):
        missing = sum(label < 0 for _, label in listed["eval"])
        notes.append(
            f"no labels in {escape(held_out)}/: {_images(missing)} there in no sub-folder of a class"
        )
    return listed, on_splits, [note for note in notes if note]


def _on_classes(path, files, base, classes, with_classes):
    """A note on which sub-folders became classes, or why none did."""
    found = _sub_folders([name[len(base) :] for name in files])
    at = f"{escape(path)}/{escape(base)}".rstrip("/")
    if classes:
        sizes = [found[name] for name in classes]
        each = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        return (
            f"classes: the {len(classes)} sub-folders of {at}, {each} images each: {_some(classes)}; "
            "--config.dataset.classes=False takes them as no classes"
        )
    if not with_classes:
        return f"no classes: --config.dataset.classes=False; {len(found)} sub-folders" if found else ""
    beside = [name for name in files if "/" not in name[len(base) :]]
    if found and beside:
        return (
            f"no classes: {_images(len(beside))} beside the {len(found)} sub-folders of {at}: "
            f"{_some(beside)}; move what is beside them away to have them as classes"
        )
    if len(found) == 1 and len(_sub_folders([name[len(base) :].partition("/")[2] for name in files])) > 1:
        inner = escape(next(iter(found)))
        return f"no classes: all is in {inner}/; --config.dataset.path={at}/{inner} has classes"
    return ""


def _hold_out(files, seed):
    """Names whose hash is in the lowest tenth: so an image keeps its side when others come or go."""

    def place(name):
        return hashlib.sha256(f"{seed}/".encode() + os.fsencode(name)).digest()

    chosen = {name for name in files if int.from_bytes(place(name)[:8], "big") < _HELD_OUT * 2**64}
    if len(files) > 1 and not chosen:  # few images: but one of them is held out
        chosen = {min(files, key=place)}
    if chosen and len(chosen) == len(files):
        chosen.remove(max(files, key=place))
    return chosen


def _sub_folders(names):
    return collections.Counter(name.split("/")[0] for name in names if "/" in name)


def _classes(files, prefix):
    inside = [name[len(prefix) :] for name in files]
    classes = sorted(_sub_folders(inside))
    return classes if len(classes) > 1 and all("/" in name for name in inside) else []


def _labelled(files, prefix, classes):
    labels = {name: label for label, name in enumerate(classes)}
    return [[name, labels.get(name[len(prefix) :].split("/")[0], -1)] for name in files]


def _images(count):
    return f"{count} image{'' if count == 1 else 's'}"


def _some(names, limit=3):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(escape(name) for name in names[:limit]) + more


def _count(kinds):
    return ", ".join(f"{count} {escape(kind)}" for kind, count in kinds.most_common(5)) or "nothing"
