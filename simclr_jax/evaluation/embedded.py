"""The features of all images of a run, as the task embed leaves them; made where there are none yet."""

import json
from typing import NamedTuple

import numpy as np
import pyarrow
from etils import epath
from ml_collections import ConfigDict
from pyarrow import parquet

from simclr_jax import checkpoint, pretrained, runs
from simclr_jax.config import shipped
from simclr_jax.config.saved import complete
from simclr_jax.evaluation import parts
from simclr_jax.process import files
from simclr_jax.process.console import escape
from simclr_jax.process.errors import UserError
from simclr_jax.workdir import records

ELEMENTS = 2**28  # numbers that are kept, 1 GiB: beyond it `DIMENSIONS` principal components
DIMENSIONS = 256
_FITTED = 20_000  # images that the components are found on


class Embedded(NamedTuple):
    """Images and their features, in the order of the files.

    Attributes:
      features: float32 [n, d], each row of length 1.
      basis: float32 [w, d], what took the network's w features to d, see `ELEMENTS`; None where nothing did.
      names: of the files, or `<split>/<index>` where images have none.
      split, index, labels: [n]; labels are -1 where there is none.
      class_names: where they are known.
      run: the workdir whose network made the features.
      files: that of embed, where they lie.
      config: of embed.
    """

    features: np.ndarray
    basis: np.ndarray | None
    names: list[str]
    split: list[str]
    index: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    run: epath.Path
    files: epath.Path
    config: ConfigDict


def load(run) -> Embedded:
    """The features of `run`: of a workdir of embed, of its folder `embed`, or made there now.

    Raises:
      UserError: it is no workdir of a run with a checkpoint.
    """
    run = epath.Path(run)
    files.check_reachable(run)
    if not (run / "config.json").exists():
        raise UserError(f"{escape(run)} holds no config.json: give the workdir of a run")
    config = ConfigDict(complete(records.read_config(run)))
    if not (run / "embeddings.parquet").exists():
        config = shipped.base().embed(config.copy_and_resolve_references())
        if checkpoint.steps_in(run):  # runs that train none, as of predict, take that of another
            config.pretrained = str(run)
        pretrained.inherit_settings(config, given={})
        run = run / "embed"
        if not (run / "embeddings.parquet").exists():
            runs.run(config, run)
    return _read(run / "embeddings.parquet", config)


def _read(path, config):
    with path.open("rb") as file:
        table = parquet.ParquetFile(file)
        count, width = table.metadata.num_rows, table.schema_arrow.field("features").type.list_size
        names = json.loads((table.schema_arrow.metadata or {}).get(b"class_names", b"[]"))
        known = table.read(["split", "index", "name", "label"])
        basis = _components(table, count) if count * width > ELEMENTS else None
        features = np.empty((count, width if basis is None else DIMENSIONS), np.float32)
        row = 0
        for batch in table.iter_batches(8192, columns=["features"]):
            part = directions(_rows(batch), basis)
            features[row : row + len(part)] = part
            row += len(part)
    return Embedded(
        features,
        basis,
        parts.names_in(known),
        known["split"].to_pylist(),
        parts.to_numpy(known["index"]),
        parts.to_numpy(known["label"]),
        tuple(names),
        epath.Path(config.pretrained),
        path.parent,
        config,
    )


def directions(features: np.ndarray, basis: np.ndarray | None = None) -> np.ndarray:
    """Features float32 [n, w] -> rows of length 1, [n, d], whose products are cosine similarities."""
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return features if basis is None else directions(features @ basis)


def _components(table, count):
    """The first principal components, [w, DIMENSIONS], found on some images of all parts of the file."""
    from sklearn.decomposition import PCA

    every = max(1, count // _FITTED)
    some = [_rows(batch)[::every] for batch in table.iter_batches(8192, columns=["features"])]
    found = PCA(DIMENSIONS, svd_solver="randomized", random_state=0).fit(directions(np.concatenate(some)))
    return np.ascontiguousarray(found.components_.T, np.float32)


def _rows(batch):
    return parts.to_numpy(pyarrow.Table.from_batches([batch])["features"])
