"""A folder of image files: which files, labels and splits, fixed at the first start in a workdir."""

import collections
import concurrent.futures
import hashlib
import json
import os
import re
import uuid

import tensorflow as tf
from etils import epath

from simclr_jax.data import CORES
from simclr_jax.data.decode import decode, decode_bytes  # noqa: F401
from simclr_jax.errors import UserError

IMAGE_TYPES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif")
_EVAL_FOLDERS = ("val", "valid", "validation", "test")
_HELD_OUT = 0.1


def catalogue(path, *, seed, workdir=None) -> dict:
    """Lists the images of a folder that can be decoded.

    `train/` and `val/` (or valid, validation, test) sub-folders are the splits; else a fixed tenth of the
    images, of every class where there are classes, is held out by a hash of (seed, relative path). Two or
    more sub-folders of the (training) folder, and no image beside them, are the classes.

    Args:
        path: the folder; any file system that TensorFlow reads.
        seed: of the held-out tenth.
        workdir: keeps the answer in images.json, which the next start reads instead: it does not decode
            again, and no index moves when files are added.

    Returns:
        {'classes': [name], 'train': [[path relative to the folder, label or -1]], 'eval': the same}.

    Raises:
        UserError: no folder, no images, unreadable, or a file of images.json has vanished.
    """
    if not path:
        raise UserError(
            "dataset.path is not set: expected a folder of images; set --config.dataset.path=<folder>"
        )
    path = os.fspath(path).rstrip("/") or "/"
    listing = epath.Path(workdir) / "images.json" if workdir else None
    files, ignored = _walk(path)
    if listing and listing.exists():
        listed = json.loads(listing.read_text())
        names = {name for split in ("train", "eval") for name, _ in listed[split]}
        vanished = sorted(names.difference(files))
        if vanished:
            raise UserError(
                f"{_some(vanished)}: listed in {listing} but no longer in {path}; "
                "restore what is missing, or start with a new --workdir"
            )
        return listed

    if not files:
        raise UserError(
            f"dataset.path={path!r}: found no {' '.join(IMAGE_TYPES)} files, only "
            f"{_count(ignored)}; convert other image types to PNG or JPEG first"
        )
    corrupt = _corrupt(path, files)
    good = [name for name in files if name not in corrupt]
    skipped = _some([f"{name} ({why})" for name, why in corrupt.items()])
    if not good:
        raise UserError(
            f"dataset.path={path!r}: none of {len(files)} images can be decoded: {skipped}; "
            "check that they open in an image viewer"
        )
    listed = _assign(path, good, seed)
    print(
        f"{path}: {len(listed['train'])} training and {len(listed['eval'])} validation images, "
        f"{len(listed['classes']) or 'no'} classes; ignored {_count(ignored)}; "
        f"skipped {len(corrupt)} corrupt{': ' if corrupt else ''}{skipped if corrupt else ''}",
        flush=True,
    )
    if listing:
        listing.parent.mkdir(parents=True, exist_ok=True)
        # Every process writes the same list; a rename leaves no reader half a file.
        partial = listing.parent / f"{listing.name}.{uuid.uuid4().hex}.tmp"
        partial.write_text(json.dumps(listed))
        partial.replace(listing)
    return listed


def _walk(path):
    """Returns sorted relative paths of the image files, and what else was seen as {type: count}."""

    def fail(error):
        reason = getattr(error, "strerror", None) or getattr(error, "message", None) or error
        raise UserError(
            f"{_shown(getattr(error, 'filename', None) or path)}: {reason}; "
            "set --config.dataset.path to a folder that can be read"
        )

    walk = tf.io.gfile.walk if "://" in path else os.walk
    if not tf.io.gfile.isdir(path):
        raise UserError(f"dataset.path={path!r} is no folder; set --config.dataset.path=<folder of images>")
    files, ignored = [], collections.Counter()
    for top, folders, names in walk(path, onerror=fail):
        links = [name for name in [*folders, *names] if os.path.islink(os.path.join(top, name))]
        ignored["symbolic links"] += len(links)
        # In place: this is how walk is told not to descend.
        folders[:] = [name for name in folders if not name.startswith(".") and name not in links]
        for name in names:
            kind = os.path.splitext(name)[1].lower()
            if name.startswith(".") or name in links:
                continue
            if kind in IMAGE_TYPES:
                files.append(os.path.join(top, name)[len(path) :].lstrip("/"))
            else:
                ignored[kind or "files without a type"] += 1
    return sorted(files), +ignored


def _corrupt(path, files):
    """Decodes every file once. Returns {relative path: reason} for those that fail."""

    def reason(name):
        try:
            decode(os.fsencode(os.path.join(path, name)))
        except tf.errors.OpError as error:
            return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message.replace("\n", " ")).strip()[:100]

    chunks = [files[start : start + 256] for start in range(0, len(files), 256)]
    with concurrent.futures.ThreadPoolExecutor(2 * CORES) as pool:  # twice: some wait for the disk
        reasons = pool.map(lambda chunk: [reason(name) for name in chunk], chunks)
        pairs = zip(files, (why for chunk in reasons for why in chunk))
        return {name: why for name, why in pairs if why is not None}


def _assign(path, files, seed):
    """Gives every file a split and a label."""
    tops = {name.split("/")[0].lower(): name.split("/")[0] for name in files if "/" in name}
    held_out = next((tops[name] for name in _EVAL_FOLDERS if name in tops), None)
    if "train" in tops and held_out:
        train, held_out = (tops["train"] + "/", held_out + "/")
        parts = {prefix: [name for name in files if name.startswith(prefix)] for prefix in (train, held_out)}
        classes = _classes(parts[train], train)
        unknown = sorted(set(_classes(parts[held_out], held_out)).difference(classes)) if classes else []
        if unknown:
            raise UserError(
                f"{path}/{held_out}{_shown(unknown[0])}: a class without images in "
                f"{path}/{train}; give both splits the same sub-folders"
            )
        return {
            "classes": classes,
            "train": _labelled(parts[train], train, classes),
            "eval": _labelled(parts[held_out], held_out, classes),
        }

    classes = _classes(files, "")
    by_label = collections.defaultdict(list)
    for name, label in _labelled(files, "", classes):
        by_label[label].append(name)
    chosen = set()
    for names in by_label.values():
        # By hash, so that an image keeps its side when others come or go.
        names = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{_shown(name)}".encode()).digest())
        chosen.update(names[: max(1, round(_HELD_OUT * len(names)))] if len(names) > 1 else [])
    train = [name for name in files if name not in chosen]
    return {
        "classes": classes,
        "train": _labelled(train, "", classes),
        "eval": _labelled(sorted(chosen), "", classes),
    }


def _classes(files, prefix):
    inside = [name[len(prefix) :] for name in files]
    classes = sorted({name.split("/")[0] for name in inside if "/" in name})
    return classes if len(classes) > 1 and all("/" in name for name in inside) else []


def _labelled(files, prefix, classes):
    labels = {name: label for label, name in enumerate(classes)}
    return [[name, labels.get(name[len(prefix) :].split("/")[0], -1)] for name in files]


def _shown(name):
    return os.fspath(name).encode("utf-8", "replace").decode()  # file names need not be valid text


def _some(names, limit=3):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(_shown(name) for name in names[:limit]) + more


def _count(kinds):
    return ", ".join(f"{count} {_shown(kind)}" for kind, count in kinds.most_common(5)) or "nothing"
