"""Pictures of a run: `python -m simclr_jax.plots RUN` reads its files and writes `RUN/plots/*.png`.

And `RUN/plots/index.html`, a page to look at all of its images, to label some, and to see what is predicted
of others, by the newest run of predict in a folder of RUN.
"""

import argparse
from pathlib import Path

from ml_collections import ConfigDict

from simclr_jax import errors, files, report, workdirs
from simclr_jax.console import shown
from simclr_jax.errors import UserError
from simclr_jax.plots import board, figures, page
from simclr_jax.tasks import pretrain


def _name_of_loss(config) -> str:
    if config.task == "pretrain":
        return "NT-Xent" if config.loss == "nt_xent" else config.loss
    return "cross entropy against the teacher" if config.task == "distill" else "cross entropy"


def figures_of(run: Path):
    """Yields (name, figure) of everything that a run's files tell."""
    config = ConfigDict(workdirs.complete(workdirs.read_config(run)))
    log = report.read(run / "metrics.jsonl")
    yield "curves", figures.learning_curves(log, _name_of_loss(config))
    there = config.dataset.name != "arrays"
    if not there:
        print("the images were in memory: without views, neighbours and a map of them", flush=True)
    if config.task == "pretrain":
        if there:
            yield "views", figures.views(pretrain.example_views(config, run, count=10))
        if measured := [line for line in log if "features_effective_rank" in line]:
            yield "health", figures.health(measured)
    found = [*run.glob("summary.json"), *sorted(run.glob("*/summary.json"))]
    summaries = {path.parent: summary for path in found if (summary := workdirs.read_summary(path.parent))}
    if len(summaries.get(run, {}).get("trained", {})) > 1:
        yield "scores", figures.scores(summaries[run])
    if drawn := [summary for summary in summaries.values() if "labels_per_class" in summary]:
        yield "few_labels", figures.few_labels(drawn)
    if not there:
        return
    held_out = board.held_out(config, run)
    yield "neighbours", figures.neighbours(*held_out)
    yield "map", figures.embedding_map(*held_out)


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
            f"{shown(run)} holds no metrics.jsonl: give the workdir of a run that has made some steps"
        )
    with files.storage(run):
        (run / "plots").mkdir(exist_ok=True)
    drawn = {}
    for name, figure in figures_of(run) if logged else ():
        path = run / "plots" / f"{name}.png"
        figure.savefig(path, dpi=150)
        drawn[name] = figure
        print(shown(path), flush=True)
    if workdirs.read_config(run)["dataset"]["name"] != "arrays":
        print(shown(page.write(run, drawn.get("views"))), flush=True)


if __name__ == "__main__":
    errors.run(main)
