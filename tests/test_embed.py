"""Features as files: every image once, in order, whatever the parts and the stops."""

import json
import shutil

import numpy as np
import pytest
from conftest import run_task, stop_at_part, tiny_config
from PIL import Image
from pyarrow import parquet

from simclr_jax import runs
from simclr_jax.config import shipped
from simclr_jax.data import datasets
from simclr_jax.evaluation import features, parts
from simclr_jax.process.errors import RunError, UserError

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
        "origin.json",
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


def test_workers_of_beam_make_the_parts_that_are_missing(pretrained_run, in_one_part, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    written = stop_at_part(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        embedded(pretrained_run, tmp_path, examples_per_part=500)
    (tmp_path / "parts" / written.pop(0)).unlink()
    flags = "--runner=DirectRunner --direct_running_mode=in_memory"
    _, arrays = embedded(pretrained_run, tmp_path, examples_per_part=500, beam=flags)
    made = [f"{split}-{start:09d}.parquet" for split, start in PARTS if (split, start) != ("train", 500)]
    assert sorted(written[1:]) == sorted(made) and not (tmp_path / "parts").exists()
    for name in ("split", "index", "label"):
        np.testing.assert_array_equal(arrays[name], in_one_part[2][name])
    np.testing.assert_allclose(arrays["features"], in_one_part[2]["features"], atol=1e-5)


def test_the_error_of_a_worker_of_beam_is_one_line(pretrained_run, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")

    def fail(path, *rest):
        raise ValueError(f"no {path.name}")

    monkeypatch.setattr(parts, "_write", fail)
    flags = "--runner=DirectRunner --direct_running_mode=in_memory"
    with pytest.raises(RunError, match=r"^a worker of Apache Beam failed: .*no \w+-000000000.parquet$"):
        embedded(pretrained_run, tmp_path, beam=flags)


REFUSED = {
    "--runner=Slurm": "--runner=Slurm: expected DirectRunner, Data",
    "--direct_num_workers=2": "--runner=None: expected DirectRunner, Data",
    "--runner='Direct": "No closing quotation: expected flags of Beam, as --runner=DirectRunner",
    "--runner=DirectRunner --direct_num_workers=x": "invalid int value: 'x': expected flags of Beam",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_other_runners_of_beam_are_refused_before_any_work(flags, pretrained_run, tmp_path):
    pytest.importorskip("apache_beam")
    with pytest.raises(UserError, match=REFUSED[flags]):
        embedded(pretrained_run, tmp_path, beam=flags)
    assert not list(tmp_path.iterdir())


def test_workers_of_beam_are_not_started_without_a_network(tmp_path):
    pytest.importorskip("apache_beam")
    with pytest.raises(UserError, match="nowhere"):
        embedded(tmp_path / "nowhere", tmp_path / "run", beam="--runner=DirectRunner")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


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


def photographs(folder, count):
    """A folder of so many images."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def run_on_photographs(pretrained_run, tmp_path):
    """A copy of that run, whose config names a folder of twelve images."""
    run = tmp_path / "run"
    shutil.copytree(pretrained_run, run)
    config = json.loads((run / "config.json").read_text())
    config["dataset"] |= {"name": "folder", "path": str(photographs(tmp_path / "photos", 12))}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_features_are_made_again_when_images_came_or_the_network_changed(
    run_on_photographs, tmp_path, capsys
):
    run = run_on_photographs
    first = runs.load_features(run)
    assert len(first.names) == 12 and len(runs.load_features(run).names) == 12
    assert "embedded again" not in capsys.readouterr().out
    photographs(tmp_path / "photos", 15)
    assert len(runs.load_features(run).names) == 15
    said = capsys.readouterr().out
    assert "holds features of other images (files 12, now 15)" in said and "embed-before" in said
    assert len(runs.load_features(run / "embed-before").names) == 12
    capsys.readouterr()

    origin = json.loads((run / "embed" / "origin.json").read_text())
    assert origin["step"] == 5 and origin["image_size"] == 16 and origin["files"] == 15
    (run / "embed" / "origin.json").write_text(json.dumps(origin | {"network": "other", "step": 3}))
    again = runs.load_features(run)
    assert "holds features of another network (step 3, now 5)" in capsys.readouterr().out
    rows = [again.names.index(name) for name in first.names]
    np.testing.assert_array_equal(again.features[rows], first.features)
    assert (run / "embed-before-2").is_dir()


def test_features_without_their_images_are_read(run_on_photographs, tmp_path, capsys):
    first = runs.load_features(run_on_photographs)
    shutil.rmtree(tmp_path / "photos")
    assert runs.load_features(run_on_photographs).names == first.names


def test_parts_of_another_network_are_made_anew(pretrained_run, finetuned_run, tmp_path, monkeypatch, capsys):
    network = tmp_path / "network"
    shutil.copytree(finetuned_run, network)
    settings = {"pretrained": str(network), "examples_per_part": 512}
    stop_at_part(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run_task("embed", tmp_path / "embed", **settings)
    shutil.rmtree(network)
    shutil.copytree(pretrained_run, network)
    run_task("embed", tmp_path / "embed", **settings)
    assert "holds parts of another network (step 5, now 5)" in capsys.readouterr().out
    run_task("embed", tmp_path / "whole", **settings)
    features = [np.load(tmp_path / name / "embeddings.npz")["features"] for name in ("embed", "whole")]
    np.testing.assert_array_equal(*features)


def test_a_finished_run_says_that_its_folder_has_grown(run_on_photographs, tmp_path, capsys):
    config = shipped.base().embed(tiny_config("embed"))
    config.update(pretrained=str(run_on_photographs), image_size=16)
    config.dataset.update(name="folder", path=str(tmp_path / "photos"))
    runs.run(config, tmp_path / "own")
    photographs(tmp_path / "photos", 14)
    assert runs.run(config, tmp_path / "own")["examples"] == 12
    assert "own is of other images (files 12, now 14)" in capsys.readouterr().out
