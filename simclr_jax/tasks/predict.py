"""Predictions of a trained classifier for every image: `predictions.csv` and `predictions.parquet`."""

import collections
import csv
import io
import json
from functools import partial

import jax
import numpy as np
import pyarrow
from pyarrow import parquet

from simclr_jax import parallel, pretrained, supervised
from simclr_jax.evaluation import features, parts
from simclr_jax.process import UserError, escape, files, first_few
from simclr_jax.workdir import report

FILE = "predictions.parquet"
_MANY, _MOST = 20, 0.8  # Predictions, and the share of one class among them, from which on a note says so.
COLUMNS = ("name", "label", "probability")  # They come before a column for every class.


def run(config, workdir) -> dict:
    """Writes a row for every image: `name`, `label`, the likeliest class, its `probability`, and all others.

    The classifier is that of `config.pretrained`, as it was trained. Probabilities are calibrated where its
    run has measured a temperature. Images without file names are called `<split>/<index>`; a class with the
    name of another column gets ' (class)' behind it. A folder is not split, as in the task embed.

    Returns:
      The summary: `examples`, `calibration_temperature` or None. Where images have labels of these classes
      also their number, `labelled`, `top1` and the scores of `supervised.class_scores`, in the classifier's
      order.
    """
    model, variables, meta = pretrained.load_model(config.pretrained, use_average=config.use_average)
    if model.supervised_head is None:
        raise UserError(
            f"{escape(config.pretrained)} holds no classifier: give the workdir of a linear_eval, finetune, "
            "transfer or distill run"
        )
    plan = parts.make_plan(config, workdir, "predictions.csv")
    classes = _class_names(meta, plan.sources)
    temperature = meta["calibration_temperature"]
    table = {
        "task": "predict",
        "pretrained": config.pretrained,
        "classes": f"{len(classes)}: {first_few(classes)}",
        "probabilities": f"calibrated, temperature {temperature:.3g}" if temperature else "not calibrated",
        **parts.describe(plan),
        "workdir": str(workdir),
    }
    report.announce(table)
    numbers = {split: _class_numbers(classes, source) for split, source in plan.sources.items()}
    extract = _make_extract(config, model, variables, meta)
    join = partial(_join, plan, workdir, classes, numbers)
    parts.compute(plan, config, workdir, "probabilities", extract, join)
    summary = {"examples": plan.images, "calibration_temperature": temperature}
    if jax.process_index() == 0:
        with (workdir / FILE).open("rb") as file:
            metadata = parquet.read_metadata(file)
            labels = parquet.read_table(file, columns=["label"])["label"].to_pylist()
        _say_counts(plan.result, labels)
        summary["examples"] = metadata.num_rows  # Files that could not be read are missing.
        confusion = np.array(json.loads(metadata.metadata[b"confusion"]))
        if count := int(confusion.sum()):
            summary |= {"labelled": count, "top1": float(confusion.trace() / count)}
            summary |= supervised.class_scores(confusion, classes, workdir)
    return summary


def _say_counts(path, labels):
    """Prints how many images each class has, and a note where nearly all have the same."""
    counts = collections.Counter(labels).most_common()
    words = [f"{escape(name)} {count:,}" for name, count in counts[:20]]
    more = f" and {len(counts) - 20} more classes" if len(counts) > 20 else ""
    report.say(f"{escape(path)}: {', '.join(words)}{more}")
    name, count = counts[0] if counts else ("", 0)
    if len(labels) >= _MANY and count > _MOST * len(labels):
        report.say(
            f"note: {count:,} of {len(labels):,} images are {escape(name)!r}: unless they are indeed, label "
            "more images of the other classes"
        )


def _class_names(meta, sources):
    """The names of the classifier's classes, or those of a dataset with as many classes, or numbers."""
    count = meta["num_classes"]
    fitting = [source.class_names for source in sources.values() if len(source.class_names) == count]
    return tuple(meta.get("class_names") or next(iter(fitting), map(str, range(count))))


def _class_numbers(classes, source):
    """The classifier's number of each class of a dataset, -1 where it has none, int [classes + 1].

    The last one, -1, is for the label -1, of images without a label.
    """
    class_names = source.class_names or (classes if source.num_classes == len(classes) else ())
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in class_names if name not in numbers]
    if unknown:
        report.say(f"note: {source.name} has classes that the classifier does not know: {first_few(unknown)}")
    unnamed = max(0, source.num_classes - len(class_names))
    return np.array([numbers.get(name, -1) for name in class_names] + [-1] * (unnamed + 1))


def _make_extract(config, model, variables, meta):
    """Builds `extract(source) -> Features` with probabilities of the classes as features."""
    temperature, variables = meta["calibration_temperature"] or 1.0, parallel.replicate(variables)
    extract = features.make_extract(model, lambda outputs: jax.nn.softmax(outputs["logits"] / temperature))
    batches_of = partial(features.batches_of, config, proportion=meta.get("proportion"))
    return lambda source: extract(variables, batches_of(source))


def _join(plan, workdir, classes, numbers):
    """Streams the parts, in order, into the two files."""
    confusion = np.zeros((len(classes), len(classes)), int)
    for _, truth, probabilities in _read(plan, numbers):
        labelled = truth >= 0
        np.add.at(confusion, (truth[labelled], probabilities[labelled].argmax(axis=1)), 1)
    titles = list(COLUMNS)
    for name in classes:
        while name in titles:
            name += " (class)"
        titles.append(name)
    schema = pyarrow.schema(
        [(title, pyarrow.string() if title in COLUMNS[:2] else pyarrow.float32()) for title in titles],
        {"class_names": json.dumps(classes), "confusion": json.dumps(confusion.tolist())},
    )
    with (
        files.writing(plan.result) as csv_file,
        files.writing(workdir / FILE) as parquet_file,
        parquet.ParquetWriter(parquet_file, schema) as writer,
    ):
        text = io.TextIOWrapper(csv_file, "utf-8-sig", newline="", write_through=True)
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(titles)
        for names, _, probabilities in _read(plan, numbers):
            labels = [classes[best] for best in probabilities.argmax(axis=1)]
            columns = [names, labels, probabilities.max(axis=1), *probabilities.T]
            writer.write_table(pyarrow.table(list(map(pyarrow.array, columns)), schema=schema))
            for name, label, values in zip(names, labels, probabilities):
                shares = (f"{value:.6g}" for value in (values.max(), *values))
                rows.writerow([files.csv_name(name), label, *shares])
        text.detach()


def _read(plan, numbers):
    """Yields names, true classes, int [n], -1 where unknown, and probabilities [n, classes] of the parts."""
    for (split, _, _), table in zip(plan.spans, parts.read(plan)):
        yield (
            parts.names_in(table),
            numbers[split][table["label"].to_numpy()],
            parts.to_numpy(table["probabilities"]),
        )
