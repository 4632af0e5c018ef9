"""`import simclr_jax`: configs, runs and encoders from Python, as from the command line."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import log_of
from PIL import Image

import simclr_jax
from simclr_jax.config import settings
from simclr_jax.data import augment, datasets
from simclr_jax.encoder import Encoder
from simclr_jax.process import stopping

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = {
    "batch_size": 16,
    "image_size": 16,
    "model.width": 0.125,
    "model.stem": "auto",
    "dataset.num_examples": 64,
    "evaluate.compare": False,
    "evaluate.pictures": False,
    "log_every_steps": 1,
    "warmup_epochs": 0.0,
}


def python(code, cwd, **environment):
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finished_config():
    return simclr_jax.get_config("digits", TINY | {"num_steps": 4})


def log_losses(workdir):
    return [line["loss"] for line in log_of(workdir)[1:]]


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, reports):
    """(workdir, summary) of a run of four steps."""
    workdir = tmp_path_factory.mktemp("api") / "run"
    return workdir, simclr_jax.run(
        finished_config(), workdir, on_report=lambda *report: reports.append(report)
    )


def test_importing_takes_no_time_and_no_jax(tmp_path):
    code = "import time; begun = time.monotonic(); import simclr_jax, sys; took = time.monotonic() - begun\n"
    code += "print(took, [name for name in ('jax', 'tensorflow', 'numpy') if name in sys.modules])"
    took, rest = python(code, tmp_path).split(" ", 1)
    assert float(took) < 0.5 and rest == "[]\n"


def test_configs_are_those_of_the_command_line():
    config = simclr_jax.get_config("digits:linear_eval", {"optimizer.learning_rate": 1, "seed": 3})
    expected = settings.defaults(str(ROOT / "configs" / "digits.py:linear_eval"))
    with expected.unlocked(), expected.optimizer.ignore_type():
        expected.seed, expected.optimizer.learning_rate = 3, 1
    assert config.to_dict() == expected.to_dict() and config.is_locked
    with pytest.raises(AttributeError, match="temperature"):
        simclr_jax.get_config("digits").temprature = 0.2


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs").glob("*.py")])
def test_every_shipped_config_is_found_by_its_name(name):
    if name in ("__init__", "base"):
        with pytest.raises(simclr_jax.UserError, match="expected one of cifar10, .*digits"):
            simclr_jax.get_config(name)
    elif name == "folder":
        assert simclr_jax.get_config(name, {"dataset.path": "/images"}).dataset.path == "/images"
    else:
        assert simclr_jax.get_config(name).task == "pretrain"


@pytest.mark.parametrize(
    "name, overrides, expected",
    [
        ("digts", {}, "did you mean 'digits'"),
        ("digits:knnn", {}, "task 'knnn' is unknown: expected one of pretrain"),
        ("digits", {"learning_rate": 1.0}, "did you mean config.optimizer.learning_rate"),
        ("digits", {"batch_size": "16"}, "batch_size='16': expected a whole number"),
        ("digits", {"model": {}}, "config.model is a section"),
        ("digits", {"temperature": -1.0}, "temperature=-1.0: set config.temperature to a number above 0"),
    ],
)
def test_what_is_wrong_with_a_config_is_one_line(name, overrides, expected):
    with pytest.raises(simclr_jax.UserError, match=expected) as raised:
        simclr_jax.get_config(name, overrides)
    assert "\n" not in str(raised.value)


def test_a_config_is_checked_again_when_it_runs(tmp_path):
    config = simclr_jax.get_config("digits", TINY)
    config.batch_size = 0
    with pytest.raises(simclr_jax.UserError, match="batch_size=0"):
        simclr_jax.run(config, tmp_path / "run")
    with pytest.raises(simclr_jax.UserError, match="the workdir 5: expected a folder"):
        simclr_jax.run(finished_config(), 5)
    config.task = "pretrian"
    with pytest.raises(simclr_jax.UserError, match="task 'pretrian' is unknown"):
        simclr_jax.run(config, tmp_path / "run", train=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(simclr_jax.UserError, match="expected that of get_config"):
        simclr_jax.run({"task": "pretrain"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_config_files_import_ours_whatever_else_is_called_configs(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("theirs = True")
    code = "import configs, simclr_jax; print(simclr_jax.get_config('digits').image_size, configs.theirs)\n"
    code += "import configs as again; print(again is configs)"
    assert python(code, tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") == "24 True\nTrue\n"
    code = "import simclr_jax; simclr_jax.get_config('digits'); import configs; print(configs.theirs)"
    assert python(code, tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") == "True\n"
    code = "from simclr_jax.config import settings; print(settings.load('configs/digits.py:knn').k)"
    assert python(code, tmp_path) == "20\n"


def test_a_run_returns_its_summary_and_reports(finished, reports):
    workdir, summary = finished
    assert summary == json.loads((workdir / "summary.json").read_text()) and summary["steps"] == 4
    assert [step for step, _ in reports] == [0, 1, 2, 3, 4]
    assert np.isnan(reports[0][1].pop("loss"))
    for (step, metrics), line in zip(reports, log_of(workdir)):
        assert line == {"step": step, **metrics}


def test_a_run_that_is_over_is_not_repeated(finished, reports):
    workdir, summary = finished
    config = finished_config()
    assert simclr_jax.run(config, str(workdir)) == summary and len(reports) == 5
    config.num_steps = 5
    with pytest.raises(simclr_jax.UserError, match="another config .num_steps is 4 there and 5 here"):
        simclr_jax.run(config, workdir)


def test_errors_name_keys_as_programs_set_them(finished, tmp_path):
    config = simclr_jax.get_config("folder", {"dataset.path": str(tmp_path / "none")})
    with pytest.raises(simclr_jax.UserError, match="set config.dataset.path=") as caught:
        simclr_jax.run(config, tmp_path / "run")
    assert "--" not in str(caught.value)


def test_a_task_takes_the_network_of_its_checkpoint(finished, tmp_path):
    workdir, _ = finished
    config = simclr_jax.get_config("digits:knn", {"pretrained": str(workdir), "k": 5, "batch_size": 16})
    assert config.model.width == 0.125 and config.image_size == 16
    assert simclr_jax.run(config, tmp_path / "knn")["examples"] == 360
    config = simclr_jax.get_config("digits:knn")
    config.pretrained = str(workdir)
    with pytest.raises(simclr_jax.UserError, match=r"model.width=0.75, model.* does not fit"):
        simclr_jax.run(config, tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.journey)])
def test_a_stop_loses_nothing_and_the_same_call_goes_on(tmp_path, number):
    config = simclr_jax.get_config("digits", TINY | {"num_steps": 12})
    before = signal.getsignal(number)

    def stop(step, metrics):
        if step == 3:
            os.kill(os.getpid(), number)

    assert simclr_jax.run(config, tmp_path / "run", on_report=stop) is None
    assert signal.getsignal(number) is before and not (tmp_path / "run" / "summary.json").exists()
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 3 <= saved < 12
    steps = []
    assert simclr_jax.run(config, tmp_path / "run", on_report=lambda step, _: steps.append(step))
    assert steps == list(range(saved + 1, 13))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_first_step_returns_as_well(tmp_path, monkeypatch, number):
    before = signal.getsignal(number)

    def stop(*arguments, **options):
        os.kill(os.getpid(), number)
        time.sleep(stopping.PATIENCE + 1)  # by then a command would have ended its process
        raise AssertionError("the signal did not stop it")

    monkeypatch.setattr(datasets, "load", stop)
    assert simclr_jax.run(finished_config(), tmp_path / "run") is None
    assert not list(tmp_path.rglob("checkpoints")) and not list(tmp_path.rglob("lock.json"))
    assert signal.getsignal(number) is before


def test_an_impatient_second_stop_leaves_no_lock(tmp_path):
    config = simclr_jax.get_config("digits", TINY | {"num_steps": 12})

    def stop(step, metrics):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    assert simclr_jax.run(config, tmp_path / "run", on_report=stop) is None
    assert not (tmp_path / "run" / "lock.json").exists()


@pytest.mark.parametrize(
    "error", [ConnectionError("the logger is away"), ValueError("error writing: the logger is away")]
)
def test_what_a_callback_raises_is_the_callers_own(tmp_path, error):
    def fail(step, metrics):
        raise error

    with pytest.raises(type(error)) as raised:
        simclr_jax.run(finished_config(), tmp_path / "run", on_report=fail)
    assert raised.value is error
    assert not (tmp_path / "run" / "lock.json").exists()


def test_a_run_of_an_older_version_goes_on(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    saved = json.loads((run / "config.json").read_text())
    del saved["dataset"]["max_pixels"], saved["schema_version"]
    (run / "config.json").write_text(json.dumps(saved))
    assert simclr_jax.run(finished_config(), run) == finished[1]


@pytest.mark.journey
def test_arrays_are_learnt_from_as_the_same_dataset_is(finished, tmp_path):
    splits = {name: datasets.load(finished_config().dataset, name, seed=0) for name in ("train", "eval")}
    train, held_out = ((np.asarray(split.records), split.labels) for split in splits.values())
    config = finished_config()
    summary = simclr_jax.run(config, tmp_path / "run", train=train, held_out=held_out)
    assert log_losses(tmp_path / "run") == log_losses(finished[0])
    assert summary["trained"] == finished[1]["trained"]
    grey = (train[0][..., :1], train[1])
    assert simclr_jax.run(config, tmp_path / "grey", train=grey, held_out=held_out)["steps"] == 4
    assert log_losses(tmp_path / "grey") == log_losses(finished[0])
    with pytest.raises(simclr_jax.UserError, match="another config .dataset.path is"):
        simclr_jax.run(config, tmp_path / "run", train=train[0], held_out=held_out)
    config.dataset.name = "arrays"
    with pytest.raises(simclr_jax.UserError, match="are examples in memory: give them, as in simclr_jax.run"):
        simclr_jax.run(config, tmp_path / "other")


@pytest.mark.journey
def test_arrays_need_no_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (32, 20, 24, 3), np.uint8)
    config = simclr_jax.get_config("folder", TINY | {"num_steps": 1, "dataset.num_examples": None})
    summary = simclr_jax.run(config, tmp_path / "run", train=images)
    assert summary["steps"] == 1 and "trained" not in summary and "health" in summary


@pytest.mark.parametrize(
    "train, expected",
    [
        (np.zeros((2, 8, 8, 3)), "train images are float64 of shape .2, 8, 8, 3.: expected uint8"),
        (np.zeros((2, 8, 8), np.uint8), "train images are uint8 of shape .2, 8, 8.: expected"),
        ([np.zeros((2, 8, 8, 3)), np.zeros((1, 2))] * 2, "train: expected one array of images, or a pair"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0, 2**31]), "expected 2 whole numbers from 0"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0]), "expected 2 whole numbers from 0"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0, -2]), "expected 2 whole numbers from 0"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0.0, 1.0]), "expected 2 whole numbers from 0"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, train, expected):
    with pytest.raises(simclr_jax.UserError, match=expected):
        simclr_jax.run(finished_config(), tmp_path / "run", train=train)
    assert not (tmp_path / "run").exists()


def test_an_encoder_gives_what_embed_writes(finished, tmp_path):
    workdir, _ = finished
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (size, 20, 3), np.uint8) for size in (16, 20, 31)]
    for index, image in enumerate(images):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    overrides = {"pretrained": str(workdir), "dataset.path": str(tmp_path / "images"), "batch_size": 8}
    config = simclr_jax.get_config("folder:embed", overrides | {"splits": "train+eval"})
    simclr_jax.run(config, tmp_path / "embed")
    rows = np.load(tmp_path / "embed" / "embeddings.npz")
    order = [int(Path(name).stem) for name in rows["name"].tolist()]
    features = simclr_jax.load(workdir)(images)
    np.testing.assert_allclose(features[order], rows["features"], rtol=1e-4, atol=1e-5)
    grey = rng.random((5, 16, 16, 1))
    encoder = simclr_jax.load(str(workdir / "checkpoints" / "4"))
    outputs = encoder.model.apply(encoder.variables, np.repeat(grey, 3, axis=-1).astype(np.float32))
    np.testing.assert_allclose(encoder(grey, batch_size=2), outputs["features"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder.projection(grey), outputs["projection"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        encoder.predict(list(grey)), jax.nn.softmax(outputs["logits"]), rtol=1e-4, atol=1e-5
    )
    assert encoder.class_names == tuple("0123456789") and encoder.config.model.width == 0.125
    assert encoder(images[:0]).shape == (0, 32)


def test_an_encoder_takes_eight_bits_and_floats_alike(finished):
    encoder = simclr_jax.load(finished[0])
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    whole, floats = encoder(images), encoder(images / 255)
    np.testing.assert_allclose(whole, floats, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole, encoder([images[0], images[1] / 255, images[2]]), rtol=1e-4, atol=1e-5)
    large = np.random.default_rng(0).integers(0, 256, (1, 40, 30, 3), np.uint8)
    view = augment.eval_view(large[0], 16).numpy()
    np.testing.assert_allclose(encoder(large / 255), encoder(view[None]), atol=1e-2)
    np.testing.assert_allclose(encoder(large / 255), encoder(large), atol=1e-5)


def test_an_encoder_of_the_training_size_needs_no_tensorflow(finished, tmp_path):
    code = "import sys; sys.modules['tensorflow'] = None\nimport numpy as np, simclr_jax\n"
    code += f"encoder = simclr_jax.load({str(finished[0])!r})\n"
    code += "print(encoder(np.zeros((2, 16, 16, 3), np.uint8)).shape)\n"
    code += "try:\n    encoder(np.zeros((2, 9, 9, 3), np.uint8))\n"
    code += "except simclr_jax.UserError as error:\n    print(error)"
    shape, line = python(code, tmp_path).splitlines()
    assert shape == "(2, 32)" and "9 x 9 pixels has to be scaled to 16 x 16, which needs TensorFlow" in line


class Cut(Image.Image):
    """An image of Pillow whose file is cut off."""

    def getexif(self):
        raise OSError("broken")


@pytest.mark.parametrize(
    "images, expected",
    [
        (np.zeros((2, 16, 16, 5), np.uint8), r"shape \(16, 16, 5\): expected \[h, w, c\], where c is 1"),
        (np.zeros((16, 16, 3), np.uint8), r"may be one image: write encoder\(images\[None\]\)"),
        (np.zeros((3, 16, 16), np.uint8), r"may be one image"),
        (np.zeros((16, 16), np.uint8), r"may be one image"),
        ("a.png", r"not one alone: write a list, as in encoder\(\[image\]\)"),
        (Image.new("L", (16, 16)), "not one alone"),
        (["missing.png"], "missing.png cannot be decoded: it is no file"),
        ([__file__], "test_api.py cannot be decoded: "),
        ([Image.new("F", (16, 16))], "mode F: give an array of floats"),
        ([Cut()], r"images\[0\] cannot be decoded: broken"),
        ([np.zeros(16, np.uint8)], r"images\[0\] has the shape \(16,\)"),
        (np.full((1, 16, 16, 3), 3.0), "values from 3 to 3"),
        (np.full((1, 16, 16, 3), np.nan), "values from nan to nan"),
        (np.zeros((1, 16, 16, 3), np.uint16), "is of uint16: expected uint8"),
    ],
)
def test_images_of_another_kind_are_refused(finished, images, expected):
    with pytest.raises(simclr_jax.UserError, match=expected):
        simclr_jax.load(finished[0])(images)


def test_an_encoder_takes_images_as_programs_have_them(finished, tmp_path):
    encoder = simclr_jax.load(finished[0])
    rng = np.random.default_rng(0)
    grey, colours = rng.integers(0, 256, (16, 16), np.uint8), rng.integers(0, 256, (16, 16, 3), np.uint8)
    alpha = np.dstack([colours, np.full((16, 16), 51, np.uint8)])
    deep = np.repeat(np.repeat(rng.integers(0, 2**16, (4, 4), np.uint16), 4, 0), 4, 1)
    expected = encoder(np.stack([np.dstack([grey] * 3), colours]))
    on_white = encoder((0.2 * colours[None] + 0.8 * 255).round().astype(np.uint8))
    Image.fromarray(colours).save(tmp_path / "colours.png")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.fromarray(np.rot90(colours))
    turned.getexif()[0x0112] = 6
    alike = [
        (expected, [grey, colours]),
        (expected, [grey[..., None], np.moveaxis(colours, -1, 0)]),
        (expected, [Image.fromarray(grey), Image.fromarray(colours)]),
        (expected, (image for image in (grey, colours))),
        (expected[1:], [tmp_path / "colours.png"]),
        (expected[1:], [str(tmp_path / "colours.png")]),
        (expected[1:], [turned]),
        (expected[[0, 0]], np.stack([grey, grey])),
        (expected[:1], [Image.fromarray(grey).convert("P")]),
        (on_white, [alpha]),
        (on_white, alpha[None]),
        (on_white, [Image.fromarray(alpha)]),
        (encoder([tmp_path / "deep.png"]), [Image.open(tmp_path / "deep.png")]),
        (encoder([tmp_path / "deep.png"]), [(deep >> 8).astype(np.uint8)]),
    ]
    for features, images in alike:
        np.testing.assert_allclose(encoder(images), features, rtol=1e-4, atol=1e-4)


class Tensor:
    """A tensor as PyTorch has it, as far as `images` looks."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        return Tensor(self.values[rows])

    def detach(self):
        return self

    def cpu(self):
        return self.values


