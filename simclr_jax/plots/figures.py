"""The pictures of a run: each function takes what it shows and returns a matplotlib figure."""

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; Petroff's ten for classes.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
CLASSES = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581"]
CLASSES += ["#92dadd"]
UNLABELLED = "#d0d0d0"

ACCURACIES = {
    "contrastive_accuracy": ("positive found in the batch", GREY),
    "probe_accuracy": ("online linear probe (training views)", ORANGE),
    "knn_accuracy": ("nearest neighbours (held out)", GREEN),
    "accuracy": ("training views", ORANGE),
    "agreement": ("agreement with the teacher (training views)", ORANGE),
    "top1": ("top-1 (held out)", GREEN),
}
HEALTH = {
    "effective_rank": "effective rank\n(higher: more dimensions in use)",
    "uniformity": "uniformity\n(lower: images spread out)",
    "alignment": "alignment\n(lower: views stay near)",
    "collapsed": "collapsed dimensions\n(share)",
}


def _subplots(rows=1, columns=1, *, figsize, **options):
    """A figure and its axes, of which no window and no notebook of the caller's knows."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def learning_curves(log: list[dict[str, float]], loss_name: str = "NT-Xent") -> Figure:
    """Loss, and whatever accuracies the run measured, against the step.

    Args:
      log: the lines of `metrics.jsonl`.
      loss_name: label of the loss.
    """
    figure, (left, right) = _subplots(1, 2, figsize=(9, 3.2))
    steps = [line for line in log if "loss" in line]  # before the first one there is none
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps], color=BLUE)
    left.set(xlabel="step", ylabel=loss_name, title="Loss")
    for name, (label, color) in ACCURACIES.items():
        points = [(line["step"], line[name]) for line in log if name in line]
        if points:
            marker = "o" if "held out" in label else None
            right.plot(*zip(*points), color=color, label=label, marker=marker, markersize=4)
    right.set(xlabel="step", ylabel="accuracy", title="Accuracy", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    return figure


def health(log: list[dict[str, float]]) -> Figure:
    """The health of features and projections against the step: what to watch where there are no labels.

    Args:
      log: those lines of `metrics.jsonl` that tell of it.
    """
    figure, axes = _subplots(1, len(HEALTH), figsize=(11, 3))
    for cell, (name, label) in zip(axes, HEALTH.items()):
        for space, color, marker in (("features", BLUE, "o"), ("projection", ORANGE, "s")):
            points = [(line["step"], line[f"{space}_{name}"]) for line in log]
            cell.plot(*zip(*points), color=color, marker=marker, markersize=4, label=space)
        cell.set(xlabel="step", title=label)
        cell.title.set_fontsize(9)
    axes[-1].set_ylim(-0.02, 1.02)
    axes[0].legend(frameon=False, fontsize=8)
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
    figure, axes = _subplots(figsize=(6.5, 3.2))
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


def few_labels(summaries: list[dict]) -> Figure:
    """Top-1 against the number of labels a class, of fine-tuning and of the same network from scratch.

    Args:
      summaries: of fine-tuning runs, with `labels_per_class` and `draws`.
    """
    figure, axes = _subplots(figsize=(6, 3.6))
    summaries = sorted(summaries, key=lambda summary: summary["labels_per_class"])
    curves = {"top1": ("pretrained, then fine-tuned", BLUE, "o")}
    curves["from_scratch_top1"] = ("from scratch", ORANGE, "s")
    for name, (label, color, marker) in curves.items():
        points = [
            (summary["labels_per_class"], np.mean(draws), np.std(draws))
            for summary in summaries
            if (draws := [draw[name] for draw in summary["draws"] if name in draw])
        ]
        if points:
            labels, means, deviations = zip(*points)
            axes.errorbar(
                labels, means, deviations, color=color, marker=marker, label=label, capsize=3, markersize=5
            )
    axes.set_xscale("log")
    ticks = [summary["labels_per_class"] for summary in summaries]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    draws = max(len(summary["draws"]) for summary in summaries)
    axes.set(xlabel="labels a class", ylabel="top-1 (held out)", ylim=(0, 1.02))
    axes.set_title(f"What pretraining buys (mean and deviation of {draws} draws)", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def views(batch: dict[str, np.ndarray]) -> Figure:
    """Rows of originals, first views and second views.

    Args:
      batch: `image`, `view1` and `view2`, uint8 [n, h, w, 3].
    """
    names = {"image": "image", "view1": "view 1", "view2": "view 2"}
    columns = len(batch["image"])
    figure, axes = _subplots(3, columns, figsize=(columns, 3.2), squeeze=False)
    for row, (key, name) in zip(axes, names.items()):
        for cell, picture in zip(row, batch[key]):
            cell.imshow(picture)
            cell.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    return figure


def neighbours(
    images: np.ndarray, features: np.ndarray, labels: np.ndarray, class_names=(), *, queries=8
) -> Figure:
    """Queries, a row each, and beside them their 8 nearest images by cosine similarity.

    Neighbours of another class than the query's have an orange frame.

    Args:
      images: uint8 [n, h, w, 3].
      features: float [n, w].
      labels: int [n], -1 where there are none; of every class there is a query, as far as the rows reach.
      class_names: names of the classes; their numbers where empty.
      queries: number of rows.
    """
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    firsts = np.unique(labels, return_index=True)[1] if labels.max() >= 0 else []
    rest = [row for row in range(len(images)) if row not in set(firsts)]
    chosen = sorted([*firsts, *rest][:queries])
    near = np.argsort(-features[chosen] @ features.T, axis=1, kind="stable")
    columns = min(9, len(images))
    figure, axes = _subplots(len(chosen), columns, figsize=(columns, 1.15 * len(chosen) + 0.3), squeeze=False)
    for query, order, row in zip(chosen, near, axes):
        shown = [query, *order[order != query]][:columns]
        for cell, member in zip(row, shown):
            cell.imshow(images[member])
            cell.set(xticks=[], yticks=[])
            if labels[member] >= 0:
                cell.set_xlabel(_class_name(labels[member], class_names), fontsize=7, labelpad=2)
            wrong = labels[member] != labels[query]
            cell.spines[:].set(color=ORANGE if wrong else "black", linewidth=3 if wrong else 0.8)
    axes[0, 0].set_title("query", fontsize=9)
    if columns > 1:
        axes[0, 1].set_title("nearest", fontsize=9, loc="left")
    return figure


def embedding_map(images: np.ndarray, features: np.ndarray, labels: np.ndarray, class_names=()) -> Figure:
    """A map of the images on which neighbours have similar features (t-SNE), and one of their classes.

    Args:
      images, features, labels, class_names: as of `neighbours`.
    """
    from sklearn.manifold import TSNE

    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if len(features) < 4 or not np.ptp(features, axis=0).any():  # nothing to lay out: beside each other
        places = np.stack([np.arange(len(features)), np.zeros(len(features))], axis=1)
    else:
        perplexity = min(30, (len(features) - 1) / 3)
        places = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(features)
    places = (places - places.min(axis=0)) / np.maximum(np.ptp(places, axis=0), 1e-12)
    labelled = labels.max() >= 0
    figure, axes = _subplots(1, 1 + labelled, figsize=(6.2 * (1 + labelled), 6), squeeze=False)
    axes[0, 0].imshow(_thumbnails(images, places), extent=(0, 1, 0, 1))
    axes[0, 0].set_title("images")
    if labelled:
        colors = np.array(CLASSES)[labels % len(CLASSES)]
        axes[0, 1].scatter(*places.T, c=colors, s=12, linewidths=0)
        for label in np.unique(labels) if labels.max() < 20 else ():
            axes[0, 1].annotate(
                _class_name(label, class_names),
                np.median(places[labels == label], axis=0),
                ha="center",
                va="center",
                fontsize=11,
                bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": CLASSES[label % len(CLASSES)]},
            )
        axes[0, 1].set_title("classes")
        axes[0, 1].set(aspect="equal", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for cell in axes[0]:
        cell.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    return figure


def _thumbnails(images, places, cells=24, size=32):
    """A white canvas with one image, of those that lie there, in every cell of a grid."""
    canvas = np.full((cells * size, cells * size, 3), 255, np.uint8)
    pick = np.linspace(0, images.shape[1] - 1, size).round().astype(int)
    columns, rows = np.minimum((places * cells).astype(int), cells - 1).T
    for image, column, row in zip(images, columns, cells - 1 - rows):
        canvas[row * size : (row + 1) * size, column * size : (column + 1) * size] = image[pick][:, pick]
    return canvas


def confusion(counts: np.ndarray, class_names) -> Figure:
    """How often images of each class (a row) were taken for each class (a column), as shares of the row.

    Args:
      counts: int [classes, classes].
      class_names: of the classes.
    """
    size = min(12, 3 + 0.35 * len(counts))
    figure, axes = _subplots(figsize=(size, size))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    few = len(counts) <= 25
    for row, column in zip(*np.nonzero(counts)) if few else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true", title=f"{counts.sum():,} images with a label")
    if few:
        names = [name if len(name) <= 20 else f"{name[:19]}…" for name in class_names]
        axes.set(xticks=range(len(counts)), yticks=range(len(counts)), yticklabels=names)
        axes.set_xticklabels(names, rotation=45, ha="right")
    return figure


def _class_name(label, class_names):
    return class_names[label] if class_names else str(label)
