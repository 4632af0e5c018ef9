"""Features as files: every image once, in order, whatever the parts and the stops."""

import json

import numpy as np
import pytest
from conftest import run_task, stop_at_part, tiny_config
from PIL import Image
from pyarrow import parquet

from simclr_jax.data import datasets
from simclr_jax.evaluation import features, parts
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow


def embedded(pretrained_run, workdir, **settings):
    summary = run_task("embed", workdir, pretrained=str(pretrained_run), **settings)
    return summary, dict(np.load(workdir / "embeddings.npz"))


@pytest.fixture(scope="module")
def in_one_part(pretrained_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("embedded")
    return workdir, *embedded(pretrained_run, workdir)


def test_files_hold_the_features_of_every_image_in_order(pretrained_run, in_one_part):
    workdir, summary, arrays = in_one_part
    assert summary["examples"] == 1797 and summary["dimensions"] == 32
    config = tiny_config("embed", pretrained=str(pretrained_run))
    extract = features.make_pretrained_extract(config)
    train, held_out = (extract(datasets.load(config.dataset, split, seed=0)) for split in ("train", "eval"))
    np.testing.assert_array_equal(arrays["features"], np.concatenate([train.features, held_out.features]))
    np.testing.assert_array_equal(arrays["label"], np.concatenate([train.labels, held_out.labels]))
    np.testing.assert_array_equal(arrays["split"], ["train"] * 1437 + ["eval"] * 360)
    np.testing.assert_array_equal(arrays["index"], [*range(1437), *range(360)])
    table = parquet.read_table(workdir / "embeddings.parquet")
    assert table.column_names == ["split", "index", "name", "label", "features"]
    np.testing.assert_array_equal(np.stack(table["features"].to_numpy()), arrays["features"])
    for name in ("split", "index", "name", "label"):
        assert table[name].to_pylist() == arrays[name].tolist()
    assert sorted(path.name for path in workdir.iterdir()) == [
        "config.json",
        "embeddings.npz",
        "embeddings.parquet",
    ]


def test_parts_do_not_change_a_byte_of_the_features(pretrained_run, in_one_part, tmp_path):
    _, arrays = embedded(pretrained_run, tmp_path, examples_per_part=256)
    assert arrays.keys() == in_one_part[2].keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, in_one_part[2][name])


def test_stopped_run_goes_on_behind_its_last_part(pretrained_run, in_one_part, tmp_path, monkeypatch):
    written = stop_at_part(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        embedded(pretrained_run, tmp_path, examples_per_part=500)
    assert not (tmp_path / "embeddings.npz").exists()
    _, arrays = embedded(pretrained_run, tmp_path, examples_per_part=500)
    assert written == [f"{split}-{start:09d}.parquet" for split, start in PARTS]
    # In batches of other neighbours a processor may round one number in fifty thousand otherwise.
    np.testing.assert_allclose(arrays["features"], in_one_part[2]["features"], rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(parts, "_write", None)  # a finished run writes nothing
    assert embedded(pretrained_run, tmp_path, examples_per_part=500)[0]["dimensions"] == 32


PARTS = [("train", 0), ("train", 500), ("train", 1000), ("eval", 0)]


def test_folder_has_file_names_and_its_own_labels(pretrained_run, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(23):
        path = tmp_path / "photos" / ("ä" if number % 2 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    settings = {"dataset.name": "folder", "dataset.path": str(tmp_path / "photos"), "examples_per_part": 8}
    summary, arrays = embedded(pretrained_run, tmp_path / "run", **settings)
    assert summary["examples"] == 23
    listed = json.loads((tmp_path / "run" / "images.json").read_text())
    expected = sorted([name, label] for split in ("train", "eval") for name, label in listed[split])
    assert set(arrays["split"]) == {"all"} and arrays["class_names"].tolist() == ["b", "ä"]
    assert [[name, label] for name, label in zip(arrays["name"], arrays["label"])] == expected
    assert sorted(arrays["name"])[-1].startswith("ä/")
    assert len(np.unique(arrays["features"], axis=0)) == 23


def test_unknown_split_is_a_user_error(pretrained_run, tmp_path):
    with pytest.raises(UserError, match="split 'test': expected 'train', 'eval'"):
        embedded(pretrained_run, tmp_path, splits="train+test")
