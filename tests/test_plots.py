"""Pictures show what the files of a run hold."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_datasets import write_folder

from simclr_jax import runs
from simclr_jax.evaluation import similarity
from simclr_jax.plots import __main__ as plots_main
from simclr_jax.plots import board, figures, gallery, tsne
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow

LOG = [
    {"step": 0, "knn_accuracy": 0.6},
    {"step": 10, "loss": 9.0, "contrastive_accuracy": 0.1},
    {"step": 20, "loss": 8.0, "contrastive_accuracy": 0.2, "knn_accuracy": 0.9},
]
SCORES = {"few_label_accuracy": 0.8, "knn_accuracy": 0.7, "linear_accuracy": 0.9}


def test_learning_curves_show_every_point():
    loss, accuracy = figures.learning_curves(LOG).axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[10, 9], [20, 8]])
    assert [len(line.get_xdata()) for line in accuracy.lines] == [2, 2]
    assert loss.get_xlabel() == "step" and accuracy.get_ylabel() == "accuracy"


def test_scores_show_every_score_and_the_spread_over_draws():
    summary = {"trained": SCORES, "untrained": SCORES, "raw_pixels": {"knn_accuracy": 0.5}}
    (axes,) = figures.scores(summary, 7).axes
    assert sorted(bar.get_height() for bar in axes.patches) == [0.5, 0.7, 0.7, 0.8, 0.8, 0.9, 0.9]
    assert axes.get_xticklabels()[0].get_text() == "linear, 7 labels a class" and len(axes.containers) == 3
    (axes,) = figures.scores(summary | {"few_label_deviation": {"trained": 0.02, "untrained": 0.05}}, 7).axes
    whiskers = [bars for bars in axes.containers if hasattr(bars, "has_yerr")]
    spans = [bars.lines[2][0].get_segments()[0][:, 1] for bars in whiskers]
    np.testing.assert_allclose(spans, [[0.75, 0.85], [0.78, 0.82]])


def test_learning_curves_name_the_loss():
    figure = figures.learning_curves([{"step": 1, "loss": 2.0, "top1": 0.5}], "cross entropy")
    loss, accuracy = figure.axes
    assert loss.get_ylabel() == "cross entropy"
    assert [text.get_text() for text in accuracy.get_legend().texts] == ["top-1 (held out)"]


def test_health_shows_both_spaces_in_every_panel():
    names = ("effective_rank", "uniformity", "alignment", "collapsed")
    line = {f"{space}_{name}": 0.5 for space in ("features", "projection") for name in names}
    figure = figures.health([{"step": step, **line} for step in (1, 2, 3)])
    assert len(figure.axes) == 4
    assert all([len(curve.get_xdata()) for curve in cell.lines] == [3, 3] for cell in figure.axes)


def test_few_labels_show_means_of_the_draws_against_the_number_of_labels():
    def summary(labels, *draws):
        return {"labels_per_class": labels, "draws": [{"top1": a, "from_scratch_top1": b} for a, b in draws]}

    (axes,) = figures.few_labels([summary(20, (0.9, 0.8)), summary(5, (0.8, 0.4), (0.6, 0.2))]).axes
    pretrained, scratch = (container.lines[0].get_xydata() for container in axes.containers)
    np.testing.assert_allclose(pretrained, [[5, 0.7], [20, 0.9]])
    np.testing.assert_allclose(scratch, [[5, 0.3], [20, 0.8]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "20"]


def examples(labelled=True):
    """Forty images of one grey each, whose places and labels follow the grey."""
    grey = np.arange(40)
    images = np.broadcast_to((6 * grey).astype(np.uint8)[:, None, None, None], (40, 8, 8, 3))
    places = np.stack([grey / 39, np.sin(grey) / 2 + 0.5], axis=1)
    return images, places, np.where(grey < 5, -1, grey // 20) if labelled else np.full(40, -1)


def test_neighbours_have_names_and_similarities():
    images, _, labels = examples()
    chosen = np.array([[30, 31, 19, 2], [10, 11, 25, 9]])
    pictures = [[images[row] for row in line] for line in chosen]
    pictures[1][3] = None  # which is gone
    names = [[f"a$b {row}" * 4 for row in line] for line in chosen]
    similar = np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]])
    figure = figures.neighbours(pictures, names, labels[chosen], similar, ("dark", "light"))
    labels = [cell.get_xlabel() for cell in figure.axes]
    assert labels[:4] == ["light", "light\n0.900", "dark\n0.800", "a\\$b 2a\\$b 2a\\$b…\n0.700"]
    framed = [tuple(cell.spines["top"].get_edgecolor()) != (0, 0, 0, 1) for cell in figure.axes]
    assert framed == [False, False, True, False, False, False, True, False]
    assert [len(cell.images) for cell in figure.axes] == [1] * 7 + [0]
    figure.canvas.draw()  # names are no formulas


def test_neighbours_need_no_labels():
    images, _, labels = examples(labelled=False)
    names = [["first", "second"], ["third", "fourth"]]
    figure = figures.neighbours(
        images.reshape(2, 20, 8, 8, 3)[:, :2], names, labels[:4].reshape(2, 2), np.ones((2, 1))
    )
    assert [cell.get_xlabel() for cell in figure.axes] == ["first", "second\n1.000", "third", "fourth\n1.000"]
    assert all(tuple(cell.spines["top"].get_edgecolor()) == (0, 0, 0, 1) for cell in figure.axes)


@pytest.mark.parametrize("labelled", [True, False])
def test_map_shows_images_and_where_there_are_labels_classes(labelled):
    figure = figures.embedding_map(*examples(labelled), ("dark", "_$light$") if labelled else ())
    assert len(figure.axes) == 1 + labelled and "40 images" in figure.axes[0].get_title()
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.min() < 60 and canvas.max() == 255 and len(np.unique(canvas)) > 15
    if labelled:
        points = [len(group.get_offsets()) for group in figure.axes[1].collections]
        named = [text.get_text() for text in figure.axes[1].get_legend().texts]
        assert points == [5, 15, 20] and named == ["without a label", "dark", "\u200b_\\$light\\$"]
    figure.canvas.draw()


def test_map_of_many_classes_names_none():
    images, places, _ = examples()
    figure = figures.embedding_map(images, places, np.arange(40))
    assert not figure.axes[1].get_legend() and "40 classes" in figure.axes[1].get_title()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("alike", [True, False])
def test_a_few_images_have_places_and_neighbours(count, alike):
    angles = np.zeros(count) if alike else np.arange(count) / 9
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    places = tsne.places_of(features)
    nearest, similar = similarity.nearest(features, gallery.NEAREST)
    assert places.shape == (count, 2) and places.min() >= 0 and places.max() <= 1
    assert len(np.unique(places, axis=0)) == count
    assert nearest.shape == similar.shape == (count, count - 1)
    assert all(row not in others for row, others in enumerate(nearest.tolist()))
    images, _, labels = (part[:count] for part in examples())
    canvas = figures.embedding_map(images, places, labels).axes[0].images[0].get_array()
    assert canvas.min() == images.min()


@pytest.mark.parametrize("mebibytes", [256, 0.01])
def test_nearest_are_the_nearest_and_never_the_image_itself(mebibytes, monkeypatch):
    monkeypatch.setattr(similarity, "_MEBIBYTES", mebibytes)
    angles = np.arange(40) / 40
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    nearest, similar = similarity.nearest(features, gallery.NEAREST)
    assert nearest[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and set(nearest[20, :2].tolist()) == {19, 21}
    np.testing.assert_allclose(similar[0], np.cos(angles[1:9]), rtol=1e-6)


def test_queries_are_of_every_class():
    labels = np.array([-1, 2, 2, 0, -1, 1, 0])
    assert gallery._queries(labels).tolist() == [3, 5, 1, 0, 2, 4, 6]
    assert len(np.unique(gallery._queries(np.arange(100) % 50))) == gallery.CLASSES
    assert len(np.unique(gallery._queries(np.full(100, -1)))) == gallery.QUERIES


def test_few_held_out_images_are_shown_with_training_images(pretrained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(pretrained_run, run)
    write_folder(tmp_path / "photos", [f"{number}.png" for number in range(12)])
    config = ConfigDict(json.loads((run / "config.json").read_text()))
    config.dataset.update(name="folder", path=str(tmp_path / "photos"))
    images, features, labels, _ = board.held_out(config, run)
    assert len(images) == len(features) == len(labels) == 12
    assert len(np.unique(images, axis=0)) == 12 and set(labels) == {-1}
    assert "training images beside them" in capsys.readouterr().out


@pytest.mark.journey
def test_command_writes_the_pictures_of_a_run(pretrained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(pretrained_run, run)
    (run / "summary.json").write_text(json.dumps({"trained": SCORES, "steps": 20}))
    for count in (5, 10):
        (run / f"finetune{count}").mkdir()
        labels = {"labels_per_class": count, "draws": [{"top1": 0.9, "from_scratch_top1": 0.5}]}
        (run / f"finetune{count}" / "summary.json").write_text(json.dumps(labels))
    plots_main.main([str(run)])
    *written, page = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{run}/plots")
    ]
    assert page.endswith("plots/index.html")
    names = ["curves", "views", "health", "scores", "few_labels", "neighbours", "map"]
    assert [path.rsplit("/")[-1] for path in written] == [f"{name}.png" for name in names]
    for path in written:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.size > 100_000 and pixels.std() > 5


@pytest.mark.journey
def test_pictures_of_a_classifier_are_of_its_own_network(finetuned_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finetuned_run, run)
    plots_main.main([str(run)])
    drawn = sorted(path.name for path in (run / "plots").iterdir())
    assert drawn == [
        "curves.png",
        "index.html",
        "map.png",
        "neighbours.png",
    ]  # one number of labels: no curve
    images = gallery.make(runs.load_features(run))
    assert str(images.stored.run) == str(run) and len(images.rows) == 1797 and len(images.queries) == 10
    assert images.labels[images.queries].tolist() == list(range(10))
    config = ConfigDict(json.loads((run / "embed" / "config.json").read_text()))
    assert config.pretrained == str(run)


def test_folder_of_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl.*workdir"):
        plots_main.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("task", "loss", "name"),
    [
        ("pretrain", "nt_xent", "NT-Xent"),
        ("pretrain", "barlow_twins", "barlow_twins"),
        ("distill", None, "cross entropy against the teacher"),
        ("finetune", None, "cross entropy"),
    ],
)
def test_curves_name_the_loss(task, loss, name):
    config = ConfigDict({"task": task} | ({"loss": loss} if loss else {}))
    assert plots_main._name_of_loss(config) == name
