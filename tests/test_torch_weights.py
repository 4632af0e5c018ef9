"""Encoders that others trained: recognised, read exactly, refused in one line, and given back."""

import collections
import datetime
import decimal
import enum
import functools
import hashlib
import importlib
import json
import os
import pathlib
import pickle
import runpy
import shutil
import subprocess
import sys
import timeit
import types
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from safetensors.numpy import load_file, save_file

import simclr_jax
from simclr_jax import checkpoint, pretrained, torch_weights
from simclr_jax.export import __main__ as export
from simclr_jax.models import make_model
from simclr_jax.process.errors import UserError
from simclr_jax.torch_weights.names import to_torch
from simclr_jax.torch_weights.sources import MEAN, STD

SIZE = 40


def network(depth=18, **changes):
    """A small ResNet as torchvision has it: the model, and its variables, none of which is zero or one."""
    config = tiny_config("pretrain").model
    config.update(depth=depth, stem="imagenet", projection_layers=0)
    config.update(max_pool="torch", project_first=depth >= 50)
    config.update(input_mean=MEAN, input_std=STD, **changes)
    model = make_model(config, 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    random = np.random.default_rng(depth)
    return model, jax.tree.map(
        lambda leaf: random.uniform(-0.3, 1, leaf.shape).astype("f") ** 2 + 0.1, shapes
    )


def under(prefix, tensors=None, scale=1.0):
    tensors = ENCODER if tensors is None else tensors
    return {
        prefix + name: np.asarray(value * np.float32(scale), value.dtype) for name, value in tensors.items()
    }


MODEL, VARIABLES = network()
TENSORS = to_torch(VARIABLES)
ENCODER = {name: value for name, value in TENSORS.items() if not name.startswith("fc.")}
PLACES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
BY_PLACE = {
    name.replace(part := name.split(".")[0], PLACES[part], 1): value for name, value in ENCODER.items()
}
HEAD = {"0.weight": np.ones((8, 64), "f"), "0.bias": np.ones(8, "f")}
QUEUE = {"module.queue": np.ones((8, 16), "f"), "module.queue_ptr": np.zeros(1, np.int64)}
MOCO_V1 = ENCODER | {"fc.weight": np.ones((5, 64), "f"), "fc.bias": np.ones(5, "f")}
PROTOTYPES = {"module.prototypes.weight": np.ones((9, 8), "f")}

# Layouts of published files: their parts, who they are told to be by, which of several networks is read, its
# classes, and the parts that are left behind.
LAYOUTS = {
    "torchvision": ([TENSORS], "torchvision", "", 10, []),
    "an encoder alone": ([ENCODER], "torchvision", "", 0, []),
    "DataParallel": ([under("module.", TENSORS)], "torchvision", "", 10, []),
    "linear classification": ([under("state_dict.module.", TENSORS)], "torchvision", "", 10, []),
    "MoCo v1": (
        [under("state_dict.module.encoder_q.", MOCO_V1), under("state_dict.module.encoder_k.", scale=2),
         under("state_dict.", QUEUE)],
        "MoCo v1 or v2", "state_dict.module.encoder_q", 0, ["encoder_k", "fc", "queue", "queue_ptr"],
    ),
    "MoCo v2": (
        [under("module.encoder_q."), under("module.encoder_q.fc.", HEAD),
         under("module.encoder_k.", scale=2)],
        "MoCo v1 or v2", "module.encoder_q", 0, ["encoder_k", "fc"],
    ),
    "MoCo v3": (
        [under("module.base_encoder."), under("module.base_encoder.fc.", HEAD),
         under("module.momentum_encoder.", scale=2), under("module.predictor.", HEAD)],
        "MoCo v3", "module.base_encoder", 0, ["fc", "momentum_encoder", "predictor"],
    ),
    "SwAV": (
        [under("module."), under("module.projection_head.", HEAD), PROTOTYPES],
        "SwAV", "", 0, ["projection_head", "prototypes"],
    ),
    "DINO": (
        [under("teacher.backbone."), under("student.module.backbone.", scale=2),
         under("teacher.head.", HEAD)],
        "DINO", "teacher.backbone", 0, ["head", "student"],
    ),
    "Barlow Twins": (
        [under("model.module.backbone."), under("model.module.projector.", HEAD)],
        "VICReg, Barlow Twins", "", 0, ["projector"],
    ),
    "lightly": (
        [under("state_dict.backbone.", BY_PLACE), under("state_dict.projection_head.layers.", HEAD)],
        "lightly", "", 0, ["projection_head"],
    ),
    "solo-learn": (
        [under("backbone."), under("momentum_backbone.", scale=2), under("projector.", HEAD)],
        "solo-learn", "backbone", 0, ["momentum_backbone", "projector"],
    ),
    "an average of weights": (
        [under("state_dict_ema.", TENSORS), under("state_dict.", TENSORS, scale=2)],
        "torchvision", "state_dict_ema", 10, ["state_dict"],
    ),
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(tensors, name="weights.safetensors", **metadata):
        save_file(tensors, tmp_path / name, metadata=metadata or None)
        return tmp_path / name

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read(layout, write, capsys):
    parts, by, which, classes, left = LAYOUTS[layout]
    path = write({name: value for part in parts for name, value in part.items()})
    variables, meta = torch_weights.read(path)
    source, model = meta["source"], meta["config"]["model"]
    assert by in source["by"] and meta["num_classes"] == classes and source["left"] == left
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    encoder = {name: {"encoder": tree["encoder"]} for name, tree in VARIABLES.items()}
    jax.tree.map(np.testing.assert_array_equal, variables, VARIABLES if classes else encoder)
    assert (model["depth"], model["width"], model["stem"]) == (18, 0.125, "imagenet")
    assert (model["max_pool"], model["project_first"], model["input_mean"]) == ("torch", False, MEAN)
    assert model["input_std"] == ((0.228, 0.224, 0.225) if layout == "SwAV" else STD)
    printed = capsys.readouterr().out
    assert f"ResNet-18 0.125x of {source['by']}" in printed
    assert f"it is {which}" in printed if which else "it is" not in printed


OF_OTHER_SHAPES = [(34, {}), (50, {}), (50, {"bottleneck_width": 2.0}), (18, {"stem": "cifar"})]


@pytest.mark.parametrize("depth, changes", OF_OTHER_SHAPES)
def test_networks_are_told_from_shapes(depth, changes, write):
    model, variables = network(depth, **changes)
    read, loaded, _ = pretrained.load_model(write(to_torch(variables)), dtype="float32")
    images = np.random.default_rng(0).random((2, SIZE, SIZE, 3), np.float32)
    assert read.encoder.bottleneck_width == changes.get("bottleneck_width", 1)
    expected, actual = (
        jax.jit(network.apply)(tree, images) for network, tree in ((model, variables), (read, loaded))
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_images_are_normalised_before_they_are_padded():
    plain = MODEL.clone(input_mean=None, input_std=None)
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    normalised = (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    apply = jax.jit(plain.apply)
    inside, before = jax.jit(MODEL.apply)(VARIABLES, images), apply(VARIABLES, normalised)
    np.testing.assert_allclose(inside["features"], before["features"], rtol=1e-5)
    assert np.abs(inside["features"] - apply(VARIABLES, images)["features"]).max() > 1e-3


@pytest.mark.parametrize("size", [32, 34])
def test_max_pool_of_torch_pads_all_sides(size):
    images = np.random.default_rng(0).random((1, size, size, 3), np.float32)
    stages = jax.jit(MODEL.apply)(VARIABLES, images)
    bn, statistics = (VARIABLES[tree]["encoder"]["bn1"] for tree in ("params", "batch_stats"))
    x = (stages["initial_conv"][0] - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    x = np.pad(np.maximum(x * bn["scale"] + bn["bias"], 0), ((1, 1), (1, 1), (0, 0)))  # no less than nothing
    sides = [slice(2 * i, 2 * i + 3) for i in range(-(size // -4))]
    expected = [[x[row, column].max((0, 1)) for column in sides] for row in sides]
    np.testing.assert_allclose(stages["initial_max_pool"][0], expected, rtol=1e-4, atol=1e-5)


def without(name):
    return {other: value for other, value in TENSORS.items() if other != name}


def with_(name, value):
    return TENSORS | {name: np.ones(value, "f") if isinstance(value, tuple) else value}


def ones(**shapes):
    return {name.replace("_", "."): np.ones(shape, "f") for name, shape in shapes.items()}


DEEPER = {
    name.replace("layer4.1", "layer4.2"): value for name, value in TENSORS.items() if "layer4.1" in name
}
GROUPED = ones(
    conv1_weight=(8, 3, 7, 7), layer1_0_conv1_weight=(16, 8, 1, 1), layer1_0_conv3_weight=(32, 16, 1, 1)
)
FOREIGN = {
    "missing": (
        without("layer2.0.bn1.running_var"),
        "from ResNet-18 0.125x.*missing layer2.0.bn1.running_var",
    ),
    "unknown": (with_("layer1.0.conv9.weight", (3, 3)), "unknown layer1.0.conv9.weight"),
    "shape": (
        with_("layer1.1.conv2.weight", (8, 4, 3, 3)),
        r"layer1.1.conv2.weight \(8, 4, 3, 3\) instead of",
    ),
    "NaN": (with_("bn1.bias", np.full(8, np.nan, "f")), "bn1.bias are not finite"),
    "grey": (with_("conv1.weight", (8, 1, 7, 7)), r"conv1.weight has the shape \(8, 1, 7, 7\)"),
    "stem": (with_("conv1.weight", (8, 3, 5, 5)), r"conv1.weight has the shape \(8, 3, 5, 5\)"),
    "blocks": (TENSORS | DEEPER, r"2 \+ 2 \+ 2 \+ 3 basic blocks, which is no ResNet-8, 10, 18"),
    "two": (under("left.") | under("right."), "several networks, 'left.', 'right.'"),
    "ResNeXt": (GROUPED | ones(layer1_0_conv2_weight=(16, 4, 3, 3)), "a ResNeXt"),
    "ResNet-D": (ones(conv1_0_weight=1, conv1_3_weight=1, layer1_0_conv1_weight=1), "a ResNet-D"),
    "squeeze": (with_("layer1.0.se.fc1.weight", (1, 8, 1, 1)), "squeeze and excitation"),
    "antialiased": (with_("layer2.0.conv2.1.filt", (1, 1, 3, 3)), "antialiasing"),
    "ViT": (
        {"cls_token": np.ones(1, "f")} | ones(blocks_0_attn_qkv_weight=1),
        "such as a Vision Transformer",
    ),
    "ConvNeXt": (ones(stem_0_weight=1, stages_0_blocks_0_gamma=1), "a ConvNeXt"),
    "Hugging Face": (ones(resnet_embedder_embedder_convolution_weight=1), "take timm's file"),
    "VGG": (ones(features_0_weight=1, classifier_0_weight=1), "a VGG"),
    "anything": (ones(a=1), r"no ResNet of torchvision \(a\): give a ResNet-18 to 152"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_such_network_is_refused_by_name(kind, write):
    tensors, message = FOREIGN[kind]
    with pytest.raises(UserError, match=message) as caught:
        torch_weights.read(write(tensors))
    assert "\n" not in str(caught.value)


WHOLE = b"".join([(2).to_bytes(8, "little"), b"{}"])
DAMAGED = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "cut": lambda data: data[: len(data) // 2],
    "no header": lambda data: data[100:],
    "huge header": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "nothing in it": WHOLE,
    "HTML": b"<!doctype html><title>404</title>",
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_damaged_files_are_one_line(kind, name, write, tmp_path):
    if name.endswith(".pth"):
        pytest.importorskip("torch")
    data = DAMAGED[kind]
    path = tmp_path / name
    path.write_bytes(data(write(TENSORS, "whole.safetensors").read_bytes()) if callable(data) else data)
    with pytest.raises(UserError, match="is damaged|no ResNet of torchvision") as caught:
        torch_weights.read(path)
    assert "\n" not in str(caught.value)


def test_antialiased_networks_are_told_by_their_names(write, tmp_path):
    """Their tensors are those of networks without."""
    with pytest.raises(UserError, match="resnetblur18.safetensors holds .*antialiasing.*, by its name"):
        torch_weights.read(write(TENSORS, "resnetblur18.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(OF_TIMM | {"architecture": "resnetaa50"}))
    with pytest.raises(UserError, match="antialiasing"):
        torch_weights.read(write(TENSORS))


OF_TIMM = {
    "architecture": "resnet18",
    "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.3, 0.4], "input_size": [3, 160, 160]},
}


def test_what_timm_says_beside_a_file_holds(write, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OF_TIMM))
    _, meta = torch_weights.read(write(TENSORS))
    model = meta["config"]["model"]
    assert (model["input_mean"], model["input_std"]) == ((0.5, 0.5, 0.5), (0.2, 0.3, 0.4))
    assert meta["config"]["image_size"] == 160 and meta["source"]["by"] == "timm"


class Calls:
    """Is pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("with_torch", [True, False])
def test_nothing_in_a_file_is_executed(with_torch, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch") if with_torch else None
    content = {"state_dict": Calls(os.mkdir, str(tmp_path / "made"))}
    if with_torch:
        torch.save(content, tmp_path / "evil.pth")
    else:
        monkeypatch.setitem(sys.modules, "torch", None)
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="posix.mkdir|pip install torch, or make it a safetensors"):
        torch_weights.read(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


class Colour(enum.Enum):
    RED = 1


class Own:
    def __init__(self):
        self.value = 3


BESIDE = {
    "a scalar of NumPy": np.float64(0.5),
    "an array": np.arange(3.0),
    "an array of objects": np.array([{"a": 1}, None], object),
    "a dtype": np.dtype("float32"),
    "a random state": np.random.RandomState(0),
    "a generator": np.random.default_rng(0),
    "a state of NumPy": np.random.get_state(),
    "a path": pathlib.Path("runs/1"),
    "a date": datetime.datetime(2026, 11, 29, tzinfo=datetime.UTC),
    "a duration": datetime.timedelta(3),
    "a defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "a counter": collections.Counter("aab"),
    "a deque": collections.deque([1, 2]),
    "a set": {1, 2},
    "a complex number": 1 + 2j,
    "a decimal": decimal.Decimal("0.1"),
    "an enum": Colour.RED,
    "an object of its own": Own(),
    "a namespace": types.SimpleNamespace(lr=0.1),
    "an identifier": uuid.UUID(int=3),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_data_beside_the_tensors_is_skipped(protocol, zipped, tmp_path, write):
    torch = pytest.importorskip("torch")
    tensors = collections.OrderedDict((name, torch.from_numpy(value)) for name, value in ENCODER.items())
    tensors._metadata = {"version": 1}  # as of Module.state_dict
    parameters = {
        name: torch.nn.Parameter(value) for name, value in tensors.items() if value.is_floating_point()
    }
    expected, _ = torch_weights.read(write(ENCODER))
    for state in (tensors, tensors | parameters):
        content = BESIDE | {"state_dict": state, "dtype": torch.float16, "rng": torch.get_rng_state()}
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        torch.save(content, tmp_path / "run.pth", **options)
        variables, _ = torch_weights.read(tmp_path / "run.pth")
        jax.tree.map(np.testing.assert_array_equal, variables, expected)


REFUSED = {
    "eval": Calls(eval, "1 + 1"),
    "system": Calls(os.system, "true"),
    "Popen": Calls(subprocess.Popen, ["true"]),
    "import": Calls(importlib.import_module, "this"),
    "run": Calls(runpy.run_path, "x.py"),
    "partial": Calls(functools.partial, print),
    "loads": Calls(pickle.loads, b""),
    "rmtree": Calls(shutil.rmtree, "/nowhere"),
    "timeit": Calls(timeit.timeit, "1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_act_are_refused(name, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {}, "other": REFUSED[name]}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could execute anything") as caught:
        torch_weights.read(tmp_path / "evil.pth")
    assert "\n" not in str(caught.value)


def test_programs_and_whole_models_are_refused_in_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.save(model, tmp_path / "model.pth")
    with pytest.raises(UserError, match="holds no tensors, but Sequential: give a state_dict"):
        torch_weights.read(tmp_path / "model.pth")
    torch.jit.script(model).save(tmp_path / "program.pt")
    with pytest.raises(UserError, match="a program of TorchScript, which could execute anything"):
        torch_weights.read(tmp_path / "program.pt")


def test_files_of_pytorch_are_read_as_safetensors_are(tmp_path, write):
    torch = pytest.importorskip("torch")
    import argparse

    nested = {
        "student": {},
        "teacher": {f"backbone.{name}": torch.from_numpy(value) for name, value in ENCODER.items()},
    }
    torch.save(nested | {"epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "dino.pth")
    from_torch, meta = torch_weights.read(tmp_path / "dino.pth")
    from_safetensors, _ = torch_weights.read(write(ENCODER))
    jax.tree.map(np.testing.assert_array_equal, from_torch, from_safetensors)
    assert meta["source"]["network"] == "teacher.backbone"


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2"])
def test_features_are_those_of_torchvision(name, tmp_path):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    network = getattr(models, name)().eval()
    for buffer, value in network.named_buffers():
        if buffer.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = simclr_jax.load(tmp_path / "weights.pth")
    for size in (64, 65):
        images = np.random.default_rng(size).random((2, size, size, 3), np.float32)
        normalised = torch.from_numpy((images - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = network(normalised).numpy()
        own_logits = np.asarray(jax.jit(encoder.model.apply)(encoder.variables, images)["logits"])
        assert np.abs(own_logits - logits).max() <= 1e-4 * np.abs(logits).max()
    again = tmp_path / "again"
    export.main([str(tmp_path / "weights.pth"), "--format=safetensors", f"--output={again}"])
    network.load_state_dict(
        {k: torch.from_numpy(v) for k, v in load_file(again / "model.safetensors").items()}
    )


def test_export_gives_back_the_same_names_and_bits(write, tmp_path):
    path = write(TENSORS)
    export.main([str(path), "--format=safetensors", f"--output={tmp_path / 'back'}"])
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == TENSORS.keys()
    assert all(
        back[name].tobytes() == value.tobytes() and back[name].dtype == value.dtype
        for name, value in TENSORS.items()
    )
    card = (tmp_path / "back" / "README.md").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card and "weights.safetensors" in card
    assert "\n# ResNet-18 0.125x\n" in card and "SimCLR" not in card  # which did not train it
    assert str(list(MEAN))[1:-1] in card and "MaxPool2d" not in card and "downsample" not in card


def test_an_export_of_ours_comes_back_as_it_was(pretrained_run, tmp_path):
    export.main([str(pretrained_run), "--format=safetensors", f"--output={tmp_path / 'out'}"])
    model, variables, meta = pretrained.load_model(tmp_path / "out" / "model.safetensors", dtype="float32")
    before, variables_before, _ = pretrained.load_model(pretrained_run, dtype="float32")
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    actual, expected = (
        jax.jit(network.apply)(tree, images)
        for network, tree in ((model, variables), (before, variables_before))
    )
    np.testing.assert_array_equal(actual["features"], expected["features"])
    assert meta["config"]["image_size"] == 16 and meta["source"]["by"] == "simclr-jax"


def test_bfloat16_is_read(tmp_path):
    from safetensors.flax import save_file as save_jax

    save_jax(
        {name: jnp.asarray(value, jnp.bfloat16) for name, value in ENCODER.items()},
        tmp_path / "w.safetensors",
    )
    variables, _ = torch_weights.read(tmp_path / "w.safetensors")
    kernel = variables["params"]["encoder"]["conv1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(
        kernel, VARIABLES["params"]["encoder"]["conv1"]["kernel"].astype(jnp.bfloat16)
    )


@pytest.mark.slow
class TestTasks:
    @pytest.fixture(scope="class")
    def file(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
        save_file(TENSORS, path)
        return path

    def config(self, task, file, **changes):
        base = {"batch_size": 64, "image_size": 16, "pretrained": str(file)}
        return simclr_jax.get_config(f"digits:{task}" if task != "pretrain" else "digits", base | changes)

    def test_the_model_comes_with_the_weights(self, file, capsys):
        config = self.config("knn", file)
        model = config.model
        assert (model.depth, model.width, model.max_pool, model.project_first) == (18, 0.125, "torch", False)
        assert (model.input_mean, model.input_std) == (MEAN, STD)
        printed = capsys.readouterr().out
        assert "model.max_pool=torch, model.input_mean=(0.485, 0.456, 0.406)" in printed
        own = {"model.input_mean": None, "model.input_std": None, "model.max_pool": "tensorflow"}
        overridden = self.config("knn", file, **own)
        assert overridden.model.input_mean is None and overridden.model.max_pool == "tensorflow"
        with pytest.raises(
            UserError, match="model.depth=50 does not fit .*: leave it out, or set .*depth=18"
        ):
            self.config("knn", file, **{"model.depth": 50})

    @pytest.mark.journey
    def test_pretraining_goes_on_from_them_with_a_head_of_its_own(self, file, tmp_path, capsys):
        small = {
            "num_steps": 2,
            "evaluate.compare": False,
            "evaluate.pictures": False,
            "evaluate.max_examples": 64,
        }
        config = self.config("pretrain", file, **small, **{"optimizer.learning_rate": 1e-6})
        simclr_jax.run(config, tmp_path / "run")
        assert "has no projection head: a new one is trained" in capsys.readouterr().out
        variables, meta = checkpoint.load_params(tmp_path / "run")
        assert meta["source"]["file"] == "weights.safetensors"
        start = VARIABLES["params"]["encoder"]["conv1"]["kernel"]
        np.testing.assert_allclose(variables["params"]["encoder"]["conv1"]["kernel"], start, atol=1e-4)
        assert "projection_head" in variables["params"]
        # A run that starts from there knows where it came from, and so does its card.
        evaluated = self.config("linear_eval", tmp_path / "run", num_steps=2)
        simclr_jax.run(evaluated, tmp_path / "linear")
        export.main([str(tmp_path / "linear"), "--format=safetensors"])
        card = (tmp_path / "linear" / "export" / "safetensors" / "README.md").read_text()
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card

    @pytest.mark.parametrize("task", ["knn", "transfer", "embed", "finetune", "distill"])
    def test_every_task_takes_them(self, task, file, tmp_path):
        changes = {"num_steps": 2, "evaluate.compare": False} if task in ("finetune", "distill") else {}
        changes |= {"draws": 1} if task == "finetune" else {"model.width": 0.125} if task == "distill" else {}
        summary = simclr_jax.run(self.config(task, file, **changes), tmp_path / "run")
        assert summary["examples" if task in ("knn", "embed") else "top1"] > 0
