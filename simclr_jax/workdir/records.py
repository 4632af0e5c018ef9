"""Reads and writes the config and the summary of a run.

A workdir belongs to the run of its `config.json`; `summary.json` marks a run that is over.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from simclr_jax.process import UserError, escape, files, reason_of, say

SCHEMA_VERSION = 1  # version of config.json and of the meta of checkpoints; older ones have none

# Keys that suit the step to a machine and change results slightly: batch norm takes its statistics over a
# microbatch, and the other keys change how numbers are rounded.
_MACHINE_KEYS = ("microbatches", "remat", "augment.on_device", "augment.crop_dtype")
# Keys that may differ between a run and its continuation; all but those of the machine change no result.
_FREE_KEYS = ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "dataset.data_dir")
_FREE_KEYS += ("model.channels", "augment.dtype")  # told from the images
_FREE_KEYS += ("dataset.on_device",)  # the train loop refuses views of another kind
_FREE_KEYS += ("profile_steps", "tracker", "evaluate.pictures", "keep_compiled", "beam", *_MACHINE_KEYS)
# Values of keys that older runs have not saved, where a config file has other ones now.
_OLD_VALUES = {"memory.size": 0}


def check_config(workdir, config: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
    """Raises a UserError if `workdir` holds a run with another config.

    Args:
      workdir: folder of the run.
      config: with references resolved.
      defaults: values of keys that a run of an earlier version may lack.
    """
    path = epath.Path(workdir) / "config.json"
    if not files.exists(path):
        return

    def flat(tree):
        return flatten_dict(json.loads(json.dumps(tree)), sep=".")  # as it is saved: tuples become lists

    current = flat(_resolve(config))
    saved = flat(defaults or {}) | _OLD_VALUES | flat(_resolve(read_config(workdir)))
    for key in ("dataset.path", "dataset.labels") if current.get("dataset.name") == "folder" else ():
        before, now = saved.get(key), current[key]
        if before and now and before != now and not files.exists(before):
            say(f"note: {key} was {escape(before)}, where nothing is any more: now {escape(now)}")
            saved[key] = now
    differing = [
        f"{key} is {saved.get(key)!r} there and {current[key]!r} here"
        for key in sorted(current)
        if saved.get(key) != current[key] and key not in _FREE_KEYS
    ]
    if differing:
        raise UserError(
            f"{escape(workdir)} holds a run with another config ({escape('; '.join(differing))}): "
            "choose another --workdir, or the settings of that run to continue it"
        )


def read_config(workdir) -> dict[str, Any]:
    """Reads the config of the run in `workdir`, as saved.

    Raises:
      UserError: there is none, it is damaged, or of a later version.
    """
    path = epath.Path(workdir) / "config.json"
    if not files.exists(path):
        raise UserError(f"{escape(workdir)} holds no config.json: give the workdir of a run")
    try:
        config = files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{escape(path)} is damaged ({reason_of(error)}): the checkpoints beside it hold the config too; "
            "move config.json away, and start with the settings of that run"
        ) from None
    return without_schema(path, config)


def find_images(config, path=None, *, needed: bool = True) -> None:
    """Sets the folder of a run's images to the --path of a command; raises a UserError if it is not there."""
    dataset = config.dataset
    if path and dataset.name != "folder":
        raise UserError(f"--path={escape(path)}: the run is on {dataset.name}, no folder: leave it out")
    dataset.path = path or dataset.path
    place = os.path.expanduser(dataset.path or "")
    if needed and dataset.name == "folder" and files.is_local(place) and not os.path.isdir(place):
        raise UserError(f"{escape(place)} is no folder now: set --path=PHOTOS to where its images are")


def without_schema(path, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns what `path` holds, without its version; raises a UserError where that is a later one."""
    version = saved.pop("schema_version", 0)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UserError(
            f"{escape(path)} is of schema version {escape(version)}, and this program knows up to "
            f"{SCHEMA_VERSION}: update it"
        )
    return saved


def save_config(workdir, config: dict[str, Any]) -> None:
    """Writes the resolved config beside the checkpoints, atomically."""
    workdir = epath.Path(workdir)
    with files.storage(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    config = {"schema_version": SCHEMA_VERSION, **_resolve(config)}
    files.write_json(workdir / "config.json", config, indent=2)


def note(workdir, **facts: Any) -> None:
    """Adds facts to `run.json`: the `steps` of a run in all, and why it `ended` before the last one."""
    path = epath.Path(workdir) / "run.json"
    files.write_json(path, files.read_if_whole(path) | facts)


def _resolve(config):
    """Returns a config with the absolute paths of a folder and its labels, for commands in other folders."""
    dataset = dict(config.get("dataset", {}))
    for key in ("path", "labels") if dataset.get("name") == "folder" else ():
        if dataset.get(key) and files.is_local(dataset[key]):
            dataset[key] = os.path.abspath(os.path.expanduser(dataset[key]))
    return config | {"dataset": dataset} if dataset else config


def newest_labels(run: Path) -> dict[str, Any]:
    """Returns `dataset` of the newest run in a folder of `run` whose file of labels is still there, or {}.

    Predictions that a run has learnt from are no such file. Folders without a readable config do not count.
    """
    configs = sorted(run.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for dataset in map(dataset_of, (path.parent for path in configs)):
        path = dataset.get("labels") or ""
        if path and files.exists(path) and not files.holds_predictions(path):
            return dataset
    return {}


def dataset_of(workdir) -> dict[str, Any]:
    """Returns `dataset` of a run's config; {} where it cannot be read."""
    with suppress(UserError):
        return read_config(workdir).get("dataset", {})
    return {}


def read_summary(workdir) -> dict[str, Any] | None:
    """Reads the summary of a run that is over; None if it is not over. A damaged summary is set aside."""
    path = epath.Path(workdir) / "summary.json"
    if not files.exists(path):
        return None
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        aside = files.set_aside(path)
        say(f"note: {escape(path)} is damaged ({reason_of(error)}): now {aside.name}, measuring again")
        return None
