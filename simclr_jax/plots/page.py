"""The page of a run: one HTML file that needs nothing else and no network. Its text is in page.html."""

import base64
import hashlib
import html
import io
import json
import shlex
import warnings
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from pyarrow import parquet

from simclr_jax.config.saved import complete
from simclr_jax.evaluation import doubt, parts, similarity
from simclr_jax.plots import figures, gallery
from simclr_jax.process import UserError, escape
from simclr_jax.workdir import records, report

OUTLIERS, DOUBTFUL, GROUPS, CLUSTERS = 24, 60, 50, 10
_ROUNDS = "Accuracy of classifiers by their labels"
_SMALL = 112  # Pixels of doubtful images.
_FOLDER = Path(__file__).parent
_CORRECT = (
    "Click an image, or go there by Tab, and press the key of its class, or Enter where the prediction is "
    "right: the label goes into labels.csv, above."
)
_CORRECT_SEVERAL = (
    "Click an image, or go there by Tab. Keys add classes to those that are predicted, or take them away; "
    "Enter confirms: the label goes into labels.csv, above."
)
_DOUBTFUL = ("two classes are nearly as likely", "a class is nearly as likely as not")
_KEYS = (
    "press the key of its class for each image",
    "press the keys of the classes of each image, then Enter, which without a class says none of them",
)
_OTHER_IMAGES = "They are no images of this run: to label some, copy them into its folder first."


class Predictions(NamedTuple):
    """The predictions of a run: names and classes of its file, and probabilities [names, classes].

    Labels are as in `doubt.likeliest`, with `several` an image where the classifier tells as many.
    """

    run: Path
    names: list[str]
    classes: list[str]
    probabilities: np.ndarray
    labels: list[str]
    several: bool


def write(
    run: Path,
    images: gallery.Gallery,
    predictions: Predictions | None = None,
    views=None,
    given: dict[str, str] | None = None,
    several: bool = False,
) -> Path:
    """Writes `run`/plots/index.html into the folder, which is there.

    Args:
      run: the workdir of a run.
      images: its images.
      predictions: from `read_predictions`.
      views: the matplotlib figure of some views, where the run has made any.
      given: {name: label} of the labels that there are in a CSV file.
      several: whether an image may have several labels.

    Returns:
      The path of the file.
    """
    from bokeh.embed import components
    from bokeh.resources import Resources

    same_images = predictions is not None and _dataset(predictions.run) == _dataset(run)
    data, threshold = _data(run, images, predictions, same_images, given or {})
    data["several"] = several
    log = report.read(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    scripts, plots = components(_curves(log, _rounds(run)) | {"map": _map(images.places)})
    map_plot = plots.pop("map")
    sprite, data["sprite"] = _sprite(images.thumbnails)
    text = Template((_FOLDER / "page.html").read_text()).substitute(
        title=html.escape(f"{run.absolute().name}: what was learnt"),
        subtitle=html.escape(_subtitle(images.stored, len(images.rows), several)),
        no_curves="" if plots else "hidden",
        curves="".join(f"<div>{plot}</div>" for plot in plots.values()),
        no_views="" if views else "hidden",
        views=f'<img alt="views" src="{_data_url("png", views.savefig, dpi=110)}">' if views else "",
        map=map_plot,
        colours="".join(f"<option value='{name}'>{name}</option>" for name in data["columns"]),
        suggested=len(data["suggested"]),
        no_doubts="" if data["doubts"] else "hidden",
        predictions=html.escape(escape(predictions.run)) if predictions else "",
        doubtful=_DOUBTFUL[predictions.several if predictions else several],
        advice=(_CORRECT_SEVERAL if several else _CORRECT) if same_images else _OTHER_IMAGES,
        keys=_KEYS[several],
        command=html.escape(
            escape(shlex.join(["python", "-m", *train_command(run.absolute(), several=several)]))
        ),
        threshold=f"{threshold:.4f}",
        share=f"{similarity.SHARE:g}",
        duplicates=len(data["duplicates"]),
        sprite=sprite,
        bokeh=Resources(mode="inline", components=["bokeh"]).render(),
        figures=scripts,
        data=json.dumps(data).replace("</", "<\\/"),
        script=(_FOLDER / "page.js").read_text(),
    )
    path = run / "plots" / "index.html"
    path.write_text(text, "utf-8", "backslashreplace")
    return path


def _dataset(run):
    """What tells whether two runs are of the same images."""
    dataset = records.dataset_of(run)
    return dataset.get("name"), dataset.get("path")


def _data(run, images, predictions, same_images, given):
    """The data of the page's script, and the smallest similarity of near-duplicates."""
    stored = images.stored
    groups, _, threshold = similarity.duplicates(stored.features[images.rows], similarity.SHARE)
    suggested = [
        {
            "name": stored.names[row],
            "split": stored.split[row],
            "index": int(stored.index[row]),
            "url": _jpeg(images.large[row]),
        }
        for row in images.suggested.tolist()
        if row in images.large
    ]
    predicted = [*predictions.classes, *predictions.labels] if predictions else []
    classes = list(dict.fromkeys([*stored.class_names, *predicted]))
    columns, margins = _columns(images, predictions if same_images else None, classes)
    data = {
        "id": hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16],
        "images": {
            "names": images.names,
            "nearest": images.nearest.tolist(),
            "similarities": images.similarities.round(3).tolist(),
        },
        "classes": classes,
        "palette": [*figures.CLASSES, figures.UNLABELLED],
        "columns": {key: column.tolist() for key, column in columns.items()},
        "margins": margins,
        "given": given,
        "correctable": same_images,
        "duplicates": [
            np.flatnonzero(groups == group).tolist() for group in range(groups.max() + 1)[:GROUPS]
        ],
        "outliers": images.similarities.mean(axis=1).argsort(kind="stable")[:OUTLIERS].tolist(),
        "doubts": _doubts(predictions, run, stored.config.dataset.path) if predictions else [],
        "suggested": suggested,
    }
    return data, threshold


