"""Pictures show what the files of a run hold."""

import json

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from configs import digits
from simclr_jax import checkpoint, plots
from simclr_jax.errors import UserError

LOG = [
    {"step": 10, "loss": 9.0, "contrastive_accuracy": 0.1},
    {"step": 20, "loss": 8.0, "contrastive_accuracy": 0.2, "knn_accuracy": 0.9},
]
SCORES = {"few_label_accuracy": 0.8, "knn_accuracy": 0.7, "linear_accuracy": 0.9}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def test_learning_curves_show_every_point():
    loss, accuracy = plots.learning_curves(LOG).axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[10, 9], [20, 8]])
    assert [len(line.get_xdata()) for line in accuracy.lines] == [2, 1]
    assert loss.get_xlabel() == "step" and accuracy.get_ylabel() == "accuracy"


def test_scores_show_every_score():
    (axes,) = plots.scores({"trained": SCORES, "untrained": SCORES, "raw_pixels": {"knn_accuracy": 0.5}}).axes
    assert sorted(bar.get_height() for bar in axes.patches) == [0.5, 0.7, 0.7, 0.8, 0.8, 0.9, 0.9]


def test_command_writes_the_pictures_of_a_run(tmp_path, capsys):
    checkpoint.save_config(tmp_path, digits.get_config().to_dict())
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, LOG)) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps({"trained": SCORES, "steps": 20}))
    plots.main([str(tmp_path)])
    written = capsys.readouterr().out.split()
    assert [path.rsplit("/")[-1] for path in written] == ["curves.png", "views.png", "scores.png"]
    for path in written:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.size > 100_000 and pixels.std() > 5


def test_folder_of_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl.*workdir"):
        plots.main([str(tmp_path)])
