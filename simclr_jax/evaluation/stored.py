"""The features of all images of a run, read from the files that the task embed writes."""

import json
import os
import zipfile
from typing import NamedTuple

import numpy as np
import pyarrow
from etils import epath
from ml_collections import ConfigDict
from pyarrow import parquet

from simclr_jax.evaluation import parts
from simclr_jax.evaluation.features import unit_rows
from simclr_jax.process import UserError, escape, first_few, reason_of

FILE = "embeddings.parquet"
ELEMENTS = 2**28  # Numbers that are kept, 1 GiB; larger features are projected on `DIMENSIONS` components.
DIMENSIONS = 256
_FITTED = 20_000  # Images that the principal components are fitted to.
_VECTORS = ("features", "embedding", "embeddings", "vector")  # Titles of the column of vectors.
_ROWS = 8192  # Rows that are read at a time.


class StoredFeatures(NamedTuple):
    """Images and their features, in the order of the file.

    Attributes:
      features: float32 [n, d], rows of length 1.
      basis: float32 [w, d], the projection from the network's w features to d; None without a projection.
      names: the image files, or `<split>/<index>` where images have none.
      split, index, labels: [n]; labels are -1 where there is none.
      class_names: empty where unknown.
      run: the workdir whose network made the features.
      folder: the workdir of the task embed.
      config: the config of the task embed.
    """

    features: np.ndarray
    basis: np.ndarray | None
    names: list[str]
    split: list[str]
    index: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    run: epath.Path
    folder: epath.Path
    config: ConfigDict

    @property
    def dataset(self) -> str:
        """The folder of the images, or the name of the dataset."""
        return self.config.dataset.path or self.config.dataset.name


def read(folder: epath.Path, config: ConfigDict) -> StoredFeatures:
    """Reads `FILE` in `folder`, the workdir of the task embed with this config."""
    with (folder / FILE).open("rb") as file:
        table = parquet.ParquetFile(file)
        count, width = table.metadata.num_rows, table.schema_arrow.field("features").type.list_size
        class_names = json.loads((table.schema_arrow.metadata or {}).get(b"class_names", b"[]"))
        columns = table.read(["split", "index", "name", "label"])
        basis = _principal_components(table, count) if count * width > ELEMENTS else None
        features = np.empty((count, width if basis is None else DIMENSIONS), np.float32)
        start = 0
        for rows in _feature_rows(table):
            features[start : start + len(rows)] = unit_rows(rows, basis)
            start += len(rows)
    return StoredFeatures(
        features,
        basis,
        parts.names_in(columns),
        columns["split"].to_pylist(),
        parts.to_numpy(columns["index"]),
        parts.to_numpy(columns["label"]),
        tuple(class_names),
        epath.Path(config.pretrained),
        folder,
        config,
    )


def read_vectors(path) -> tuple[list[str], np.ndarray]:
    """Reads the names of images and their vectors, float32 [n, d], from a file as `embed` writes it.

    Args:
      path: .parquet or .npz, with the columns `name` and `features`; `embedding`, `embeddings` or `vector`
        in the place of the latter, too.

    Raises:
      UserError: it cannot be read, or has not both.
    """
    path = epath.Path(os.path.expanduser(path))
    try:
        with path.open("rb") as file:
            if path.suffix == ".npz":
                columns = dict(np.load(file))
            else:
                table = parquet.read_table(file)
                columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    except (OSError, ValueError, zipfile.BadZipFile, pyarrow.ArrowException) as error:
        raise UserError(
            f"embeddings={escape(path)} cannot be read ({reason_of(error)}): give a .parquet or .npz file"
        ) from None
    vectors = next((columns[name] for name in _VECTORS if name in columns), np.zeros(0))
    if "name" not in columns or vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise UserError(
            f"embeddings={escape(path)} has {first_few(columns)}: expected the columns name and features, a "
            "vector of numbers for each image"
        )
    names = columns["name"].astype(str).tolist()
    if "split" in columns and "index" in columns:
        places = zip(columns["split"], columns["index"])
        names = [name or f"{split}/{index}" for name, (split, index) in zip(names, places)]
    return names, vectors.astype(np.float32)


def _principal_components(table, count):
    """The first principal components of images from all parts of the file, [w, DIMENSIONS]."""
    from sklearn.decomposition import PCA

    step = max(1, count // _FITTED)
    rows = np.concatenate([rows[::step] for rows in _feature_rows(table)])
    pca = PCA(DIMENSIONS, svd_solver="randomized", random_state=0).fit(unit_rows(rows))
    return np.ascontiguousarray(pca.components_.T, np.float32)


def _feature_rows(table):
    for batch in table.iter_batches(_ROWS, columns=["features"]):
        yield parts.to_numpy(pyarrow.Table.from_batches([batch])["features"])
