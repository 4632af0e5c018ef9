"""Predictions of a trained classifier for every image: `predictions.csv` and `predictions.parquet`."""

import collections
import csv
import io
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
from pyarrow import parquet

from simclr_jax import checkpoint, parallel, pretrained, supervised
from simclr_jax.evaluation import doubt, features, parts
from simclr_jax.process import UserError, escape, files, first_few
from simclr_jax.workdir import report

FILE = "predictions.parquet"
_SAME = 0.05  # How far above chance the largest probability is at most where a note says they are alike.
_MANY, _MOST = 20, 0.8  # Predictions, and the share of one class among them, from which on a note says so.
COLUMNS = ("name", "label", "probability")  # They come before a column for every class.
MORE_COLUMNS = ("margin", "entropy", "unlike", "truth")  # They come behind.


def run(config, workdir) -> dict:
    """Writes a row for every image: `name`, `label`, the likeliest class, its `probability`, and all others.

    The classifier is that of `config.pretrained`, as it was trained. Probabilities are calibrated where its
    run has measured a temperature. A label whose probability is below `config.at_least` is left empty.
    Several labels an image are joined as in `a;b`. Columns behind the classes tell the `margin` to the second
    class, the `entropy` in nats, how `unlike` the labelled images one is, see `evaluation.doubt`, and the
    `truth`, where they are known. Images without file names are called `<split>/<index>`; a class with the
    name of another column gets ' (class)' behind it. A folder is not split, as in the task embed.

    Returns:
      The summary: `examples`, `calibration_temperature` or None, `without_label` with `at_least`. Where
      images have labels of these classes also their number, `labelled`, `top1` and the scores of
      `supervised.class_scores`, in the classifier's order.
    """
    model, _, meta, labelled = network = _load(config)
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
    if not labelled:
        report.say(f"note: without the column unlike: {escape(config.pretrained)} keeps no {doubt.FILE}")
    truths = {split: _true_classes(classes, source) for split, source in plan.sources.items()}
    make_extract = _make_extract if config.beam else partial(_make_extract, network=network)
    several = bool(meta.get("several_labels"))
    join = partial(_join, plan, workdir, classes, truths, labelled, config.at_least, several)
    parts.compute(plan, config, workdir, "probabilities", make_extract, join)
    summary = {"examples": plan.images, "calibration_temperature": temperature}
    if jax.process_index() == 0:
        with (workdir / FILE).open("rb") as file:
            metadata = parquet.read_metadata(file)
            table = parquet.read_table(file, columns=["label", "probability"])
            labels, largest = table["label"].to_pylist(), table["probability"].to_numpy().max(initial=0)
        _say_counts(plan.result, list(filter(None, labels)))
        if not several and len(labels) >= _MANY and largest < 1 / len(classes) + _SAME:
            report.say(
                f"note: no probability is above {largest:.2f}, where chance is {1 / len(classes):.2f}: the "
                "classifier has learnt next to nothing; label more images, or train it for longer"
            )
        if config.at_least:
            summary["without_label"] = labels.count("")
            report.say(
                f"{labels.count(''):,} of {len(labels):,} labels are empty: their probability"
                f"{'' if temperature else ', which is not calibrated,'} is below at_least={config.at_least:g}"
            )
        summary["examples"] = metadata.num_rows  # Files that could not be read are missing.
        confusion = np.array(json.loads(metadata.metadata[b"confusion"]))
        if count := int(confusion.sum()):
            summary |= {"labelled": count, "top1": float(confusion.trace() / count)}
            summary |= supervised.class_scores(confusion, classes, workdir)
            if config.dataset.labels and config.dataset.labels == meta["config"]["dataset"]["labels"]:
                report.say("note: the classifier has learnt from these labels: its scores here are too high")
        summary |= json.loads(metadata.metadata.get(b"scores", b"{}"))
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


def _true_classes(classes, source):
    """The names of a dataset's classes, and their numbers in the classifier, -1 where it has none.

    Behind them stand '' and -1, for the label -1, of images without a label.
    """
    class_names = source.class_names or (classes if source.num_classes == len(classes) else ())
    numbers = {name: number for number, name in enumerate(classes)}
    parts_of_names = source.label_sets[0] if source.label_sets else class_names
    unknown = [name for name in parts_of_names if name not in numbers]
    if unknown:
        report.say(f"note: {source.name} has classes that the classifier does not know: {first_few(unknown)}")
    names = [*class_names, *[""] * (1 + max(0, source.num_classes - len(class_names)))]
    return np.array(names, object), np.array([numbers.get(name, -1) for name in names])


