"""Training images on the devices: when they lie there, their batches, and runs on them."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import test_train
from conftest import run_task, tiny_config
from test_api import TINY
from test_datasets import write_folder, write_image
from test_processes import environment, join
from test_train import assert_trees_close, config_of, step_on

import simclr_jax
from simclr_jax import checkpoint, parallel
from simclr_jax.data import datasets, pipeline
from simclr_jax.models import make_model
from simclr_jax.process import UserError
from simclr_jax.tasks import pretrain
from simclr_jax.views import batches, resident

pytestmark = pytest.mark.slow

ON_DEVICE = {"dataset.on_device": True}


def digits_task(**settings):
    """The task of a tiny run of digits, whose images lie on the devices."""
    config = tiny_config("pretrain", batch_size=16, **ON_DEVICE, **settings)
    source = datasets.load(config.dataset, "train", seed=config.seed)
    images = resident.load(config, source, None)
    return (
        config,
        source,
        pretrain.make_task(config, make_model(config.model, source.num_classes), source, images=images),
    )


def views_of(task, step=0):
    """The batch after so many steps that the loss gets, as host arrays [rows, ...] of this process."""
    batch = next(task.batches(step))
    made = jax.device_get(task.on_devices(parallel.shard(batch)))
    return {name: rows.reshape(-1, *rows.shape[2:]) for name, rows in made.items()}


def folder_config(path, **settings):
    return tiny_config("pretrain", **{"dataset.name": "folder", "dataset.path": str(path)}, **settings)


def load_folder(path, **settings):
    config = folder_config(path, **settings)
    source = datasets.load(config.dataset, "train", seed=0)
    return source, resident.load(config, source, None)


def test_every_example_comes_once_an_epoch_in_the_order_of_the_host():
    config, source, task = digits_task()
    made = task.batches(0)
    rows = [next(made) for _ in range(180)]
    example, epoch, label = (
        np.concatenate([row[name] for row in rows]) for name in ("example", "epoch", "label")
    )
    for number in (0, 1):
        np.testing.assert_array_equal(np.sort(example[epoch == number]), np.arange(source.num_examples))
    np.testing.assert_array_equal(label, source.labels[example])
    host = batches.train_batches(config, source, None, 89)
    for step in (89, 90):  # over the end of an epoch
        np.testing.assert_array_equal(next(host)["index"], rows[step]["example"])
        np.testing.assert_array_equal(next(task.batches(step))["epoch"], rows[step]["epoch"])


@pytest.fixture(scope="module")
def on_one_device():
    return on_devices(1)


def on_devices(count):
    """The batch of so many devices, and the raw gradients of a step of it on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:count])
        views = views_of(digits_task()[2])
        patch.setattr(test_train, "views_batch", lambda **_: views)
        return views, step_on(count, config_of())


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_views_and_raw_gradients_do_not_depend_on_the_number_of_devices(devices, on_one_device):
    views, results = on_devices(devices)
    for name in views:
        np.testing.assert_array_equal(views[name], on_one_device[0][name])
    assert_trees_close(results, on_one_device[1], tolerance=1e-4)


def write_views(folder):
    np.savez(f"{folder}/{jax.process_index()}.npz", **views_of(digits_task()[2], step=3))


def test_two_processes_make_the_same_global_batch(tmp_path):
    script = "import sys, test_resident; from simclr_jax.process import group\n"
    script += "given = [kind(flag.partition('=')[2]) for kind, flag in zip((str, int, int), sys.argv[2:])]\n"
    script += "group.join(*given, timeout=60); test_resident.write_views(sys.argv[1]); group.announce_end()"
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), *flags], env=environment(2))
        for flags in join(2)
    ]
    assert [process.wait(timeout=200) for process in started] == [0, 0]
    halves = [np.load(tmp_path / f"{index}.npz") for index in (0, 1)]
    for name, rows in views_of(digits_task()[2], step=3).items():
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), rows)


