"""Pictures of a run: `python -m simclr_jax.plots RUN` reads its files and writes `RUN/plots/*.png`.

Curves, views and scores are those that the run has logged; neighbours and the map are of all of its images,
of 20,000 random ones where there are more, by the run's own network. `RUN/plots/index.html` is a page to look
at them, to label some, and to see what the newest run of predict in a folder of RUN predicts for others.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from simclr_jax import runs
from simclr_jax.config.saved import complete
from simclr_jax.evaluation import stored
from simclr_jax.evaluation.stored import StoredFeatures
from simclr_jax.plots import figures, gallery, page, serve
from simclr_jax.process import UserError, errors, escape, files
from simclr_jax.tasks import predict
from simclr_jax.views import batches
from simclr_jax.workdir import records, report


def _name_of_loss(config) -> str:
    if config.task == "pretrain":
        return "NT-Xent" if config.loss == "nt_xent" else config.loss
    return "cross entropy against the teacher" if config.task == "distill" else "cross entropy"


def figures_of_log(run: Path, path=None):
    """Yields (name, figure) of curves, views and scores that the run has logged, its images now in `path`."""
    config = ConfigDict(complete(records.read_config(run)))
    log = report.read(run / "metrics.jsonl")
    yield "curves", figures.learning_curves(log, _name_of_loss(config))
    if config.task == "pretrain":
        if config.dataset.name != "arrays":
            records.find_images(config, path)
            yield "views", figures.views(batches.example_views(config, run, count=10))
        if health := [line for line in log if "features_effective_rank" in line]:
            yield "health", figures.health(health)
    paths = [*run.glob("summary.json"), *sorted(run.glob("*/summary.json"))]
    summaries = {path.parent: summary for path in paths if (summary := records.read_summary(path.parent))}
    if len(summaries.get(run, {}).get("trained", {})) > 1:
        yield "scores", figures.scores(summaries[run], config.labels_per_class)
    few_labels = [summary for summary in summaries.values() if "labels_per_class" in summary]
    if len({summary["labels_per_class"] for summary in few_labels}) > 1:  # One number makes no curve.
        yield "few_labels", figures.few_labels(few_labels)


def figures_of_images(images: gallery.Gallery):
    """Yields (name, figure) of all images by the features of the run's own network."""
    class_names, names, count = images.stored.class_names, images.names, len(images.stored.names)
    chosen = np.concatenate([images.queries[:, None], images.nearest[images.queries]], axis=1)
    pictures = [[images.large.get(row) for row in line] for line in images.rows[chosen].tolist()]
    chosen_names = [[names[position] for position in line] for line in chosen]
    similarities = images.similarities[images.queries]
    labels = images.labels[chosen]
    yield "neighbours", figures.neighbours(pictures, chosen_names, labels, similarities, class_names)
    title = f"{len(names):,} images" + (f", random ones of {count:,}" if len(names) < count else "")
    yield "map", figures.embedding_map(images.thumbnails, images.places, images.labels, class_names, title)


def _add_labels(
    features: StoredFeatures, path: str | None, several: bool
) -> tuple[StoredFeatures, dict[str, str]]:
    """Gives images the labels of a CSV file, if any, in the place of others; returns {name: label}, too."""
    if path is None:
        return features, {}
    from simclr_jax.data import labels as label_files

    given = label_files.read(path, features.names, features.dataset, classes=0, several=several)
    print(f"{len(given)} labels of {escape(path)}", flush=True)
    classes = sorted(set(given.values()))
    labels = np.array([classes.index(given[name]) if name in given else -1 for name in features.names])
    return features._replace(labels=labels, class_names=tuple(classes)), given


def main(argv: list[str]) -> None:
    parser = errors.command_parser(__doc__)
    parser.add_argument("run", type=Path, help="workdir of a run")
    parser.add_argument("--path", help="the folder of its images, where they have moved")
    parser.add_argument("--labels", help="CSV file of labels; else that of the newest classifier in RUN")
    parser.add_argument(
        "--serve", action="store_true", help="shows the page on 127.0.0.1, and saves labels into --labels"
    )
    parser.add_argument("--several_labels", action="store_true", help="an image may have several, as a;b")
    args = parser.parse_args(argv)
    run = args.run
    logged = (run / "metrics.jsonl").exists()
    if not logged and not any((run / name).exists() for name in (stored.FILE, predict.FILE)):
        raise UserError(f"{escape(run)} holds no metrics.jsonl: give the workdir of a run with steps")
    with files.storage(run):
        (run / "plots").mkdir(exist_ok=True)
    drawn = {}

    def save(named_figures):
        for name, figure in named_figures:
            path = run / "plots" / f"{name}.png"
            figure.savefig(path, dpi=150)
            drawn[name] = figure
            print(escape(path), flush=True)

    save(figures_of_log(run, args.path) if logged else ())
    if records.read_config(run)["dataset"]["name"] == "arrays":
        print("the images were in memory: without views, neighbours, a map and the page", flush=True)
        return
    features = runs.load_features(run, args.path)
    records.find_images(features.config)
    predictions, newest = page.read_predictions(run), records.newest_labels(run)
    datasets = (newest, records.read_config(run)["dataset"])
    several = args.several_labels or any(dataset.get("several_labels") for dataset in datasets)
    several = several or (predictions is not None and predictions.several)
    labels = args.labels or newest.get("labels")
    labels = labels or (f"{run}/labels.csv" if args.serve else None)
    is_new = args.serve and not files.exists(labels)
    features, given = _add_labels(features, None if is_new else labels, several)
    print(f"{escape(run)}: a map of {min(len(features.names), gallery.MAX_IMAGES):,} images", flush=True)
    images = gallery.make(features)
    save(figures_of_images(images))
    print(escape(page.write(run, images, predictions, drawn.get("views"), given, several)), flush=True)
    if args.serve:
        serve.serve(run, labels, features.names, features.dataset, several)


if __name__ == "__main__":
    errors.run(main)
