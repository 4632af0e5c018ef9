"""The pictures of a run: each function returns a matplotlib figure."""

import numpy as np
from matplotlib.figure import Figure

# Colours by Okabe and Ito, which the colour-blind can distinguish; ten colours by Petroff for classes.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
CLASSES = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581"]
CLASSES += ["#92dadd"]
UNLABELLED = "#d0d0d0"
MAX_NAMED = 20  # Largest number of classes that a legend names.

# {title: {metric: (label, colour, marker)}} of the curves of a run.
CURVES = {
    "Loss": {"loss": ("loss", BLUE, None)},
    "Accuracy": {
        "contrastive_accuracy": ("positive found in the batch", GREY, None),
        "probe_accuracy": ("online linear probe (training views)", ORANGE, None),
        "knn_accuracy": ("nearest neighbours (held out)", GREEN, "o"),
        "accuracy": ("training views", ORANGE, None),
        "agreement": ("agreement with the teacher (training views)", ORANGE, None),
        "top1": ("top-1 (held out)", GREEN, "o"),
    },
}
_HEALTH = {
    "effective_rank": "effective rank\n(higher: more dimensions in use)",
    "uniformity": "uniformity\n(lower: images spread out)",
    "alignment": "alignment\n(lower: views stay near)",
    "collapsed": "collapsed dimensions\n(share)",
}
HEALTH = {
    title: {f"features_{name}": ("features", BLUE, "o"), f"projection_{name}": ("projection", ORANGE, "s")}
    for name, title in _HEALTH.items()
}


