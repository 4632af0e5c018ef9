"""Features of a dataset or of a folder of images as files: `embeddings.npz` and `embeddings.parquet`."""

import json
import zipfile
from functools import partial

import jax
import numpy as np
import pyarrow
from pyarrow import parquet

from simclr_jax.evaluation import features, parts, stored
from simclr_jax.process import files
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Writes a row for every image: `split`, `index` there, file `name`, `label` (-1: none) and `features`.

    A folder is not split: its images are those of the split 'all', unless `splits` names others. The names
    of classes are `class_names` of the .npz, and JSON in the metadata of the .parquet.

    Returns:
      The summary: `examples`, `dimensions` of the features.
    """
    plan = parts.make_plan(config, workdir, "embeddings.npz")
    table = {"task": "embed", "pretrained": config.pretrained, **parts.describe(plan)}
    report.print_table(table | {"workdir": str(workdir)})
    join = partial(_join, plan, workdir)
    parts.compute(plan, config, workdir, "features", features.make_pretrained_extract, join)
    if jax.process_index() > 0:
        return {"examples": plan.images}
    with (workdir / stored.FILE).open("rb") as file:
        table = parquet.ParquetFile(file)
        # Files that could not be read have no row.
        examples, schema = table.metadata.num_rows, table.schema_arrow
    return {"examples": examples, "dimensions": schema.field("features").type.list_size}


def _join(plan, workdir):
    """Streams the parts, in order, into one Parquet file and one .npz of the same columns."""
    schema, count = next(parts.read(plan)).schema, 0
    class_names = next((source.class_names for source in plan.sources.values() if source.class_names), ())
    schema = schema.with_metadata({"class_names": json.dumps(class_names)} if class_names else None)
    longest = dict.fromkeys((field.name for field in schema if field.type == pyarrow.string()), 1)
    with files.writing(workdir / stored.FILE) as file, parquet.ParquetWriter(file, schema) as writer:
        for table in parts.read(plan):
            writer.write_table(table.cast(schema))
            count += len(table)
            for column in longest:
                longest[column] = max(longest[column], *map(len, table[column].to_pylist()))
    with files.writing(plan.result) as file, zipfile.ZipFile(file, "w") as archive:
        for field in schema:
            with archive.open(f"{field.name}.npy", "w", force_zip64=True) as member:
                for number, table in enumerate(parts.read(plan)):
                    rows = parts.to_numpy(table[field.name])
                    if field.name in longest:
                        rows = rows.astype(f"<U{longest[field.name]}")
                    if number == 0:
                        shape, descr = (count, *rows.shape[1:]), np.lib.format.dtype_to_descr(rows.dtype)
                        header = {"descr": descr, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(np.ascontiguousarray(rows).data)
        if class_names:
            with archive.open("class_names.npy", "w") as member:
                np.lib.format.write_array(member, np.array(class_names))
