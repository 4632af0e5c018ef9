"""Pictures of a run: `python -m simclr_jax.plots RUN` reads its files and writes `RUN/plots/*.png`."""

import argparse
import functools
from pathlib import Path

import jax
import numpy as np
from matplotlib import pyplot
from ml_collections import ConfigDict

from simclr_jax import errors, files, pretrained, report, workdirs
from simclr_jax.console import shown
from simclr_jax.errors import UserError
from simclr_jax.plots import figures
from simclr_jax.tasks import pretrain

HELD_OUT = 2000  # images at most that the map and the neighbours show
FEW = 40  # with fewer held-out images, training images are shown beside them

_LOSSES = {"pretrain": "NT-Xent", "distill": "cross entropy against the teacher"}


def figures_of(run: Path):
    """Yields (name, figure) of everything that a run's files tell."""
    config = ConfigDict(workdirs.complete(workdirs.read_config(run)))
    log = report.read(run / "metrics.jsonl")
    yield "curves", figures.learning_curves(log, _LOSSES.get(config.task, "cross entropy"))
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
    held_out = _held_out(config, run)
    yield "neighbours", figures.neighbours(*held_out)
    yield "map", figures.embedding_map(*held_out)


def _held_out(config, run):
    """Images, features, labels and class names of held-out images: of some if there are many, and of training
    images too if there are few."""
    from simclr_jax.data import datasets

    load = functools.partial(datasets.load, config.dataset, seed=config.seed, workdir=run)
    sources = [datasets.sample(load("eval"), HELD_OUT, seed=config.seed)]
    if sources[0].num_examples < FEW:
        beside = datasets.sample(load("train"), FEW - sources[0].num_examples, seed=config.seed)
        print(
            f"{sources[0].num_examples} images are held out: neighbours and map show {beside.num_examples} "
            "training images beside them",
            flush=True,
        )
        sources.append(beside)
    sources = [source for source in sources if source.num_examples]
    config.pretrained = str(run)
    config.batch_size = 32 * jax.device_count()
    extract = pretrained.make_extract(config)
    images, features, labels = (
        np.concatenate(parts) for parts in zip(*[(_images(config, of), *extract(of)) for of in sources])
    )
    if not all(source.num_classes for source in sources):
        labels = np.full_like(labels, -1)
    return images, features, labels, sources[0].class_names


def _images(config, source):
    from simclr_jax.data import pipeline

    batches = pipeline.eval_batches(source, image_size=config.image_size, batch_size=config.batch_size)
    return np.concatenate([batch["image"][batch["mask"]] for batch in batches])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="workdir of a run")
    run = parser.parse_args(argv).run
    if not (run / "metrics.jsonl").exists():
        raise UserError(
            f"{shown(run)} holds no metrics.jsonl: give the workdir of a run that has made some steps"
        )
    with files.storage(run):
        (run / "plots").mkdir(exist_ok=True)
    for name, figure in figures_of(run):
        path = run / "plots" / f"{name}.png"
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
        print(shown(path), flush=True)


if __name__ == "__main__":
    errors.run(main)