def _load(config):
    """Returns the model, its variables and meta, and the labelled images that it has learnt from."""
    loaded = pretrained.load_model(config.pretrained, use_average=config.use_average)
    return *loaded, doubt.load(checkpoint.split(config.pretrained)[0])


def _make_extract(config, network=None):
    """Builds `extract(source) -> Features` with probabilities of the classes as features.

    Behind them stands the similarity to the nearest of the `labelled` images, if there are any.
    """
    model, variables, meta, labelled = network or _load(config)
    variables = parallel.replicate(variables)

    def predictions(outputs):
        probabilities = pretrained.probabilities(meta, outputs["logits"])
        if not labelled:
            return probabilities
        rows = outputs["projection_hiddens"][model.supervised_layer]
        rows /= jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        similarities = jnp.matmul(rows, labelled.features.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([probabilities, similarities.max(axis=1, keepdims=True)], axis=1)

    extract = features.make_extract(model, predictions)
    batches_of = partial(features.batches_of, config, proportion=meta.get("proportion"))
    return lambda source: extract(variables, batches_of(source))


def _join(plan, workdir, classes, truths, labelled, at_least, several):
    """Streams the parts, in order, into the two files."""
    confusion, any_truth, known_rows = np.zeros((len(classes), len(classes)), int), False, []
    for _, truth, numbers, probabilities, _ in _read(plan, truths, len(classes)):
        any_truth, known = any_truth or any(truth), (truth != "") if several else (numbers >= 0)
        if several:
            known_rows += zip(truth[known], probabilities[known])
        else:
            np.add.at(confusion, (numbers[known], probabilities[known].argmax(axis=1)), 1)
    titles = [*COLUMNS, *MORE_COLUMNS]
    for name in classes:
        while name in titles:
            name += " (class)"
        titles.append(name)
    class_titles = titles[len(COLUMNS) + len(MORE_COLUMNS) :]
    unwritten = [title for title, is_there in (("unlike", labelled), ("truth", any_truth)) if not is_there]
    titles = [title for title in (*COLUMNS, *class_titles, *MORE_COLUMNS) if title not in unwritten]
    texts = ("name", "label", "truth")
    schema = pyarrow.schema(
        [(title, pyarrow.string() if title in texts else pyarrow.float32()) for title in titles],
        {
            "class_names": json.dumps(classes),
            "columns": json.dumps(class_titles),
            "several_labels": json.dumps(several),
            "confusion": json.dumps(confusion.tolist()),
            "scores": json.dumps(_average_precisions(classes, *zip(*known_rows)) if known_rows else {}),
        },
    )
    with (
        files.writing(plan.result) as csv_file,
        files.writing(workdir / FILE) as parquet_file,
        parquet.ParquetWriter(parquet_file, schema) as writer,
    ):
        text = io.TextIOWrapper(csv_file, "utf-8-sig", newline="", write_through=True)
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(titles)
        for names, truth, _, probabilities, similarities in _read(plan, truths, len(classes)):
            labels, sure = doubt.likeliest(classes, probabilities, several)
            columns = dict(zip(class_titles, probabilities.T)) | {
                "name": names,
                "label": [label if value >= at_least else "" for label, value in zip(labels, sure)],
                "probability": sure,
                "margin": doubt.margins(probabilities, several),
                "entropy": doubt.entropies(probabilities, several),
                "truth": truth,
            }
            if labelled:
                columns["unlike"] = doubt.unlike(labelled, similarities)
            table = pyarrow.table({title: columns[title] for title in titles}, schema=schema)
            writer.write_table(table)
            for row in zip(*(column.to_pylist() for column in table.columns)):
                numbers = (value if isinstance(value, str) else f"{value:.6g}" for value in row[1:])
                rows.writerow([files.csv_name(row[0]), *numbers])
        text.detach()


def _average_precisions(classes, truth, probabilities):
    """The scores of the summary from true labels such as `a;b`, [n], and probabilities [n, classes]."""
    targets = np.array([[name in label.split(";") for name in classes] for label in truth])
    scores = supervised.class_precisions(np.array(probabilities), targets, classes)
    return {"labelled": len(truth), **(scores if scores["per_class"] else {"per_class": {}})}


def _read(plan, truths, count):
    """Yields the rows of the parts.

    Returns:
      Names; true classes, [n], '' where unknown, and their numbers, int [n], -1 where the classifier has
      none; probabilities [n, count]; similarities to the nearest labelled image [n], empty where unknown.
    """
    for (split, _, _), table in zip(plan.spans, parts.read(plan)):
        rows, labels = parts.to_numpy(table["probabilities"]), table["label"].to_numpy()
        class_names, numbers = truths[split]
        names = parts.names_in(table)
        yield names, class_names[labels], numbers[labels], rows[:, :count], rows[:, count:].ravel()