def _columns(images, predictions, classes):
    """Colours of the map, and margins.

    Returns:
      {name: int [n]}, indices in `classes`, -1 for none, and numbers of clusters; by how much the likeliest
      class of each image is more probable than the second, [n], empty without predictions.
    """
    columns, margins = {}, []
    if images.stored.class_names and images.labels.max() >= 0:  # Their classes come first in `classes`.
        columns["class"] = images.labels
    if predictions:
        row_of = {name: row for row, name in enumerate(predictions.names)}
        rows = np.array([row_of.get(name, -1) for name in images.names])
        if rows.max() >= 0:
            number_of = {name: number for number, name in enumerate(classes)}
            best = np.array([number_of[label] for label in predictions.labels])
            columns["prediction"] = np.where(rows < 0, -1, best[rows])
            margins = doubt.margins(predictions.probabilities, predictions.several)[rows]
            margins = np.where(rows < 0, 1, margins).round(3).tolist()
    return columns | {"cluster": _clusters(images.stored.features[images.rows])}, margins


def _clusters(features):
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # Images may be identical.
        return KMeans(min(CLUSTERS, len(features)), n_init=5, random_state=0).fit(features).labels_


def train_command(run: Path, labels: str = "labels.csv", several: bool = False) -> list[str]:
    """Returns the module, and its words, that train a classifier of `run` from the labels of the page."""
    flags = [f"--labels={labels}", *["--config.dataset.several_labels=True"] * several]
    return ["simclr_jax", "round", str(run), *flags]


def _subtitle(stored, count, several):
    shown = f", {count:,} of them here" if count < len(stored.names) else ""
    labels = int((stored.labels >= 0).sum())
    classes = set(";".join(stored.class_names).split(";")) - {""} if several else stored.class_names
    labels = f"{labels:,} with a label of {len(classes)} classes" if labels else "without labels"
    total = f"{len(stored.names):,} images of {escape(stored.dataset)}"
    return f"{total}{shown}, {labels}; features of {escape(stored.run)}."


