"""The page of a run: one HTML file that needs nothing else and no network, with what there is to look at."""

import base64
import hashlib
import html
import io
import json
import warnings
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from pyarrow import parquet

from simclr_jax.config.saved import complete
from simclr_jax.evaluation import neighbours, parts
from simclr_jax.plots import figures, gallery
from simclr_jax.process.console import escape
from simclr_jax.workdir import records, report

OUTLIERS, DOUBTFUL, GROUPS, CLUSTERS = 24, 60, 50, 10
_SMALL = 112  # pixels of doubtful images
_HERE = Path(__file__).parent


class Section(NamedTuple):
    """A part of the page; `told` says what to look for, `body` is HTML."""

    key: str
    title: str
    told: str
    body: str


class Predictions(NamedTuple):
    """What a run of predict says, by rows of its file: names, classes [n], probabilities [n, classes]."""

    run: Path
    names: list[str]
    classes: list[str]
    probabilities: np.ndarray


def write(run: Path, seen: gallery.Gallery, views=None) -> Path:
    """Writes `run`/plots/index.html.

    Args:
      run: the workdir of a run.
      seen: its images.
      views: the matplotlib figure of some views, where the run has made any.

    Returns:
      The path of the file.
    """
    found = seen.found
    log = report.read(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    predictions = _read_predictions(run)
    features = found.features[seen.rows]
    groups, _, threshold = neighbours.duplicates(features, neighbours.SHARE)
    sprite, geometry = _sprite(seen.squares)
    suggested = [row for row in seen.suggested.tolist() if row in seen.large]
    classes = list(dict.fromkeys([*found.class_names, *(predictions.classes if predictions else [])]))
    columns = _columns(seen, predictions, classes)
    known = [str(run), *(found.names[row] for row in suggested)]
    data = {
        "id": hashlib.sha256("\n".join(known).encode()).hexdigest()[:16],
        "images": {
            "names": [found.names[row] for row in seen.rows],
            "nearest": seen.nearest.tolist(),
            "similar": seen.similar.round(3).tolist(),
        },
        "sprite": geometry,
        "classes": classes,
        "palette": [*figures.CLASSES, figures.UNLABELLED],
        "columns": {name: numbers.tolist() for name, numbers in columns.items()},
        "duplicates": [
            np.flatnonzero(groups == group).tolist() for group in range(groups.max() + 1)[:GROUPS]
        ],
        "outliers": seen.similar.mean(axis=1).argsort(kind="stable")[:OUTLIERS].tolist(),
        "doubts": _doubts(predictions) if predictions else [],
        "suggested": [
            {
                "name": found.names[row],
                "split": found.split[row],
                "index": int(found.index[row]),
                "url": _jpeg(seen.large[row]),
            }
            for row in suggested
        ],
    }
    plots = _curves(log) | {"map": _map(seen.places)}
    resources, scripts, places = _embed(plots)
    sections = _sections(data, places, views, threshold, predictions)
    text = Template((_HERE / "page.html").read_text()).substitute(
        title=html.escape(f"{run.absolute().name}: what was learnt"),
        subtitle=html.escape(_subtitle(found, len(seen.rows))),
        links=" ".join(f'<a href="#{section.key}">{section.title}</a>' for section in sections),
        sections="\n".join(
            f'<section id="{key}"><h2>{title}</h2><p>{told}</p>{body}</section>'
            for key, title, told, body in sections
        ),
        sprite=sprite,
        bokeh=resources,
        figures=scripts,
        data=json.dumps(data).replace("</", "<\\/"),
        script=(_HERE / "page.js").read_text(),
    )
    (run / "plots").mkdir(exist_ok=True)
    path = run / "plots" / "index.html"
    path.write_text(text, "utf-8", "backslashreplace")
    return path


def _columns(seen, predictions, classes):
    """What the map may be coloured by: {name: int [n]}, -1 for nothing, of `classes` but for clusters."""
    features = seen.found.features[seen.rows]
    found = {}
    if seen.found.class_names and seen.labels.max() >= 0:  # whose numbers come first in `classes`
        found["class"] = seen.labels
    if predictions:
        numbers = np.array([classes.index(name) for name in predictions.classes])
        said = dict(zip(predictions.names, numbers[predictions.probabilities.argmax(axis=1)].tolist()))
        predicted = np.array([said.get(seen.found.names[row], -1) for row in seen.rows])
        found |= {"prediction": predicted} if predicted.max() >= 0 else {}
    return found | {"cluster": _clusters(features)}


def _clusters(features):
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of images that are the same
        return KMeans(min(CLUSTERS, len(features)), n_init=5, random_state=0).fit(features).labels_


def _subtitle(found, count):
    some = f", {count:,} of them here" if count < len(found.names) else ""
    known = int((found.labels >= 0).sum())
    labels = f"{known:,} with a label of {len(found.class_names)} classes" if known else "without labels"
    where = found.config.dataset.path or found.config.dataset.name
    return f"{len(found.names):,} images of {escape(where)}{some}, {labels}; features of {escape(found.run)}."


def _sections(data, places, views, threshold, predictions) -> list[Section]:
    """The parts of the page that this run has something for."""
    curves = [places[name] for name in places if name != "map"]
    found = []
    if curves:
        plots = "".join(f"<div>{place}</div>" for place in curves)
        told = (
            "The loss falls and flattens; contrastive accuracy, which image of the batch is the other view, "
            "rises. Effective rank rises; far below the number of dimensions, or with a growing share of "
            "collapsed ones, the features say less than they could. Uniformity falls as images spread out; "
            "low alignment means that views of one image stay near."
        )
        found.append(Section("curves", "Curves", told, f'<div class="plots">{plots}</div>'))
    if views is not None:
        told = (
            "Each column is an image and two views of it. What you tell images apart by has to be left in "
            "both; where it is not, raise augment.min_area or lower augment.color_jitter_strength."
        )
        found.append(Section("views", "Views", told, f'<img alt="views" src="{_png(views)}">'))
    options = "".join(f"<option value='{name}'>{name}</option>" for name in data["columns"])
    body = (
        f'<label>Colours: <select id="colour">{options}</select></label><div id="legend"></div>'
        f'<div class="split"><div>{places["map"]}</div><div id="panel"></div></div>'
    )
    told = (
        "Images that the network finds alike lie together. Point at one to see it and its nearest images, "
        "zoom with the wheel. Groups that you recognise are what it has learnt; groups by light, camera or "
        "background are what it has learnt instead."
    )
    found.append(Section("map", "Map", told, body))
    told = (
        f"The {len(data['suggested'])} images whose labels are worth most, the best first. Type the classes, "
        "then press 1 to 9 for each image; s skips, u undoes. What you have done is kept in this browser. "
        "Download labels.csv and train a classifier: <code>--config=configs/folder.py:finetune "
        "--config.dataset.labels=labels.csv</code>"
    )
    body = (
        '<div id="labels"><p><input id="classes" placeholder="cat, dog, sheep" aria-label="classes"></p>'
        '<img id="large" alt=""><p id="progress"></p><div id="keys"></div>'
        '<p><a id="download" download="labels.csv">Download labels.csv</a></p></div>'
    )
    found.append(Section("label", "Label", told, body))
    if data["doubts"]:
        told = (
            f"Images as {html.escape(escape(predictions.run))} tells them apart, the most doubtful first: "
            "two classes are nearly as likely. If many are wrong in one way, label some of them."
        )
        found.append(Section("predictions", "Predictions", told, '<div id="doubt-rows" class="rows"></div>'))
    told = (
        f"Images whose features are as good as the same (similarity of at least {threshold:.4f}, nearer than "
        f"{neighbours.SHARE:g} of what nearest images usually are), {len(data['duplicates'])} groups here. "
        "Of true duplicates keep one: the loss takes each for another image than its copy, and a copy among "
        "the held-out images makes accuracies look better. The whole list: <code>python -m "
        "simclr_jax.evaluation.neighbours RUN --duplicates</code>"
    )
    body = '<div id="duplicate-groups" class="rows"></div>'
    found.append(Section("duplicates", "Near-duplicates", told, body))
    told = (
        "Images that are least like any other: broken files, wrong folders, and rare things worth a label of "
        "their own."
    )
    found.append(Section("outliers", "Outliers", told, '<div id="outlier-rows" class="rows"></div>'))
    return found


def _sprite(squares):
    """One picture of all thumbnails, as a data URL, and what it looks like."""
    count, size = squares.shape[:2]
    columns = int(np.ceil(np.sqrt(count)))
    canvas = np.full((-(-count // columns), columns, size, size, 3), 255, np.uint8)
    canvas.reshape(-1, size, size, 3)[:count] = squares
    canvas = canvas.transpose(0, 2, 1, 3, 4).reshape(-1, columns * size, 3)
    return _jpeg(Image.fromarray(canvas)), {"size": size, "columns": columns}


def _jpeg(image):
    contents = io.BytesIO()
    image.save(contents, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(contents.getvalue()).decode()


def _png(figure):
    contents = io.BytesIO()
    figure.savefig(contents, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(contents.getvalue()).decode()


def _read_predictions(run) -> Predictions | None:
    """Those of `run`, or of the newest folder in it that has some."""
    files = [*run.glob("predictions.parquet"), *run.glob("*/predictions.parquet")]
    if not files:
        return None
    path = max(files, key=lambda path: path.stat().st_mtime)
    table = parquet.read_table(path)
    classes = json.loads(table.schema.metadata[b"class_names"])
    probabilities = np.stack([column.to_numpy() for column in table.columns[3:]], axis=1)
    return Predictions(path.parent, table["name"].to_pylist(), classes, probabilities)


def _doubts(predictions):
    """The images of which the second class is nearly as likely as the first."""
    best = np.sort(predictions.probabilities, axis=1)[:, ::-1]
    order = (best[:, 0] - best[:, 1]).argsort(kind="stable")[:DOUBTFUL]
    config = ConfigDict(complete(records.read_config(predictions.run)))
    told = {}
    for row in order:
        ranks = predictions.probabilities[row].argsort()[::-1][:2]
        words = (f"{predictions.classes[rank]} {predictions.probabilities[row, rank]:.2f}" for rank in ranks)
        told[predictions.names[row]] = ", ".join(words)
    urls = {}
    for split in parts.splits(config):
        names = _names(config, predictions.run, split)
        wanted = {index: name for index, name in enumerate(names) if name in told}
        for index, image in gallery.images(config, predictions.run, split, list(wanted)):
            urls[wanted[index]] = _jpeg(gallery.within(image, _SMALL))
    return [{"name": name, "told": words, "url": urls[name]} for name, words in told.items() if name in urls]


def _names(config, workdir, split):
    """What predictions call the examples of a split."""
    from simclr_jax.data import datasets

    source = datasets.load(config.dataset, split, seed=config.seed, workdir=workdir)
    if source.names is None:
        return [f"{split}/{index}" for index in range(source.num_examples)]
    return [name.encode("utf-8", "backslashreplace").decode() for name in source.names]


def _curves(log):
    """{title: Bokeh figure} of what a run has logged."""
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    lines = {"Loss": {"loss": ("loss", figures.BLUE)}, "Accuracy": figures.ACCURACIES}
    lines |= {
        label.partition("\n")[0].capitalize(): {
            f"{space}_{name}": (space, colour)
            for space, colour in (("features", figures.BLUE), ("projection", figures.ORANGE))
        }
        for name, label in figures.HEALTH.items()
    }
    found = {}
    for title, names in lines.items():
        plot = figure(title=title, height=230, sizing_mode="stretch_width", tools="pan,wheel_zoom,reset")
        plot.add_tools(HoverTool(tooltips=[("step", "@x"), ("", "@y{0.0000}")]))
        for name, (label, colour) in names.items():
            points = [(line["step"], line[name]) for line in log if name in line]
            if points:
                steps, values = zip(*points)
                plot.line(steps, values, color=colour, legend_label=label, line_width=2)
                if len(points) < 50:
                    plot.scatter(steps, values, color=colour, size=5)
        if plot.renderers:
            plot.xaxis.axis_label = "step"
            plot.legend.label_text_font_size = "8pt"
            plot.legend.background_fill_alpha = 0.6
            found[title] = plot
    return found


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
    look = "const found = cb_data.index.indices; if (found.length) show(found[0]);"
    plot.add_tools(HoverTool(renderers=[points], tooltips=None, callback=CustomJS(code=look)))
    plot.add_tools(TapTool(renderers=[points]))
    source.selected.js_on_change(
        "indices", CustomJS(code="if (cb_obj.indices.length) show(cb_obj.indices[0]);")
    )
    points.nonselection_glyph = points.glyph
    plot.axis.visible = False
    plot.grid.visible = False
    return plot


def _embed(plots):
    """Bokeh's scripts, those of the plots, and {name: HTML} of where they go."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, places = components(plots)
    return Resources(mode="inline", components=["bokeh"]).render(), script, places
