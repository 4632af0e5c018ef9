"""Rows for every image of a dataset, in parts: memory does not grow with it, and a stopped run goes on.

Each part is a Parquet file in `WORKDIR/parts` until the task has joined them into its result. The processes
of the run make it, or with `config.beam` a worker of Apache Beam.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow
from etils import epath
from ml_collections import ConfigDict
from pyarrow import parquet

from simclr_jax import parallel, pretrained
from simclr_jax.process import UserError, escape, files, group, trial, workers
from simclr_jax.workdir import records, report

ORIGIN = "origin.json"
_working = threading.Lock()  # A worker of Beam may have several threads, but holds one part at a time.


class Plan(NamedTuple):
    """The parts of a run of embed or predict.

    Attributes:
      sources: {split: examples}.
      spans: (split, first row, row behind the last) of every part.
      paths: the files of the parts.
      done: whether each part is finished, bool [parts].
      result: the file that the parts are joined into; once it exists, they are removed.
    """

    sources: dict[str, Any]
    spans: list[tuple[str, int, int]]
    paths: list[epath.Path]
    done: np.ndarray
    result: epath.Path

    @property
    def images(self) -> int:
        """The number of images, including those that can no longer be read."""
        return sum(source.num_examples for source in self.sources.values())


def splits(config) -> list[str]:
    """Returns `config.splits` as a list; by default all of a folder, else training and held-out images."""
    whole = "all" if config.dataset.name == "folder" else "train+eval"
    return (config.splits or whole).split("+")


def load(config, workdir, split: str):
    """Loads the examples of a split of a run."""
    from simclr_jax.data import datasets

    return datasets.load(config.dataset, split, seed=config.seed, workdir=workdir)


def make_plan(config, workdir, result: str) -> Plan:
    """Opens the splits of a run whose rows go to the file `result` in `workdir`.

    Raises:
      UserError: `config.beam` has wrong flags, or cannot be used here; or there is no network.
    """
    from simclr_jax.data import datasets

    if config.beam:
        workers.make_options(config.beam)
        if jax.process_count() > 1 or config.dataset.name == "arrays":
            raise UserError(f"beam={config.beam!r} takes files, and one process: leave --config.beam out")
        pretrained.fingerprint(config.pretrained, use_average=config.use_average)  # It has to be there.
    sources = {split: load(config, workdir, split) for split in splits(config)}
    for split, source in sources.items():
        group.check_agreement(f"{split} split", datasets.fingerprint(source))
    spans = [
        (split, start, min(start + config.examples_per_part, source.num_examples))
        for split, source in sources.items()
        for start in range(0, source.num_examples, config.examples_per_part)
    ]
    paths = [workdir / "parts" / f"{split}-{start:09d}.parquet" for split, start, _ in spans]
    result = workdir / result
    if jax.process_index() == 0 and not result.exists() and not trial.active:
        _remove_outdated(workdir, config)
    done = np.array([[result.exists() or path.exists() for path in paths]], bool)
    done = parallel.gather(done)[0]  # All processes follow what process 0 sees.
    return Plan(sources, spans, paths, done, result)


def _remove_outdated(workdir, config):
    """Removes the parts of a stopped run if they were made by another network than the rest would be."""
    if not files.exists(workdir / "parts"):
        return
    if network := changes(workdir, config).get("network"):
        report.say(f"{escape(workdir)} holds parts of {network}: they are made anew")
        (workdir / "parts").rmtree()


def origin(config) -> dict[str, Any]:
    """Returns what the rows of embed and predict are made of: network, image size, and files of a folder.

    `step` and `network` are those of `pretrained.fingerprint`, `files` and `digest` those of
    `folder.files_in`.
    """
    from simclr_jax.data.sources import folder

    made_of = pretrained.fingerprint(config.pretrained, use_average=config.use_average)
    made_of |= {"image_size": config.image_size}
    if config.dataset.name == "folder":
        with suppress(UserError):  # The images may be gone since.
            made_of |= folder.files_in(config.dataset.path)
    return made_of


def changes(workdir, config) -> dict[str, str]:
    """Returns how the rows in a workdir differ from those that `config` would make now, in words.

    The keys are 'network', 'image_size' and 'digest', of the files. There are none where an earlier version
    made the rows, or the network is gone.
    """
    if not files.exists(workdir / ORIGIN):
        return {}
    try:
        old, new = files.read_json(workdir / ORIGIN), origin(config)
    except (UserError, ValueError):
        return {}
    words = {"network": ("another network", "step"), "image_size": ("another size", "image_size")}
    words["digest"] = ("other images", "files")
    return {
        key: f"{difference} ({fact} {old[fact]}, now {new[fact]})"
        for key, (difference, fact) in words.items()
        if key in old and old[key] != new.get(key, old[key])
    }


def describe(plan: Plan) -> dict[str, str]:
    """Returns what is about to be done as rows for `report.print_table`."""
    return {
        "dataset": ", ".join(source.name for source in plan.sources.values()),
        "images": f"{plan.images:,}"
        + (f", {plan.done.sum()} of {len(plan.spans)} parts of them done before" if plan.done.any() else ""),
    }


def compute(plan: Plan, config, workdir, column: str, make_extract: Callable, join: Callable) -> None:
    """Writes the missing parts, and joins all of them into the result.

    A part has the columns `split`, `index` there, `name` of the file, `label` (-1: none), and `column`.

    Args:
      plan: from `make_plan`.
      config, workdir: config and folder of the run.
      column: name of the features in the parts.
      make_extract: config -> (source -> `Features` of the examples that can be read); with `config.beam` a
        function of a module, which workers import.
      join: () -> None, writes `plan.result` from the parts, on process 0.
    """
    extract = None if config.beam else make_extract(config)
    trial.end()
    is_unfinished = jax.process_index() == 0 and not plan.result.exists()
    if is_unfinished:
        records.save_config(workdir, config.to_dict())
        if not files.exists(workdir / "parts"):
            files.write_json(workdir / ORIGIN, origin(config), indent=2)
        with files.storage(workdir):
            (workdir / "parts").mkdir(exist_ok=True)
    missing = [part for part, done in zip(zip(plan.paths, plan.spans), plan.done) if not done]
    if config.beam and missing:
        report.say(f"{len(missing)} parts are made by Apache Beam: {config.beam}")
        elements = [(str(path), span) for path, span in missing]
        work = functools.partial(_make_in_worker, str(workdir), make_extract, column)
        _open.cache_clear()  # Beam may work in this process, which may have opened another run there.
        workers.run(work, elements, config.beam)
    else:
        for path, span in missing:
            _make(path, span, column, plan.sources, extract)
    if is_unfinished:
        join()
        (workdir / "parts").rmtree()


def _make(path, span, column, sources, extract):
    from simclr_jax.data import datasets

    split, start, stop = span
    source = datasets.span(sources[split], start, stop)
    rows = extract(source)
    # Any process may have lost some.
    lost = parallel.gather(datasets.lost_rows(source)[None]).any(axis=0)
    if jax.process_index() == 0:
        _write(path, split, start, source.names, rows, column, np.flatnonzero(~lost))
    report.say(f"{split}: {stop:,} of {sources[split].num_examples:,} images")


def _make_in_worker(workdir, make_extract, column, part):
    with _working:
        _make(epath.Path(part[0]), part[1], column, *_open(epath.Path(workdir), make_extract))


@functools.lru_cache(maxsize=1)
def _open(workdir, make_extract):
    """Opens the splits and the network of a run, once in a worker."""
    config = ConfigDict(records.read_config(workdir))
    return {split: load(config, workdir, split) for split in splits(config)}, make_extract(config)


def read(plan: Plan) -> Iterator[pyarrow.Table]:
    """Yields the parts, in order."""
    for path in plan.paths:
        with path.open("rb") as file:
            yield parquet.read_table(file)


def names_in(table: pyarrow.Table) -> list[str]:
    """Returns the names of images: their files, or `<split>/<index>` where they have none."""
    columns = (table[name].to_pylist() for name in ("name", "split", "index"))
    return [name or f"{split}/{index}" for name, split, index in zip(*columns)]


def names(source, split: str) -> list[str]:
    """Returns the names that the files of these tasks give the examples of a split."""
    image_names = source.read_names(0, source.num_examples) if source.read_names else source.names
    if image_names is None:
        return [f"{split}/{index}" for index in range(source.num_examples)]
    return [name.encode("utf-8", "backslashreplace").decode() for name in image_names]


def to_numpy(column: pyarrow.ChunkedArray) -> np.ndarray:
    """Returns a column of numbers or texts, [n], or of lists of numbers, [n, w], as an array."""
    array = column.combine_chunks()
    if pyarrow.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=False)


def _write(path, split, start, names, rows, column, kept):
    count = len(kept)
    names = [""] * count if names is None else names[kept]
    table = {
        "split": pyarrow.array([split] * count, pyarrow.string()),
        "index": start + kept,
        "name": pyarrow.array([name.encode("utf-8", "backslashreplace") for name in names], pyarrow.string()),
        "label": rows.labels,
        column: pyarrow.FixedSizeListArray.from_arrays(rows.features.ravel(), rows.features.shape[1]),
    }
    with files.writing(path) as file:
        parquet.write_table(pyarrow.table(table), file)