def _subplots(rows=1, columns=1, *, figsize, **options):
    """A figure outside of pyplot, which would show it in windows and notebooks, and its axes."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def points(log: list[dict[str, float]], metric: str) -> list[tuple[float, float]]:
    """Returns the step and the value of every line of a log that has the metric."""
    return [(line["step"], line[metric]) for line in log if metric in line]


def _draw_curves(log, titles, figsize):
    """A figure with the curves under each of `titles` against the step, and its axes."""
    figure, axes = _subplots(1, len(titles), figsize=figsize)
    for cell, (title, curves) in zip(axes, titles.items()):
        for metric, (label, color, marker) in curves.items():
            if curve := points(log, metric):
                cell.plot(*zip(*curve), color=color, label=label, marker=marker, markersize=4)
        cell.set_xlabel("step")
        cell.set_title(title, fontsize=9)
    return figure, axes


def learning_curves(log: list[dict[str, float]], loss_name: str = "NT-Xent") -> Figure:
    """Plots the loss, and the accuracies that the run measured, against the step.

    Args:
      log: the lines of `metrics.jsonl`.
      loss_name: label of the loss.
    """
    figure, (left, right) = _draw_curves(log, CURVES, (9, 3.2))
    left.set(ylabel=loss_name)
    right.set(ylabel="accuracy", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    return figure


def health(log: list[dict[str, float]]) -> Figure:
    """Plots the health of features and projections against the step, which needs no labels.

    Args:
      log: the lines of `metrics.jsonl` with these figures.
    """
    figure, axes = _draw_curves(log, HEALTH, (11, 3))
    axes[-1].set_ylim(-0.02, 1.02)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def scores(summary: dict, labels_per_class: int) -> Figure:
    """Draws the accuracies of the trained encoder, the untrained one and raw pixels as bars.

    Args:
      summary: a summary of pretraining; its `few_label_deviation`, where it has one, is drawn as whiskers.
      labels_per_class: the number of labels of the few-label score.
    """
    probes = {
        "few_label_accuracy": f"linear, {labels_per_class} labels a class",
        "knn_accuracy": "nearest neighbours",
        "linear_accuracy": "linear, all labels",
    }
    rows = {
        "untrained": ("untrained encoder", GREY),
        "raw_pixels": ("raw pixels", ORANGE),
        "trained": ("SimCLR", BLUE),
    }
    deviations = summary.get("few_label_deviation", {})
    figure, axes = _subplots(figsize=(6.5, 3.2))
    for offset, (row, (label, color)) in enumerate(rows.items()):
        present = [name for name in probes if name in summary.get(row, {})]
        positions = [list(probes).index(name) + (offset - 1) * 0.27 for name in present]
        heights = [summary[row][name] for name in present]
        bars = axes.bar(positions, heights, 0.25, color=color, label=label)
        axes.bar_label(bars, fmt=lambda value: f"{100 * value:.1f}", fontsize=8, padding=1)
        if row in deviations and "few_label_accuracy" in present:
            whisker = {"color": "black", "capsize": 2, "linewidth": 1}
            axes.errorbar(positions[0] + 0.09, heights[0], deviations[row], **whisker)
    axes.set_xticks(range(len(probes)), probes.values())
    axes.set(ylabel="accuracy", ylim=(0, 1.12))
    whiskers = " (whiskers: deviation over the draws of labels)" if deviations else ""
    axes.set_title(f"Held-out images{whiskers}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def few_labels(summaries: list[dict]) -> Figure:
    """Plots the top-1 accuracy against the labels a class, of fine-tuning and of training from scratch.

    Args:
      summaries: summaries of fine-tuning runs, with `labels_per_class` and `draws`.
    """
    figure, axes = _subplots(figsize=(6, 3.6))
    summaries = sorted(summaries, key=lambda summary: summary["labels_per_class"])
    curves = {
        "top1": ("pretrained, then fine-tuned", BLUE, "o"),
        "from_scratch_top1": ("from scratch", ORANGE, "s"),
    }
    for name, (label, color, marker) in curves.items():
        rows = [
            (summary["labels_per_class"], np.mean(draws), np.std(draws))
            for summary in summaries
            if (draws := [draw[name] for draw in summary["draws"] if name in draw])
        ]
        if rows:
            axes.errorbar(*zip(*rows), color=color, marker=marker, label=label, capsize=3, markersize=5)
    axes.set_xscale("log")
    ticks = [summary["labels_per_class"] for summary in summaries]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    draws = max(len(summary["draws"]) for summary in summaries)
    axes.set(xlabel="labels a class", ylabel="top-1 (held out)", ylim=(0, 1.02))
    axes.set_title(f"With and without pretraining (mean and deviation of {draws} draws)", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def composite(image: np.ndarray) -> np.ndarray:
    """Shows images [..., h, w, c], uint8 or floats in [0, 1], as uint8 [..., h, w, 3].

    The first three channels become red, green and blue, two magenta and green, and one grey.
    """
    image = image if image.dtype == np.uint8 else np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return image[..., [0, min(1, image.shape[-1] - 1), 2 if image.shape[-1] > 2 else 0]]


def views(batch: dict[str, np.ndarray]) -> Figure:
    """Shows rows of originals, first views and second views.

    Args:
      batch: `image`, `view1` and `view2`, [n, h, w, c]; see `composite`.
    """
    names = {"image": "image", "view1": "view 1", "view2": "view 2"}
    columns = len(batch["image"])
    figure, axes = _subplots(3, columns, figsize=(columns, 3.2), squeeze=False)
    for row, (key, name) in zip(axes, names.items()):
        for cell, picture in zip(row, batch[key]):
            cell.imshow(composite(picture))
            cell.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    return figure


def neighbours(images, names, labels: np.ndarray, similarities: np.ndarray, class_names=()) -> Figure:
    """Shows queries, a row each, and beside them their nearest images and the cosine similarities.

    Neighbours of another class than the query's have an orange frame.

    Args:
      images: q lists of 1 + k pictures, the query first, the others by similarity; None for a lost one.
      names: q lists of the 1 + k names.
      labels: int [q, 1 + k], -1 where there are none.
      similarities: float [q, k].
      class_names: names of the classes; their numbers where empty.
    """
    rows, columns = labels.shape
    figure, axes = _subplots(rows, columns, figsize=(columns, 1.32 * rows + 0.3), squeeze=False)
    for cells, *row, row_similarities in zip(axes, images, names, labels, similarities):
        query_label = row[-1][0]
        for number, (cell, picture, name, label) in enumerate(zip(cells, *row)):
            if picture is not None:
                cell.imshow(picture)
            cell.set(xticks=[], yticks=[])
            wrong = label >= 0 and query_label >= 0 and label != query_label
            cell.spines[:].set(color=ORANGE if wrong else "black", linewidth=3 if wrong else 0.8)
            caption = _caption(_class_name(label, class_names) if label >= 0 else name, 14)
            caption += f"\n{row_similarities[number - 1]:.3f}" if number else ""
            cell.set_xlabel(caption, fontsize=7, labelpad=2)
    axes[0, 0].set_title("query", fontsize=9)
    if columns > 1:
        axes[0, 1].set_title("nearest, and how similar", fontsize=9, loc="left")
    return figure


def embedding_map(
    images: np.ndarray, places: np.ndarray, labels: np.ndarray, class_names=(), title=""
) -> Figure:
    """Draws a map of images, and one of their classes.

    Args:
      images: [n, h, w, c], see `composite`; in every cell of a grid one image is drawn.
      places: float [n, 2] in [0, 1], see `tsne.places_of`.
      labels: int [n], -1 where there are none.
      class_names: names of the classes; their numbers where empty.
      title: if not given, the number of images.
    """
    classes = np.unique(labels[labels >= 0])
    columns = 2 if len(classes) else 1
    figure, axes = _subplots(1, columns, figsize=(6.7 * columns, 6), squeeze=False)
    axes[0, 0].imshow(_thumbnails(images, places), extent=(0, 1, 0, 1))
    title = title or f"{len(images):,} images"
    axes[0, 0].set_title(f"{title}; where several lie, one is drawn", fontsize=10)
    if len(classes):
        groups = {"without a label": (labels < 0, UNLABELLED)}
        for label in classes:
            name = _caption(_class_name(label, class_names), 24)
            groups[name] = labels == label, CLASSES[label % len(CLASSES)]
        size = 12 if len(images) < 3000 else 4
        for name, (members, colour) in groups.items():
            if members.any():
                axes[0, 1].scatter(*places[members].T, c=colour, s=size, linewidths=0, label=name)
        if few := len(classes) <= MAX_NAMED:
            axes[0, 1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, markerscale=2)
        colours = "" if len(classes) <= len(CLASSES) else f", in {len(CLASSES)} colours by turns"
        axes[0, 1].set_title(f"{'' if few else f'{len(classes):,} '}classes{colours}", fontsize=10)
        axes[0, 1].set(aspect="equal", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for cell in axes[0]:
        cell.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    return figure


def _thumbnails(images, places, cells=24, size=32):
    """A white canvas with one of the images that lie there in every cell of a grid."""
    canvas = np.full((cells * size, cells * size, 3), 255, np.uint8)
    pick = np.linspace(0, images.shape[1] - 1, size).round().astype(int)
    columns, rows = np.minimum((places * cells).astype(int), cells - 1).T
    for image, column, row in zip(composite(images), columns, cells - 1 - rows):
        canvas[row * size : (row + 1) * size, column * size : (column + 1) * size] = image[pick][:, pick]
    return canvas


def confusion(counts: np.ndarray, class_names) -> Figure:
    """Draws a confusion matrix with the true classes as rows; shades are shares of the row.

    Args:
      counts: int [classes, classes].
      class_names: names of the classes.
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
        names = [_caption(name, 20) for name in class_names]
        axes.set(xticks=range(len(counts)), yticks=range(len(counts)), yticklabels=names)
        axes.set_xticklabels(names, rotation=45, ha="right")
    return figure


def _class_name(label, class_names):
    return class_names[label] if class_names else str(label)


def _caption(name, length):
    """Truncates and escapes a name for matplotlib: a dollar is mathematics, and a _ hides a legend entry."""
    text = name if len(name) <= length else f"{name[: length - 1]}…"
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")
