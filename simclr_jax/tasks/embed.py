"""Features of a dataset or of a folder of images as files: `embeddings.npz` and `embeddings.parquet`."""

import json
import time
import zipfile

import jax
import numpy as np
import pyarrow
from etils import epath
from pyarrow import parquet

from simclr_jax import pretrained
from simclr_jax.evaluation import parts
from simclr_jax.process import files
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Writes a row for every image: `split`, `index` there, file `name`, `label` (-1: none) and `features`.

    A folder is not split: its images are those of the split 'all', unless `splits` names others. Names
    of classes go along: as `class_names` of the .npz, and in the metadata of the .parquet as JSON.

    Returns:
      The summary: `examples`, `dimensions` of the features, `seconds`.
    """
    begun = time.monotonic()
    workdir = epath.Path(workdir)
    todo = parts.plan(config, workdir, "embeddings.npz")
    table = {
        "task": "embed",
        "pretrained": config.pretrained,
        **parts.describe(todo),
        "workdir": str(workdir),
    }
    report.print_table(table)
    extract = pretrained.make_extract(config)

    def rows_of(source):
        rows = extract(source)
        return {"label": rows.labels, "features": rows.features}

    parts.compute(todo, config, workdir, rows_of)
    summary = {"examples": todo.images}
    if jax.process_index() == 0:
        if not todo.result.exists():
            _join(todo, workdir)
        with (workdir / "embeddings.parquet").open("rb") as file:
            summary["dimensions"] = parquet.read_schema(file).field("features").type.list_size
            summary["examples"] = parquet.read_metadata(file).num_rows  # without files that could not be read
    return summary | {"seconds": round(time.monotonic() - begun, 1)}


def _join(todo, workdir):
    """Streams the parts, in order, into one Parquet file and one .npz of the same columns; removes them."""
    schema, count = parts.read_table(todo.paths[0]).schema, 0
    class_names = next((of.class_names for of in todo.sources.values() if of.class_names), ())
    schema = schema.with_metadata({"class_names": json.dumps(class_names)} if class_names else None)
    longest = dict.fromkeys((field.name for field in schema if field.type == pyarrow.string()), 1)
    with (
        files.writing(workdir / "embeddings.parquet") as file,
        parquet.ParquetWriter(file, schema) as writer,
    ):
        for table in parts.read(todo):
            writer.write_table(table.cast(schema))
            count += len(table)
            for column in longest:
                longest[column] = max(longest[column], *map(len, table[column].to_pylist()))
    with files.writing(workdir / "embeddings.npz") as file, zipfile.ZipFile(file, "w") as archive:
        for field in schema:
            with archive.open(f"{field.name}.npy", "w", force_zip64=True) as member:
                for number, table in enumerate(parts.read(todo)):
                    rows = _to_numpy(table[field.name], longest.get(field.name))
                    if number == 0:
                        shape, descr = (count, *rows.shape[1:]), np.lib.format.dtype_to_descr(rows.dtype)
                        header = {"descr": descr, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(np.ascontiguousarray(rows).data)
        if class_names:
            with archive.open("class_names.npy", "w") as member:
                np.lib.format.write_array(member, np.array(class_names))
    (workdir / "parts").rmtree()


def _to_numpy(column, length):
    return np.array(column.to_pylist(), f"<U{length}") if length else parts.to_numpy(column)
