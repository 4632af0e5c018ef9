"""The page of a run: one HTML file that needs nothing else and no network, with what there is to look at."""

import base64
import concurrent.futures
import hashlib
import html
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from pyarrow import parquet

from simclr_jax import report, workdirs
from simclr_jax.console import shown
from simclr_jax.evaluation import embedded, neighbours, parts, suggest
from simclr_jax.plots import figures

MOST = 20_000  # images that are shown, random ones of more
MAPPED = 5_000  # of them that t-SNE places; the others lie where the one nearest to them is
PIXELS = 12_000_000  # of all thumbnails together
NEAREST = 8  # neighbours of every image
SUGGESTED, OUTLIERS, DOUBTFUL, GROUPS, CLUSTERS = 50, 24, 60, 50, 10
_LARGE, _SMALL = 320, 112  # pixels of images to be labelled, and of doubtful ones
_BLOCK = 2**26  # similarities that are held at a time
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


def write(run: Path, views=None) -> Path:
    """Writes `run`/plots/index.html.

    Args:
      run: the workdir of a run.
      views: the matplotlib figure of some views, where the run has made any.

    Returns:
      The path of the file.
    """
    found = embedded.load(run)
    rows = np.sort(np.random.default_rng(0).permutation(len(found.names))[:MOST])
    log = report.read(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    predictions = _read_predictions(run)
    print(f"{shown(run)}: a map of {len(rows):,} images", flush=True)
    features = found.features[rows]
    nearest, similar = _nearest(features)
    groups, _, threshold = neighbours.duplicates(features, neighbours.SHARE)
    suggested = _suggested(found)
    thumbnails, large = _thumbnails(found, rows, suggested)
    sprite, geometry = _sprite(thumbnails)
    said = {}
    if predictions:
        said = dict(zip(predictions.names, predictions.probabilities.argmax(axis=1).tolist()))
    images = {
        "names": [found.names[row] for row in rows],
        "labels": found.labels[rows].tolist() if found.class_names else [-1] * len(rows),
        "predicted": [said.get(found.names[row], -1) for row in rows] if said else [],
        "nearest": nearest.tolist(),
        "similar": similar.round(3).tolist(),
    }
    data = {
        "id": hashlib.sha256("\n".join([str(run), *large]).encode()).hexdigest()[:16],
        "images": images,
        "sprite": geometry,
        "classes": list(found.class_names),
        "predicted": predictions.classes if predictions else [],
        "duplicates": [
            np.flatnonzero(groups == group).tolist() for group in range(groups.max() + 1)[:GROUPS]
        ],
        "outliers": similar.mean(axis=1).argsort(kind="stable")[:OUTLIERS].tolist(),
        "doubts": _doubts(predictions) if predictions else [],
        "suggested": [
            {"name": name, "split": found.split[row], "index": int(found.index[row]), "url": large[name]}
            for row in suggested
            if (name := found.names[row]) in large
        ],
    }
    columns = {"cluster": suggest.clusters(features, min(CLUSTERS, len(features)), 0)}
    columns |= {"class": np.array(images["labels"])} if max(images["labels"]) >= 0 else {}
    columns |= (
        {"prediction": np.array(images["predicted"])} if max(images["predicted"], default=-1) >= 0 else {}
    )
    plots = _curves(log) | {"map": _map(_places(features), columns)}
    resources, scripts, places = _embed(plots)
    sections = _sections(data, columns, places, views, len(found.names), threshold)
    text = Template((_HERE / "page.html").read_text()).substitute(
        title=html.escape(f"{run.absolute().name}: what was learnt"),
        subtitle=html.escape(_subtitle(found, len(rows))),
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


def _subtitle(found, count):
    some = f", {count:,} of them here" if count < len(found.names) else ""
    known = int((found.labels >= 0).sum())
    labels = f"{known:,} with a label of {len(found.class_names)} classes" if known else "without labels"
    where = found.config.dataset.path or found.config.dataset.name
    return f"{len(found.names):,} images of {shown(where)}{some}, {labels}; features of {shown(found.run)}."


def _sections(data, columns, places, views, count, threshold) -> list[Section]:
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
    options = "".join(f"<option value='{name}'>{name}</option>" for name in columns)
    body = (
        f'<label>Colours: <select id="colour">{options}</select></label>'
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
            "Predicted images, the most doubtful first: the two likeliest classes are nearly as likely. If "
            "many are wrong in the same way, label some of them."
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


def _nearest(features):
    """Rows of the nearest images of each, int [n, k], the nearest first, and the similarities."""
    count = len(features)
    near = min(NEAREST, count - 1)
    rows, similar = np.empty((count, near), int), np.empty((count, near), np.float32)
    block = max(1, _BLOCK // count)
    for start in range(0, count, block):
        stop = min(start + block, count)
        found = neighbours.to_others(features, np.arange(start, stop))
        best = (
            np.argpartition(-found, near - 1, axis=1)[:, :near] if near else np.empty((stop - start, 0), int)
        )
        order = np.argsort(-np.take_along_axis(found, best, axis=1), axis=1, kind="stable")
        rows[start:stop] = np.take_along_axis(best, order, axis=1)
        similar[start:stop] = np.take_along_axis(found, rows[start:stop], axis=1)
    return rows, similar


def _places(features):
    """Where images lie on the map, [n, 2], in [0, 1]."""
    from sklearn.manifold import TSNE

    count = len(features)
    placed = np.sort(np.random.default_rng(0).permutation(count)[:MAPPED])
    if len(placed) < 5:
        return np.stack([np.linspace(0, 1, count), np.full(count, 0.5)], axis=1)
    perplexity = min(30, (len(placed) - 1) / 3)
    found = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(features[placed])
    found = (found - found.min(axis=0)) / np.maximum(np.ptp(found, axis=0), 1e-12)
    places = np.empty((count, 2))
    places[placed] = found
    others = np.setdiff1d(np.arange(count), placed)
    rng = np.random.default_rng(0)
    for start in range(0, len(others), 4096):
        rows = others[start : start + 4096]
        best = (features[rows] @ features[placed].T).argmax(axis=1)
        places[rows] = found[best] + 0.004 * rng.standard_normal((len(rows), 2))
    return places


def _suggested(found):
    """Rows of images to label, of what is trained on and has no label."""
    rows = suggest.candidates(found)
    known = found.labels[rows] >= 0
    known = known if not known.all() else np.zeros(len(rows), bool)  # of a set that is labelled: as if not
    count = min(SUGGESTED, int((~known).sum()))
    return rows[suggest.typical(found.features[rows], count, np.flatnonzero(known), 0)]


def _thumbnails(found, rows, suggested):
    """Squares uint8 [n, s, s, 3] of the images in `rows`, and {name: data URL} of those to be labelled."""
    size = int(np.clip(np.sqrt(PIXELS / len(rows)), 16, 64))
    wanted = np.union1d(rows, suggested)
    squares = np.full((len(rows), size, size, 3), 255, np.uint8)
    places = {row: place for place, row in enumerate(rows.tolist())}
    chosen, large = set(suggested.tolist()), {}
    numbers = {split: {} for split in dict.fromkeys(found.split)}
    for row in wanted.tolist():
        numbers[found.split[row]][int(found.index[row])] = row
    for split, by_index in numbers.items():
        for index, image in _images(found.config, found.files, split, list(by_index)):
            row = by_index[index]
            if row in places:
                squares[places[row]] = np.asarray(_square(image, size))
            if row in chosen:
                large[found.names[row]] = _jpeg(_within(image, _LARGE))
    return squares, {
        found.names[row]: large[found.names[row]] for row in suggested if found.names[row] in large
    }


def _images(config, workdir, split, indices) -> Iterator[tuple[int, Image.Image]]:
    """Yields index and image of some examples of a split, those that can still be read."""
    from simclr_jax.data import datasets

    source = datasets.load(config.dataset, split, seed=config.seed, workdir=workdir)

    def decoded(index, record):
        try:
            return index, Image.fromarray(np.asarray(source.decode(record)))
        except Exception:  # lost since: TensorFlow's and Pillow's errors
            return index, None

    if isinstance(source, datasets.Stream):
        wanted = set(indices)
        records = enumerate(example["image"] for example in source.read([(0, max(wanted, default=-1) + 1)]))
        pairs = ((index, record) for index, record in records if index in wanted)
    else:
        pairs = ((index, source.records[index]) for index in indices)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        while some := list(itertools.islice(pairs, 64)):  # images of any size: few are held at a time
            for index, image in pool.map(lambda pair: decoded(*pair), some):
                if image is not None:
                    yield index, image


def _square(image, size):
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def _within(image, size):
    """An image of which neither side is above `size`; small ones are enlarged by whole factors."""
    if max(image.size) * 2 <= size:
        factor = size // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((size, size))
    return image


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
    config = ConfigDict(workdirs.complete(workdirs.read_config(predictions.run)))
    told = {}
    for row in order:
        ranks = predictions.probabilities[row].argsort()[::-1][:2]
        words = (f"{predictions.classes[rank]} {predictions.probabilities[row, rank]:.2f}" for rank in ranks)
        told[predictions.names[row]] = ", ".join(words)
    urls = {}
    for split in parts.splits(config):
        names = _names(config, predictions.run, split)
        wanted = {index: name for index, name in enumerate(names) if name in told}
        for index, image in _images(config, predictions.run, split, list(wanted)):
            urls[wanted[index]] = _jpeg(_within(image, _SMALL))
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


def _map(places, columns):
    """The Bokeh figure of all images as points; the page's own script shows the one that is pointed at."""
    from bokeh.models import ColumnDataSource, CustomJS, HoverTool, TapTool
    from bokeh.plotting import figure

    palette = np.array([*figures.CLASSES, figures.UNLABELLED])
    colours = {
        name: palette[np.where(numbers < 0, len(palette) - 1, numbers % (len(palette) - 1))]
        for name, numbers in columns.items()
    }
    source = ColumnDataSource(
        {"x": places[:, 0], "y": places[:, 1], "colour": next(iter(colours.values())), **colours},
        name="points",
    )
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
