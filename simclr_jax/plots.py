"""Pictures of a run: `python -m simclr_jax.plots RUN` reads its files and writes `RUN/plots/*.png`."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from ml_collections import ConfigDict

from simclr_jax.errors import UserError
from simclr_jax.tasks import pretrain

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"


def learning_curves(log: list[dict[str, float]]) -> Figure:
    """Loss, and whatever accuracies the run measured, against the step.

    Args:
      log: the lines of `metrics.jsonl`.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([line["step"] for line in log], [line["loss"] for line in log], color=BLUE)
    left.set(xlabel="step", ylabel="NT-Xent", title="Loss")
    curves = {
        "contrastive_accuracy": ("positive found in the batch", GREY),
        "probe_accuracy": ("online linear probe (training views)", ORANGE),
        "knn_accuracy": ("nearest neighbours (held out)", GREEN),
    }
    for name, (label, color) in curves.items():
        points = [(line["step"], line[name]) for line in log if name in line]
        if points:
            right.plot(
                *zip(*points), color=color, label=label, marker="o" if name == "knn_accuracy" else None
            )
    right.set(xlabel="step", ylabel="accuracy", title="Accuracy", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    return figure


def scores(summary: dict) -> Figure:
    """Accuracy on held-out images of the trained encoder, the untrained one and raw pixels, as bars."""
    probes = {
        "few_label_accuracy": "linear, few labels",
        "knn_accuracy": "nearest neighbours",
        "linear_accuracy": "linear, all labels",
    }
    rows = {"untrained": ("untrained encoder", GREY), "raw_pixels": ("raw pixels", ORANGE)}
    rows["trained"] = ("SimCLR", BLUE)
    figure, axes = pyplot.subplots(figsize=(6.5, 3.2), layout="constrained")
    for offset, (row, (label, color)) in enumerate(rows.items()):
        present = [name for name in probes if name in summary.get(row, {})]
        positions = [list(probes).index(name) + (offset - 1) * 0.27 for name in present]
        bars = axes.bar(positions, [summary[row][name] for name in present], 0.25, color=color, label=label)
        axes.bar_label(bars, fmt=lambda value: f"{100 * value:.1f}", fontsize=8)
    axes.set_xticks(range(len(probes)), probes.values())
    axes.set(ylabel="accuracy", ylim=(0, 1.09), title="Held-out images")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def views(batch: dict[str, np.ndarray]) -> Figure:
    """Rows of originals, first views and second views.

    Args:
      batch: `image`, `view1` and `view2`, uint8 [n, h, w, 3].
    """
    names = {"image": "image", "view1": "view 1", "view2": "view 2"}
    columns = len(batch["image"])
    figure, axes = pyplot.subplots(3, columns, figsize=(columns, 3.2), layout="constrained", squeeze=False)
    for row, (key, name) in zip(axes, names.items()):
        for cell, picture in zip(row, batch[key]):
            cell.imshow(picture)
            cell.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="workdir of a run")
    run = parser.parse_args(argv).run
    if not (run / "metrics.jsonl").exists():
        raise UserError(f"{run} holds no metrics.jsonl: give the workdir of a run that has made some steps")
    config = ConfigDict(json.loads((run / "config.json").read_text()))
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = {"curves": learning_curves(log), "views": views(pretrain.example_views(config, run, count=10))}
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        if len(summary.get("trained", {})) > 1:
            figures["scores"] = scores(summary)
    (run / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        path = run / "plots" / f"{name}.png"
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
        print(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
