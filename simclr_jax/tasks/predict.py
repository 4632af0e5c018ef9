"""What a trained classifier says of every image: `predictions.csv` and `predictions.parquet`."""

import csv
import io
import json
import time

import jax
import numpy as np
import pyarrow
from etils import epath
from pyarrow import parquet

from simclr_jax import parallel, pretrained
from simclr_jax.evaluation import features, parts
from simclr_jax.process import files
from simclr_jax.process.console import escape
from simclr_jax.process.errors import UserError, first_few
from simclr_jax.workdir import report

COLUMNS = ("name", "label", "probability")  # before a column a class


def run(config, workdir) -> dict:
    """Writes a row for every image: `name`, `label`, its likeliest class, `probability`, and every class's.

    The classifier is that of `config.pretrained`, as it was trained. Probabilities are calibrated where its
    run has measured a temperature. Images without file names are called `<split>/<index>`; a class that is
    called as another column has ' (class)' behind its name. A folder is not split, as of embed.

    Returns:
      The summary: `examples`, `calibration_temperature` or None, `seconds`; and where some images have labels
      of these classes `labelled`, how many, `top1`, `per_class`, the accuracy of each class, and `confusion`:
      counts by true class (rows) and predicted one (columns), in the classifier's order. They are drawn in
      confusion.png.
    """
    begun = time.monotonic()
    workdir = epath.Path(workdir)
    model, variables, meta = pretrained.load_model(config.pretrained)
    if model.supervised_head is None:
        raise UserError(
            f"{escape(config.pretrained)} holds no classifier: give the workdir of a linear_eval, finetune, "
            "transfer or distill run"
        )
    todo = parts.plan(config, workdir, "predictions.csv")
    classes = _class_names(meta, todo.sources)
    temperature = meta["calibration_temperature"]
    table = {
        "task": "predict",
        "pretrained": config.pretrained,
        "classes": f"{len(classes)}: {first_few(classes)}",
        "probabilities": f"calibrated, temperature {temperature:.3g}" if temperature else "not calibrated",
        **parts.describe(todo),
        "workdir": str(workdir),
    }
    report.print_table(table)
    numbers = {split: _numbers(classes, source) for split, source in todo.sources.items()}
    parts.compute(todo, config, workdir, _make_rows_of(config, model, variables, temperature, meta))
    summary = {"examples": todo.images, "calibration_temperature": temperature}
    if jax.process_index() == 0:
        if not todo.result.exists():
            _join(todo, workdir, classes, numbers)
        with (workdir / "predictions.parquet").open("rb") as file:
            read = parquet.read_metadata(file)
        summary["examples"] = read.num_rows  # without files that could not be read
        confusion = np.array(json.loads(read.metadata[b"confusion"]))
        if confusion.any():
            summary |= _scores(confusion, classes)
            _draw(confusion, classes, workdir)
    return summary | {"seconds": round(time.monotonic() - begun, 1)}


def _class_names(meta, sources):
    """Of the classifier; where it does not know them, those of a dataset with as many classes, or numbers."""
    count, names = meta["num_classes"], meta.get("class_names")
    fitting = [source.class_names for source in sources.values() if len(source.class_names) == count]
    return tuple(names or next(iter(fitting), map(str, range(count))))


def _numbers(classes, source):
    """The classifier's number of each class of a dataset, -1 where it has none, int [classes + 1].

    The last, -1, is that of no label.
    """
    theirs = source.class_names or (classes if source.num_classes == len(classes) else ())
    known = {name: number for number, name in enumerate(classes)}
    strange = [name for name in theirs if name not in known]
    if strange:
        report.say(f"note: {source.name} has classes that the classifier does not know: {first_few(strange)}")
    unnamed = max(0, source.num_classes - len(theirs))
    return np.array([known.get(name, -1) for name in theirs] + [-1] * (unnamed + 1))


def _make_rows_of(config, model, variables, temperature, meta):
    from simclr_jax.data import augment

    def probabilities(variables, batch):
        logits = model.apply(variables, batch["image"])["logits"]
        return {"probabilities": jax.nn.softmax(logits / (temperature or 1.0))}

    def view(image, _):
        return {"image": augment.eval_view(image, config.image_size, proportion=meta.get("proportion"))}

    mapped, variables = features.make_map(probabilities), parallel.replicate(variables)

    def rows_of(source):
        return mapped(variables, features.batches_of(config, source, transform=view))

    return rows_of


def _join(todo, workdir, classes, numbers):
    """Makes the files of the parts, in order, and removes these."""
    confusion = np.zeros((len(classes), len(classes)), int)
    for _, truth, probabilities in _read(todo, numbers):
        known = truth >= 0
        np.add.at(confusion, (truth[known], probabilities[known].argmax(axis=1)), 1)
    titles = [*COLUMNS, *(f"{name} (class)" if name in COLUMNS else name for name in classes)]
    schema = pyarrow.schema(
        [(title, pyarrow.string() if title in COLUMNS[:2] else pyarrow.float32()) for title in titles],
        {"class_names": json.dumps(classes), "confusion": json.dumps(confusion.tolist())},
    )
    with (
        files.writing(workdir / "predictions.parquet") as file,
        parquet.ParquetWriter(file, schema) as writer,
    ):
        for names, _, probabilities in _read(todo, numbers):
            columns = [names, _said(classes, probabilities), probabilities.max(axis=1), *probabilities.T]
            writer.write_table(pyarrow.table(list(map(pyarrow.array, columns)), schema=schema))
    with files.writing(workdir / "predictions.csv") as file:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(titles)
        for names, _, probabilities in _read(todo, numbers):
            best = probabilities.max(axis=1)
            for name, label, most, each in zip(names, _said(classes, probabilities), best, probabilities):
                rows.writerow([name, label, f"{most:.6g}", *(f"{value:.6g}" for value in each)])
        text.detach()
    (workdir / "parts").rmtree()


def _read(todo, numbers):
    """Yields names, true classes, int [n], -1 where unknown, and probabilities [n, classes] of the parts."""
    for (split, _, _), table in zip(todo.each, parts.read(todo)):
        yield (
            parts.names_in(table),
            numbers[split][table["label"].to_numpy()],
            parts.to_numpy(table["probabilities"]),
        )


def _said(classes, probabilities):
    return [classes[best] for best in probabilities.argmax(axis=1)]


def _scores(confusion, classes):
    """What a confusion matrix, int [classes, classes], tells, for the summary."""
    counts, right = confusion.sum(axis=1), confusion.diagonal()
    per_class = {name: float(right[i] / counts[i]) for i, name in enumerate(classes) if counts[i]}
    top1 = float(right.sum() / counts.sum())
    scores = {"labelled": int(counts.sum()), "top1": top1, "per_class": per_class}
    return scores | {"confusion": confusion.tolist()}


def _draw(confusion, classes, workdir):
    from simclr_jax.plots import figures  # matplotlib takes a second

    with files.writing(workdir / "confusion.png") as file:
        figures.confusion(confusion, classes).savefig(file, format="png", dpi=150)
