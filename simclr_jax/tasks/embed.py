"""Features of a dataset or of a folder of images as files: `embeddings.npz` and `embeddings.parquet`."""

import time
import zipfile

import jax
import numpy as np
import pyarrow
from etils import epath
from pyarrow import parquet

from simclr_jax import files, parallel, pretrained, processes, report, workdirs


def run(config, workdir) -> dict:
    """Writes a row for every image: `split`, `index` there, file `name`, `label` (-1: none) and `features`.

    Images go through in parts of `examples_per_part`, each a file in `workdir`/parts until all are there:
    memory does not grow with the dataset, and a run that was stopped goes on behind its last part.

    Returns:
      The summary: `examples`, `dimensions` of the features, `seconds`.
    """
    from simclr_jax.data import datasets

    begun = time.monotonic()
    workdir = epath.Path(workdir)
    sources = {
        split: datasets.load(config.dataset, split, seed=config.seed, workdir=workdir)
        for split in config.splits.split("+")
    }
    for split, source in sources.items():
        processes.agree(f"{split} split", datasets.fingerprint(source))
    parts = [
        (split, start, min(start + config.examples_per_part, source.num_examples))
        for split, source in sources.items()
        for start in range(0, source.num_examples, config.examples_per_part)
    ]
    paths = [workdir / "parts" / f"{split}-{start:09d}.parquet" for split, start, _ in parts]
    finished = (workdir / "embeddings.npz").exists()
    done = len(parts) if finished else sum(path.exists() for path in paths)
    done = int(parallel.gather(np.array([done]))[0])  # what process 0 sees holds for all
    total = sum(source.num_examples for source in sources.values())
    report.print_table(
        {
            "task": "embed",
            "pretrained": config.pretrained,
            "dataset": ", ".join(source.name for source in sources.values()),
            "images": f"{total:,} in {len(parts)} parts, {done} of them done",
            "workdir": str(workdir),
        }
    )
    extract = pretrained.make_extract(config)
    if jax.process_index() == 0 and not finished:
        workdirs.save_config(workdir, config.to_dict())
        with files.storage(workdir):
            (workdir / "parts").mkdir(exist_ok=True)
    for path, (split, start, stop) in list(zip(paths, parts))[done:]:
        part = datasets.span(sources[split], start, stop)
        rows = extract(part)
        lost = parallel.gather(datasets.lost_rows(part)[None]).any(axis=0)  # to whichever process
        if jax.process_index() == 0:
            _write_part(path, split, start, part.names, rows, np.flatnonzero(~lost))
        report.say(f"{split}: {stop:,} of {sources[split].num_examples:,} images")
    summary = {"examples": total}
    if jax.process_index() == 0:
        if not finished:
            _join(paths, workdir)
        with (workdir / "embeddings.parquet").open("rb") as file:
            summary["dimensions"] = parquet.read_schema(file).field("features").type.list_size
            summary["examples"] = parquet.read_metadata(file).num_rows  # without files that could not be read
    return summary | {"seconds": round(time.monotonic() - begun, 1)}


def _write_part(path, split, start, names, rows, kept):
    count, width = rows.features.shape
    if names is None:
        names = [""] * count
    else:
        names = [name.encode("utf-8", "backslashreplace") for name in names[kept]]
    table = pyarrow.table(
        {
            "split": pyarrow.array([split] * count, pyarrow.string()),
            "index": pyarrow.array(start + kept),
            "name": pyarrow.array(names, pyarrow.string()),
            "label": pyarrow.array(rows.labels),
            "features": pyarrow.FixedSizeListArray.from_arrays(rows.features.ravel(), width),
        }
    )
    with files.writing(path) as file:
        parquet.write_table(table, file)


def _join(paths, workdir):
    """Streams the parts, in order, into one Parquet file and one .npz of the same columns; removes them."""
    schema, count = _read(paths[0]).schema, 0
    longest = dict.fromkeys((field.name for field in schema if field.type == pyarrow.string()), 1)
    with (
        files.writing(workdir / "embeddings.parquet") as file,
        parquet.ParquetWriter(file, schema) as writer,
    ):
        for path in paths:
            table = _read(path)
            writer.write_table(table)
            count += len(table)
            for column in longest:
                longest[column] = max(longest[column], *map(len, table[column].to_pylist()))
    with files.writing(workdir / "embeddings.npz") as file, zipfile.ZipFile(file, "w") as archive:
        for field in schema:
            with archive.open(f"{field.name}.npy", "w", force_zip64=True) as member:
                for number, path in enumerate(paths):
                    rows = _to_numpy(_read(path)[field.name], longest.get(field.name))
                    if number == 0:
                        shape, descr = (count, *rows.shape[1:]), np.lib.format.dtype_to_descr(rows.dtype)
                        header = {"descr": descr, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(np.ascontiguousarray(rows).data)
    (workdir / "parts").rmtree()


def _to_numpy(column, length):
    if length:
        return np.array(column.to_pylist(), f"<U{length}")
    array = column.combine_chunks()
    if pyarrow.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    return array.to_numpy()


def _read(path):
    with path.open("rb") as file:
        return parquet.read_table(file)
