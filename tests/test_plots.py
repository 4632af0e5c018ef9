"""Pictures show what the files of a run hold."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_datasets import write_folder

from simclr_jax.errors import UserError
from simclr_jax.plots import __main__ as plots_main
from simclr_jax.plots import board, figures

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


def test_scores_show_every_score():
    (axes,) = figures.scores(
        {"trained": SCORES, "untrained": SCORES, "raw_pixels": {"knn_accuracy": 0.5}}
    ).axes
    assert sorted(bar.get_height() for bar in axes.patches) == [0.5, 0.7, 0.7, 0.8, 0.8, 0.9, 0.9]


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
    """Forty images of one grey each, whose features and labels follow the grey."""
    grey = np.arange(40)
    images = np.broadcast_to((6 * grey).astype(np.uint8)[:, None, None, None], (40, 8, 8, 3))
    angles = grey / 40
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return images, features, grey // 20 if labelled else np.full(40, -1)


def test_neighbours_are_the_nearest_and_never_the_query_itself():
    images, features, labels = examples()
    figure = figures.neighbours(images, features, labels, ("dark", "light"), queries=3)
    rows = np.array([cell.images[0].get_array()[0, 0, 0] // 6 for cell in figure.axes]).reshape(3, 9)
    assert rows[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]  # the first of each class, and one more
    assert rows[2].tolist()[0] == 20 and set(rows[2].tolist()[1:3]) == {19, 21}
    framed = [tuple(cell.spines["top"].get_edgecolor()) != (0, 0, 0, 1) for cell in figure.axes[18:]]
    assert framed == [bool(row < 20) for row in rows[2]]
    assert figure.axes[0].get_xlabel() == "dark" and figure.axes[18].get_xlabel() == "light"


def test_neighbours_need_no_labels():
    figure = figures.neighbours(*examples(labelled=False), queries=2)
    assert len(figure.axes) == 18 and not figure.axes[0].get_xlabel()


@pytest.mark.parametrize("labelled", [True, False])
def test_map_shows_images_and_where_there_are_labels_classes(labelled):
    figure = figures.embedding_map(*examples(labelled), ("dark", "light") if labelled else ())
    assert [cell.get_title() for cell in figure.axes] == ["images", "classes"][: 1 + labelled]
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.min() < 60 and canvas.max() == 255 and len(np.unique(canvas)) > 15
    if labelled:
        assert [text.get_text() for text in figure.axes[1].texts] == ["dark", "light"]
        assert len(figure.axes[1].collections[0].get_offsets()) == 40


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("alike", [True, False])
def test_pictures_of_a_few_images(count, alike):
    images, features, labels = (part[:1].repeat(count, 0) if alike else part[:count] for part in examples())
    assert len(figures.neighbours(images, features, labels).axes) == count * count
    canvas = figures.embedding_map(images, features, labels).axes[0].images[0].get_array()
    assert canvas.min() == images.min()


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


def test_command_writes_the_pictures_of_a_run(pretrained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(pretrained_run, run)
    (run / "summary.json").write_text(json.dumps({"trained": SCORES, "steps": 20}))
    (run / "finetune").mkdir()
    labels = {"labels_per_class": 5, "draws": [{"top1": 0.9, "from_scratch_top1": 0.5}]}
    (run / "finetune" / "summary.json").write_text(json.dumps(labels))
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
