"""Rows for every image of a dataset, in parts: memory does not grow with it, and a stopped run goes on.

Each part is a Parquet file in `WORKDIR/parts` until the task has made its result of them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow
from etils import epath
from pyarrow import parquet

from simclr_jax import parallel
from simclr_jax.process import files, group
from simclr_jax.workdir import records, report


class Parts(NamedTuple):
    """What there is to do.

    Attributes:
      sources: {split: examples}.
      each: (split, first row, row behind the last) of every part.
      paths: of their files.
      done: how many of them are there already.
      result: what is made of them in the end; once it is there, they are gone.
    """

    sources: dict[str, Any]
    each: list[tuple[str, int, int]]
    paths: list[epath.Path]
    done: int
    result: epath.Path

    @property
    def images(self) -> int:
        """How many images there are, those that cannot be read any more among them."""
        return sum(source.num_examples for source in self.sources.values())


def splits(config) -> list[str]:
    """What `config.splits` names, by default all of a folder, else training and held-out images."""
    whole = "all" if config.dataset.name == "folder" else "train+eval"
    return (config.splits or whole).split("+")


def plan(config, workdir, result: str) -> Parts:
    """Opens the splits of a run of embed or predict, to make `result`, the name of a file, of them."""
    from simclr_jax.data import datasets

    sources = {
        split: datasets.load(config.dataset, split, seed=config.seed, workdir=workdir)
        for split in splits(config)
    }
    for split, source in sources.items():
        group.check_agreement(f"{split} split", datasets.fingerprint(source))
    each = [
        (split, start, min(start + config.examples_per_part, source.num_examples))
        for split, source in sources.items()
        for start in range(0, source.num_examples, config.examples_per_part)
    ]
    paths = [workdir / "parts" / f"{split}-{start:09d}.parquet" for split, start, _ in each]
    result = workdir / result
    done = len(each) if result.exists() else sum(path.exists() for path in paths)
    done = int(parallel.gather(np.array([done]))[0])  # what process 0 sees holds for all
    return Parts(sources, each, paths, done, result)


def describe(parts: Parts) -> dict[str, str]:
    """What is about to be done, for a person."""
    return {
        "dataset": ", ".join(source.name for source in parts.sources.values()),
        "images": f"{parts.images:,} in {len(parts.each)} parts, {parts.done} of them done",
    }


def compute(parts: Parts, config, workdir, rows_of: Callable[[Any], dict[str, np.ndarray]]) -> None:
    """Writes the parts that are not there yet: `split`, `index` there, file `name`, and what `rows_of` tells.

    Args:
      parts: from `plan`.
      config, workdir: of the run.
      rows_of: examples -> columns, [n] or [n, w], of those that could be read.
    """
    from simclr_jax.data import datasets

    if jax.process_index() == 0 and not parts.result.exists():
        records.save_config(workdir, config.to_dict())
        with files.storage(workdir):
            (workdir / "parts").mkdir(exist_ok=True)
    for path, (split, start, stop) in list(zip(parts.paths, parts.each))[parts.done :]:
        source = datasets.span(parts.sources[split], start, stop)
        rows = rows_of(source)
        lost = parallel.gather(datasets.lost_rows(source)[None]).any(axis=0)  # to whichever process
        if jax.process_index() == 0:
            _write(path, split, start, source.names, rows, np.flatnonzero(~lost))
        report.say(f"{split}: {stop:,} of {parts.sources[split].num_examples:,} images")


def read(parts: Parts) -> Iterator[pyarrow.Table]:
    """The parts, in order."""
    for path in parts.paths:
        yield read_table(path)


def read_table(path) -> pyarrow.Table:
    """A Parquet file, wherever it is."""
    with path.open("rb") as file:
        return parquet.read_table(file)


def names_in(table: pyarrow.Table) -> list[str]:
    """What images are called: by their files, or `<split>/<index>` where they have none."""
    columns = (table[name].to_pylist() for name in ("name", "split", "index"))
    return [name or f"{split}/{index}" for name, split, index in zip(*columns)]


def to_numpy(column: pyarrow.ChunkedArray) -> np.ndarray:
    """A column of numbers, [n], or of rows of them, [n, w]."""
    array = column.combine_chunks()
    if pyarrow.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    return array.to_numpy()


def _write(path, split, start, names, rows, kept):
    count = len(kept)
    names = [""] * count if names is None else names[kept]
    columns = {
        "split": pyarrow.array([split] * count, pyarrow.string()),
        "index": pyarrow.array(start + kept),
        "name": pyarrow.array([name.encode("utf-8", "backslashreplace") for name in names], pyarrow.string()),
    }
    for name, values in rows.items():
        columns[name] = (
            pyarrow.array(values)
            if values.ndim == 1
            else pyarrow.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
        )
    with files.writing(path) as file:
        parquet.write_table(pyarrow.table(columns), file)
