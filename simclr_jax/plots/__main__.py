"""Pictures of a run: `python -m simclr_jax.plots RUN` reads its files and writes `RUN/plots/*.png`.

Curves, views and scores are those that the run has logged; neighbours and the map are of all of its images,
of 20,000 random ones where there are more, by the run's own network. `RUN/plots/index.html` is a page to look
at them, to label some, and to see what the newest run of predict in a folder of RUN says of others.
"""

import argparse
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from simclr_jax.config.saved import complete
from simclr_jax.plots import figures, gallery, page
from simclr_jax.process import errors, files
from simclr_jax.process.console import escape
from simclr_jax.process.errors import UserError
from simclr_jax.views import batches
from simclr_jax.workdir import records, report


def _name_of_loss(config) -> str:
    if config.task == "pretrain":
        return "NT-Xent" if config.loss == "nt_xent" else config.loss
    return "cross entropy against the teacher" if config.task == "distill" else "cross entropy"


def figures_of_log(run: Path):
    """Yields (name, figure) of everything that was logged and summarised."""
    config = ConfigDict(complete(records.read_config(run)))
    log = report.read(run / "metrics.jsonl")
    yield "curves", figures.learning_curves(log, _name_of_loss(config))
    if config.task == "pretrain":
        if config.dataset.name != "arrays":
            yield "views", figures.views(batches.example_views(config, run, count=10))
        if measured := [line for line in log if "features_effective_rank" in line]:
            yield "health", figures.health(measured)
    found = [*run.glob("summary.json"), *sorted(run.glob("*/summary.json"))]
    summaries = {path.parent: summary for path in found if (summary := records.read_summary(path.parent))}
    if len(summaries.get(run, {}).get("trained", {})) > 1:
        yield "scores", figures.scores(summaries[run], config.labels_per_class)
    drawn = [summary for summary in summaries.values() if "labels_per_class" in summary]
    if len({summary["labels_per_class"] for summary in drawn}) > 1:  # of one number there is no curve
        yield "few_labels", figures.few_labels(drawn)


def figures_of_images(seen: gallery.Gallery):
    """Yields (name, figure) of what the run's own network makes of all images."""
    found, labels = seen.found, seen.labels
    chosen = np.concatenate([seen.queries[:, None], seen.nearest[seen.queries]], axis=1)
    rows = seen.rows[chosen].tolist()
    pictures = [[seen.large.get(row) for row in line] for line in rows]
    names = [[found.names[row] for row in line] for line in rows]
    similar = seen.similar[seen.queries]
    yield "neighbours", figures.neighbours(pictures, names, labels[chosen], similar, found.class_names)
    title = f"{len(seen.rows):,} images"
    if len(seen.rows) < len(found.names):
        title += f", random ones of {len(found.names):,}"
    yield "map", figures.embedding_map(seen.squares, seen.places, labels, found.class_names, title)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="workdir of a run")
    run = parser.parse_args(argv).run
    logged = (run / "metrics.jsonl").exists()
    if not logged and not any(
        (run / name).exists() for name in ("embeddings.parquet", "predictions.parquet")
    ):
        raise UserError(
            f"{escape(run)} holds no metrics.jsonl: give the workdir of a run that has made some steps"
        )
    with files.storage(run):
        (run / "plots").mkdir(exist_ok=True)
    drawn = {}

    def save(found):
        for name, figure in found:
            path = run / "plots" / f"{name}.png"
            figure.savefig(path, dpi=150)
            drawn[name] = figure
            print(escape(path), flush=True)

    save(figures_of_log(run) if logged else ())
    if records.read_config(run)["dataset"]["name"] == "arrays":
        print("the images were in memory: without views, neighbours, a map and the page", flush=True)
        return
    images = gallery.read(run)
    save(figures_of_images(images))
    print(escape(page.write(run, images, drawn.get("views"))), flush=True)


if __name__ == "__main__":
    errors.run(main)
