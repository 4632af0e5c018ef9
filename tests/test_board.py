"""TensorBoard's pictures of a run, read back from its files."""

import io
import json

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simclr_jax import runs
from simclr_jax.plots import board, figures

pytestmark = pytest.mark.slow


def entries_of(workdir):
    """{name: (step, strings)} of everything that is no number."""
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    events.Reload()
    tensors = {
        name: events.Tensors(name) for name in ("config", "views", "map") if name in events.Tags()["tensors"]
    }
    assert all(len(entries) == 1 for entries in tensors.values())
    return {name: (entry.step, entry.tensor_proto.string_val) for name, (entry,) in tensors.items()}


def pixels(strings):
    width, height, *pictures = strings
    (picture,) = (np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures)
    assert picture.shape == (int(height), int(width), 3)
    return picture


def views():
    """A batch of four images with two views of each."""
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (4, 8, 8, 3), np.uint8) for name in ("image", "view1", "view2")}


def fail(*arguments, **options):
    raise RuntimeError("no colours left")


@pytest.mark.journey
def test_a_run_shows_its_config_views_and_a_map_once(tmp_path):
    config = tiny_config("pretrain", num_steps=2, **{"evaluate.pictures": True})
    runs.run(config, tmp_path)
    entries = entries_of(tmp_path)
    assert {name: step for name, (step, _) in entries.items()} == {"config": 0, "views": 0, "map": 2}
    (text,) = entries["config"][1]
    assert all(line.startswith(b"    ") for line in text.splitlines())
    assert json.loads(text) == json.loads(json.dumps(config.to_dict()))
    for name in ("views", "map"):
        picture = pixels(entries[name][1])
        assert picture.size > 100_000 and picture.std() > 5
    runs.run(config, tmp_path)  # which is over
    assert entries_of(tmp_path).keys() == entries.keys()


def test_the_config_and_views_are_shown_at_the_beginning(tmp_path):
    config = tiny_config("pretrain")
    board.begin(config, tmp_path, views)
    entries = entries_of(tmp_path)
    assert {name: step for name, (step, _) in entries.items()} == {"config": 0, "views": 0}
    (text,) = entries["config"][1]
    assert all(line.startswith(b"    ") for line in text.splitlines())
    assert json.loads(text) == json.loads(json.dumps(config.to_dict()))
    picture = pixels(entries["views"][1])
    assert picture.size > 100_000 and picture.std() > 5


def test_a_map_is_shown_at_the_end(pretrained_run, monkeypatch):
    shown = []
    monkeypatch.setattr(board.report, "show", lambda workdir, step, pictures: shown.append((step, pictures)))
    board.end(tiny_config("pretrain"), pretrained_run, 5)
    [(step, pictures)] = shown
    assert step == 5 and pictures["map"].size > 100_000 and pictures["map"].std() > 5


def test_no_picture_stops_a_run(pretrained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "embedding_map", fail)
    board.begin(tiny_config("pretrain"), tmp_path, fail)
    board.end(tiny_config("pretrain"), pretrained_run, 5)
    assert entries_of(tmp_path).keys() == {"config"}
    out = capsys.readouterr().out
    assert "note: TensorBoard has no views: no colours left" in out
    assert "note: TensorBoard has no map: no colours left" in out


def test_held_out_images_have_their_features_and_labels(pretrained_run):
    config = tiny_config("pretrain")
    images, features, labels, names = board.held_out(config, pretrained_run)
    assert len(images) == len(features) == len(labels) == 360 and names == tuple("0123456789")
    assert features.std(axis=0).max() > 0 and set(labels) == set(range(10))