def _sprite(thumbnails):
    """One picture of all thumbnails, as a data URL, and its geometry."""
    count, size = thumbnails.shape[:2]
    columns = int(np.ceil(np.sqrt(count)))
    canvas = np.full((-(-count // columns), columns, size, size, 3), 255, np.uint8)
    canvas.reshape(-1, size, size, 3)[:count] = thumbnails
    canvas = canvas.transpose(0, 2, 1, 3, 4).reshape(-1, columns * size, 3)
    return _jpeg(Image.fromarray(canvas)), {"size": size, "columns": columns}


def _jpeg(image):
    return _data_url("jpeg", image.save, quality=80)


def _data_url(kind, save, **options):
    file = io.BytesIO()
    save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def read_predictions(run: Path) -> Predictions | None:
    """Reads the newest predictions in `run`, in one of its folders, or in a folder of a classifier there.

    Those for its own images come before those for others.
    """
    paths = [path for depth in ("", "*/", "*/*/") for path in run.glob(f"{depth}predictions.parquet")]
    if not paths:
        return None
    own = _dataset(run)
    path = max(paths, key=lambda path: (_dataset(path.parent) == own, path.stat().st_mtime))
    table = parquet.read_table(path)
    metadata = table.schema.metadata
    classes = json.loads(metadata[b"class_names"])
    titles = json.loads(metadata.get(b"columns", b"null")) or table.column_names[3:]  # Older files lack them.
    probabilities = np.stack([table[title].to_numpy() for title in titles], axis=1)
    several = json.loads(metadata.get(b"several_labels", b"false"))
    labels, _ = doubt.likeliest(classes, probabilities, several)
    return Predictions(path.parent, table["name"].to_pylist(), classes, probabilities, labels, several)


def _doubts(predictions, run, path):
    """The images of the smallest margins, the most doubtful first; those of `run` are in `path`."""
    doubts = {}
    margins = doubt.margins(predictions.probabilities, predictions.several)
    for row in margins.argsort(kind="stable")[:DOUBTFUL]:
        probabilities = predictions.probabilities[row]
        likeliest = probabilities.argsort()[::-1]
        # Several labels are those above 0.5; the image is here for the class that is nearest to it.
        shown = np.maximum((probabilities > 0.5).sum(), np.abs(probabilities[likeliest] - 0.5).argmin() + 1)
        likeliest = likeliest[: shown if predictions.several else 2]
        words = (f"{predictions.classes[i]} {probabilities[i]:.2f}" for i in likeliest)
        name, prediction = predictions.names[row], predictions.labels[row]
        doubts[name] = {"name": name, "caption": ", ".join(words), "prediction": prediction}
    config = ConfigDict(complete(records.read_config(predictions.run)))
    if config.dataset.path == records.read_config(run)["dataset"]["path"]:
        config.dataset.path = path
    try:
        records.find_images(config)
    except UserError as error:
        print(f"note: the page shows no images of {escape(predictions.run)}: {error}", flush=True)
        return []
    for split in parts.splits(config):
        source = parts.load(config, predictions.run, split)
        names = parts.names(source, split)
        rows = [row for row, name in enumerate(names) if name in doubts]
        for row, image in gallery.images(source, rows):
            entry = doubts[names[row]]
            entry["url"] = _jpeg(gallery.fit(image, _SMALL))
            if source.class_names and source.labels is not None and source.labels[row] >= 0:
                entry["truth"] = source.class_names[source.labels[row]]
    return [entry for entry in doubts.values() if "url" in entry]


def _curves(log, rounds):
    """{title: Bokeh figure} of what a run has logged, and of the accuracies by labels of its classifiers."""
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    axes, plots = {}, {}
    for title, curves in (figures.CURVES | figures.HEALTH).items():
        lines = ((*style, figures.points(log, metric)) for metric, style in curves.items())
        axes[title.partition("\n")[0].capitalize()] = "step", [line for line in lines if line[-1]]
    if len({labels for labels, _ in rounds}) > 1:
        axes[_ROUNDS] = "labels", [("cross-validated", figures.CLASSES[0], None, rounds)]
    for title, (name, lines) in axes.items():
        plot = figure(title=title, height=230, sizing_mode="stretch_width", tools="pan,wheel_zoom,reset")
        plot.add_tools(HoverTool(tooltips=[(name, "@x"), ("", "@y{0.0000}")]))
        for label, colour, _, points in lines:
            places, values = zip(*points)
            plot.line(places, values, color=colour, legend_label=label, line_width=2)
            if len(points) < 50:
                plot.scatter(places, values, color=colour, size=5)
        if lines:
            plot.xaxis.axis_label = name
            plot.legend.label_text_font_size = "8pt"
            plot.legend.background_fill_alpha = 0.6
            # The legend keeps away from where the first curve ends.
            heights, end = [value for line in lines for _, value in line[-1]], lines[0][-1][-1][1]
            plot.legend.location = "bottom_right" if 2 * end > min(heights) + max(heights) else "top_right"
            plots[title] = plot
    return plots


def _rounds(run):
    """(labels, accuracy) of the cross-validated classifiers in folders of a run, sorted."""
    paths = run.glob("*/summary.json")
    summaries = [records.read_summary(path.parent) or {} for path in sorted(paths)]
    return sorted(
        (summary["labels"], summary["top1"]) for summary in summaries if {"labels", "top1"} <= summary.keys()
    )


def _map(places):
    """The Bokeh figure of all images as points, which the page's own script colours and shows."""
    from bokeh.models import ColumnDataSource, CustomJS, HoverTool, TapTool
    from bokeh.plotting import figure

    colours = np.full(len(places), figures.UNLABELLED)
    source = ColumnDataSource({"x": places[:, 0], "y": places[:, 1], "colour": colours}, name="points")
    plot = figure(
        height=520,
        sizing_mode="stretch_width",
        tools="pan,wheel_zoom,box_zoom,reset",
        active_scroll="wheel_zoom",
        name="map",
    )
    points = plot.scatter("x", "y", color="colour", source=source, size=6 if len(places) < 5000 else 3)
    on_hover = CustomJS(code="const { indices } = cb_data.index; if (indices.length) show(indices[0]);")
    on_tap = CustomJS(code="if (cb_obj.indices.length) show(cb_obj.indices[0]);")
    plot.add_tools(HoverTool(renderers=[points], tooltips=None, callback=on_hover))
    plot.add_tools(TapTool(renderers=[points]))
    source.selected.js_on_change("indices", on_tap)
    points.nonselection_glyph = points.glyph
    plot.axis.visible = False
    plot.grid.visible = False
    return plot