@pytest.mark.journey
def test_a_run_goes_on_to_the_bit_and_one_of_the_host_does_not(tmp_path, capsys):
    settings = {"num_steps": 6, "log_every_steps": 1, "checkpoint_every_steps": 3, "augment.on_device": True}
    settings |= {"microbatches": 2, "remat": True}
    run_task("pretrain", tmp_path / "run", **settings, **ON_DEVICE)
    assert "views          made by the devices, of 0.3 MB of images there" in capsys.readouterr().out
    straight = checkpoint.load_params(tmp_path / "run")[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    with pytest.raises(UserError, match=r"the devices made.*set --config\.dataset\.on_device=True$"):
        run_task("pretrain", tmp_path / "run", **settings)
    run_task("pretrain", tmp_path / "run", **settings, **ON_DEVICE)
    resumed = checkpoint.load_params(tmp_path / "run")[0]
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


@pytest.mark.journey
def test_a_run_of_the_host_does_not_go_on_on_the_devices(tmp_path):
    settings = {"num_steps": 4, "checkpoint_every_steps": 2}
    run_task("pretrain", tmp_path, **settings)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    with pytest.raises(UserError, match=r"the host made.*set --config\.dataset\.on_device=False$"):
        run_task("pretrain", tmp_path, **settings, **ON_DEVICE)


@pytest.mark.journey
def test_arrays_lie_on_the_devices_too(tmp_path, capsys, monkeypatch):
    """And all evaluations read the images for their health once."""
    reads, eval_batches = [], pipeline.eval_batches

    def count(source, *, image_size, **options):
        reads.append(image_size)
        return eval_batches(source, image_size=image_size, **options)

    monkeypatch.setattr(pipeline, "eval_batches", count)
    images = np.random.default_rng(0).integers(0, 256, (32, 24, 20, 1), np.uint8)
    keys = TINY | ON_DEVICE | {"dataset.num_examples": 32, "num_steps": 2}
    simclr_jax.run(simclr_jax.get_config("digits", keys), tmp_path / "run", train=images)
    assert "of 0.0 MB of images there" in capsys.readouterr().out
    assert [size for size in reads if size] == [16]


def test_files_that_were_lost_are_replaced_as_on_the_host(tmp_path, capsys):
    write_folder(tmp_path, [f"{number}.png" for number in range(40)])
    config = folder_config(tmp_path, batch_size=16, **ON_DEVICE)
    source = datasets.load(config.dataset, "train", seed=0)
    lost = source.names[5]
    (tmp_path / lost).write_bytes(b"no image")
    images = resident.load(config, source, None)
    assert f"{lost} (" in capsys.readouterr().out
    assert [row for row in range(len(images)) if not images[row].any()] == [5]
    made, host = resident.batches(config, source, 0), batches.train_batches(config, source, None, 0)
    for _ in range(8):
        example = next(made)["example"]
        assert 5 not in example
        np.testing.assert_array_equal(example, next(host)["index"])


def test_images_of_several_sizes_are_refused_or_stay_on_the_host(tmp_path, monkeypatch):
    write_folder(tmp_path, [f"{number}.png" for number in range(40)])
    assert load_folder(tmp_path, **ON_DEVICE)[1].shape[1:] == (7, 9, 3)
    write_image(tmp_path / "20.png", size=(9, 8))
    with pytest.raises(UserError, match=r"7 x 9 and 8 x 9 pixels: set --config\.dataset\.on_device=False$"):
        load_folder(tmp_path, **ON_DEVICE)
    monkeypatch.setattr(resident, "device_memory", lambda: 1e9)
    assert load_folder(tmp_path)[1] is None


@pytest.mark.parametrize(
    "memory, image_size, expected", [(None, 16, False), (1e7, 16, True), (1e6, 16, False), (1e7, 3, False)]
)
def test_small_images_lie_on_accelerators_without_being_asked_for(memory, image_size, expected, monkeypatch):
    """The digits are 276 KB, of 8 pixels a side."""
    monkeypatch.setattr(resident, "device_memory", lambda: memory)
    config = tiny_config("pretrain", image_size=image_size)
    source = datasets.load(config.dataset, "train", seed=0)
    assert (resident.load(config, source, None) is not None) == expected
    assert resident.load(config, source, lambda image, seed: image) is None
    config.dataset.on_device = False
    assert resident.load(config, source, None) is None


@pytest.mark.parametrize("memory, room", [(None, 1_920), (1e6, 1_920), (5_000, 500)])
def test_evaluations_leave_memory_to_the_step(memory, room, monkeypatch):
    monkeypatch.setattr(resident, "device_memory", lambda: memory)
    assert resident.evaluation_room(np.zeros((20, 4, 4, 3), np.uint8)) == room


def test_what_cannot_lie_there_is_one_line(tmp_path, monkeypatch):
    config = tiny_config("pretrain", **ON_DEVICE)
    source = datasets.load(config.dataset, "train", seed=0)
    with pytest.raises(UserError, match=r"dataset.in_memory=False.*set --config\.dataset\.in_memory=True"):
        resident.load(config, source._replace(read=lambda ranges: None), None)
    monkeypatch.setattr(resident, "device_memory", lambda: 2**17)
    with pytest.raises(UserError, match=r"1,437 images of 8 x 8 pixels .*set --config\.dataset\.on_device=F"):
        resident.load(config, source, None)
    config = simclr_jax.get_config("digits", TINY | ON_DEVICE)
    with pytest.raises(UserError, match=r"a view with dataset\.on_device=True"):
        simclr_jax.run(config, tmp_path / "run", view=lambda image, seed: image)
    with pytest.raises(UserError, match="dataset.on_device"):
        simclr_jax.get_config("digits:linear_eval", ON_DEVICE | {"pretrained": "run"})