def test_channels_of_tensors_come_first_or_last(finished):
    encoder = simclr_jax.load(finished[0])
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for values in (images, np.moveaxis(images, -1, 1)):
        np.testing.assert_allclose(encoder(Tensor(values)), encoder(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(simclr_jax.UserError, match=r"may come first or last: write .*permute\(0, 2, 3, 1\)"):
        encoder(Tensor(images[:, :3]))


def test_an_encoder_can_be_pickled_and_says_what_it_is(finished, finetuned_run):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for run, classes in ((finished[0], ""), (finetuned_run, "10 classes")):
        encoder = simclr_jax.load(run)
        again = pickle.loads(pickle.dumps(encoder))
        np.testing.assert_array_equal(again(images), encoder(images))
        assert f"{run}: ResNet-8 0.125x, images of 16 pixels" in repr(again) and classes in repr(again)


def test_an_encoder_scales_images_inside_of_a_graph(finished, tmp_path):
    code = "import numpy as np, simclr_jax, tensorflow as tf\n"
    code += f"encoder = simclr_jax.load({str(finished[0])!r})\n"
    code += "with tf.Graph().as_default():\n    print(encoder(np.zeros((2, 9, 9, 3), np.uint8)).shape)\n"
    code += "tf.compat.v1.disable_eager_execution()\n"
    code += "print(encoder(np.zeros((2, 9, 9, 3), np.uint8)).shape)"
    assert python(code, tmp_path).splitlines() == ["(2, 32)"] * 2


@pytest.mark.parametrize("settings", [{}, {"TF_USE_LEGACY_KERAS": "0"}])
def test_images_need_no_keras_and_programs_find_theirs(settings, tmp_path, monkeypatch):
    monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)
    code = "import os, sys, simclr_jax.data.datasets\n"
    code += "print('keras' in sys.modules, os.environ.get('TF_USE_LEGACY_KERAS'))\n"
    code += "import tensorflow as tf; print(tf.keras.__name__)"
    expected = "True 0" if settings else "False None"
    assert python(code, tmp_path, **settings) == f"{expected}\nkeras._tf_keras.keras\n"


def test_tensorflow_that_holds_a_gpu_is_no_error(tmp_path):
    code = "import tensorflow as tf\ndef fail(*_): raise RuntimeError('initialized')\n"
    code += "tf.config.set_visible_devices = fail\nimport simclr_jax.data"
    assert "note: the program has used TensorFlow with a GPU before" in python(code, tmp_path)


def test_an_encoder_says_what_was_not_kept(finished, finetuned_run, tmp_path):
    with pytest.raises(simclr_jax.UserError, match="has no projection head"):
        simclr_jax.load(finetuned_run).projection(np.zeros((1, 16, 16, 3)))
    whole = simclr_jax.load(finished[0])
    model = whole.model.clone(supervised_head=None)
    meta = {"config": whole.config.to_dict()}
    with pytest.raises(simclr_jax.UserError, match="RUN has no classifier: give a linear_eval"):
        Encoder("RUN", model, whole.variables, meta).predict(np.zeros((1, 16, 16, 3)))
    with pytest.raises(simclr_jax.UserError, match="holds no checkpoint"):
        simclr_jax.load(tmp_path)
