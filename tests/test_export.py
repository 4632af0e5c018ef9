"""Exports: their outputs in TensorFlow, ONNX Runtime and PyTorch, and the messages to the user."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf
import yaml
from networks import DEFAULTS, assert_close, build, by_tf1_name, golden_variables, write_tensors
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

import simclr_jax
from simclr_jax import checkpoint, export, pretrained
from simclr_jax.export import __main__ as export_main
from simclr_jax.export import card, onnx, safetensors
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow

PATHS = {"PYTHONPATH": str(Path(__file__).parent.parent)}
NETWORKS = {
    "basic": {"depth": 8, "width": 0.25, "stem": "imagenet"},
    "cifar": {"depth": 10, "width": 0.125, "stem": "auto"},
}
SIZES = {"basic": 42, "cifar": 16}  # 42 pixels are 21 where they are pooled
HUB = {"initial_conv", "initial_max_pool", "block_group1", "block_group2", "block_group3", "block_group4",
       "final_avg_pool", "proj_head_input", "proj_head_output", "logits_sup"}  # fmt: skip


def images_of(batch, height, width=None):
    return np.random.default_rng(1).random((batch, height, width or height, 3), np.float32)


def expected_of(model, variables, images):
    return jax.device_get(jax.jit(model.apply)(variables, images))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, tmp_path_factory):
    """The workdir of a network whose weights are those of the goldens' rule, and the network."""
    workdir = tmp_path_factory.mktemp(request.param)
    return save(workdir, SIZES[request.param], NETWORKS[request.param])


def save(workdir, size, settings, task="pretrain", classes=10):
    model = build(classes, **settings)
    variables = golden_variables(model, size)
    config = {"task": task, "seed": 0, "image_size": size, "pretrained": None, "model": DEFAULTS | settings}
    config |= {"dataset": {"name": "digits", "train_split": "train"}}
    with checkpoint.open_manager(workdir, keep=1) as manager:
        checkpoint.save(manager, 3, variables, {"config": config, "num_classes": classes})
    return workdir, model, variables, size


def run(workdir, form, *arguments):
    """Exports as a user does; returns the folder and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        export_main.main([str(workdir), f"--format={form}", *arguments])
    return workdir / "export" / form, printed.getvalue()


@pytest.fixture
def small(tmp_path):
    return save(tmp_path / "run", 16, {"depth": 8, "width": 0.125, "stem": "auto"})[0]


def test_savedmodel(network):
    workdir, model, variables, size = network
    folder, printed = run(workdir, "savedmodel")
    assert re.fullmatch(
        rf"{folder}: written and read back, outputs within \d\.\de-\d\d of JAX's, .*\n", printed
    )
    loaded = tf.saved_model.load(str(folder))
    calls = [
        partial(loaded, trainable=False),
        lambda images: loaded(images),
        lambda images: loaded.signatures["serving_default"](inputs=images),
        lambda images: loaded.signatures["default"](inputs=images),
    ]
    our_names = {"final_avg_pool": "features", "proj_head_input": "features", "logits_sup": "logits"}
    our_names |= {"proj_head_output": "projection"}
    groups = {f"block_group{group}" for group in range(1, 1 + len(model.encoder.stage_sizes))}
    fixed = model.clone(encoder=model.encoder.clone(stem="cifar" if size <= 32 else "imagenet"))
    for shape in ((3, size + 7, size - 3), (1, size)):
        images = images_of(*shape)
        expected = expected_of(fixed, variables, images)
        for call in calls:
            outputs = call(images)
            assert outputs.keys() == {name for name in HUB if not name.startswith("block")} | groups
            for name, value in outputs.items():
                assert_close(value, expected[our_names.get(name, name)], name=name)
    with pytest.raises(ValueError, match="Could not find matching concrete function"):
        loaded(images, trainable=True)
    saved = tf.train.list_variables(str(folder / "variables" / "variables"))  # no constants of the graph
    sizes = [np.prod(shape, dtype=int) for name, shape in saved if name != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    assert sorted(sizes) == sorted(leaf.size for leaf in jax.tree.leaves(variables))


def test_onnx(network, tmp_path, capfd):
    workdir, model, variables, size = network
    run(workdir, "onnx", f"--output={tmp_path}/onnx")
    assert not capfd.readouterr().err  # where ONNX Runtime would warn of wrong shapes
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["README.md", "model.onnx"]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert [entry.name for entry in session.get_inputs()] == ["inputs"]
    assert session.get_inputs()[0].shape[1:] == [size, size, 3]
    for batch in (1, 3):
        expected = expected_of(model, variables, images_of(batch, size))
        outputs = session.run(None, {"inputs": images_of(batch, size)})
        named = dict(zip([entry.name for entry in session.get_outputs()], outputs))
        assert named.keys() == {"final_avg_pool", "proj_head_output", "logits_sup"}
        assert_close(named["final_avg_pool"], expected["features"])
        assert_close(named["proj_head_output"], expected["projection"])
        assert_close(named["logits_sup"], expected["logits"])


@pytest.mark.journey
@pytest.mark.parametrize("form", ["savedmodel", "onnx"])
def test_selective_kernels_with_squeeze_and_excitation(form, tmp_path):
    """By the export's own comparison, which refuses what differs, as another test shows."""
    settings = {"depth": 50, "width": 0.0625, "sk_ratio": 0.0625, "se_ratio": 0.1, "stem": "imagenet"}
    workdir, *_ = save(tmp_path, 44, settings)  # 11 and 3 pixels where shortcuts pool
    folder, printed = run(workdir, form)
    assert printed.startswith(f"{folder}: written and read back, outputs within ")


def test_large_onnx_keeps_its_weights_in_a_second_file(tmp_path, monkeypatch):
    workdir, *_ = save(tmp_path, 16, {"depth": 8, "stem": "cifar"})
    run(workdir, "onnx", f"--output={tmp_path}/one")
    assert not (tmp_path / "one" / "model.onnx.data").exists()
    monkeypatch.setattr(onnx, "_PROTOBUF_LIMIT", 0)
    folder, _ = run(workdir, "onnx")
    weights, graph = ((folder / name).stat().st_size for name in ("model.onnx.data", "model.onnx"))
    assert weights > graph
    assert (folder / "model.onnx.data").stat().st_mode == (folder / "README.md").stat().st_mode


def torchvision_names():
    """Names and shapes of torchvision's resnet50, by its rule."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 2048), "fc.bias": (1000,)}
    norms, inputs = {"bn1": 64}, 64
    for group, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**group
        for block in range(blocks):
            name = f"layer{group + 1}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, inputs, 1, 1)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            norms |= {f"{name}.bn1": width, f"{name}.bn2": width, f"{name}.bn3": 4 * width}
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
                norms[f"{name}.downsample.1"] = 4 * width
            inputs = 4 * width
    for name, size in norms.items():
        shapes[f"{name}.num_batches_tracked"] = ()
        shapes |= {f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def test_names_and_shapes_are_those_of_torchvisions_resnet50():
    model = build(1000, depth=50, stem="imagenet")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images_of(1, 64))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    tensors = safetensors.torch_tensors(model, variables)
    assert len(tensors) == 320
    assert {name: tensor.shape for name, tensor in tensors.items()} == torchvision_names()


def torchvision_models(torch):
    """ResNets built as those of `torchvision.models` are."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, filters, stride, bottleneck):
            super().__init__()
            outputs = filters * (4 if bottleneck else 1)
            layers = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
            for index, (kernel, step) in enumerate(layers, start=1):
                ends = (inputs if index == 1 else filters, outputs if index == len(layers) else filters)
                setattr(self, f"conv{index}", nn.Conv2d(*ends, kernel, step, kernel // 2, bias=False))
                setattr(self, f"bn{index}", nn.BatchNorm2d(ends[1]))
            self.depth, self.downsample = len(layers), None
            if inputs != outputs or stride > 1:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

        def forward(self, x):
            shortcut = self.downsample(x) if self.downsample else x
            for index in range(1, self.depth + 1):
                x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x))
                x = x.relu() if index < self.depth else x
            return (x + shortcut).relu()

    class ResNet(nn.Module):
        def __init__(self, bottleneck, sizes, num_classes=1000):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1, self.maxpool = nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
            inputs = 64
            for group, size in enumerate(sizes):
                blocks = []
                for index in range(size):
                    stride = 2 if group and not index else 1
                    blocks.append(Block(inputs, 64 * 2**group, stride, bottleneck))
                    inputs = 64 * 2**group * (4 if bottleneck else 1)
                setattr(self, f"layer{group + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(inputs, num_classes)

        def forward(self, x):
            x = self.maxpool(self.bn1(self.conv1(x)).relu())
            return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))

    return types.SimpleNamespace(
        resnet50=partial(ResNet, True, (3, 4, 6, 3)), resnet18=partial(ResNet, False, (2, 2, 2, 2))
    )


@pytest.mark.parametrize(("depth", "size", "classes"), [(50, 64, 0), (50, 42, 7), (18, 64, 0), (18, 32, 7)])
def test_safetensors_in_pytorch(depth, size, classes, tmp_path, monkeypatch):
    """The card's own lines, with torchvision's modules rebuilt above (their widths are the real ones)."""
    torch = pytest.importorskip("torch")
    torchvision = types.ModuleType("torchvision")
    torchvision.models = torchvision_models(torch)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    workdir, model, variables, _ = save(tmp_path, size, {"depth": depth, "stem": "auto"}, classes=classes)
    folder, _ = run(workdir, "safetensors")
    scope = execute_card(folder)
    images = images_of(2, size)
    expected = expected_of(model, variables, images)["logits" if classes else "features"]
    with torch.no_grad():
        output = scope["model"](torch.from_numpy(images).permute(0, 3, 1, 2))
        assert_close(output, expected)
        if size == 64:  # the pooling of torchvision makes a difference
            scope["model"].maxpool = torch.nn.MaxPool2d(3, 2, 1)
            other = scope["model"](torch.from_numpy(images).permute(0, 3, 1, 2))
            assert np.abs(np.asarray(other) - expected).max() > 1e-2 * np.abs(expected).max()


def execute_card(folder):
    """Runs the Python of a model card; returns its variables."""
    [code] = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    scope = {}
    with contextlib.chdir(folder):
        exec(code, scope)
    return scope


def test_model_card(small):
    """Its Python runs, its front matter is YAML, and it tells where the network comes from."""
    (small / "summary.json").write_text('{"trained": {"knn_accuracy": 0.9778}, "steps": 337}')
    for form in ("savedmodel", "onnx"):
        folder, _ = run(small, form, "--licence=Apache-2.0")
        scope = execute_card(folder)
        assert scope["features"].shape == (2, 32)
        assert_close(scope["logits"], expected_of(*export.load(small)[:2], scope["images"])["logits"])
        _, front, body = (folder / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "apache-2.0"
        for part in (
            "2002.05709",
            "2006.10029",
            "trained with simclr-jax, task `pretrain`.",
            "`digits`, split `train`",
            "| trained.knn_accuracy | 0.9778 |",
            "| steps | 337 |",
            "## Licence\n\nApache-2.0",
            '"task": "pretrain"',
            "cifar stem, images of 16 pixels",
            "| `final_avg_pool` | batch, 32 |",
        ):
            assert part in body, part
        assert ("| `block_group1` | batch, 16, 16, 8 |" in body) == (form == "savedmodel")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(export.load(small)[1]["params"]["encoder"]))
        assert f"encoder {parameters:,}" in body


def test_class_names_and_temperature_travel_along(tmp_path):
    """In every format, its card, and back into this program."""
    settings = {"depth": 8, "width": 0.125, "stem": "auto", "projection_layers": 0}
    workdir, _, variables, size = save(tmp_path / "run", 16, settings, task="finetune", classes=3)
    names = ["Grün, hell", 'a "b"', "c"]
    with checkpoint.open_manager(workdir, keep=1) as manager:
        _, meta = pretrained.read(workdir)
        checkpoint.save(manager, 4, variables, meta | {"class_names": names})
    (workdir / "summary.json").write_text(json.dumps({"top1": 0.5, "calibration_temperature": 1.25}))
    expected = {"class_names": names, "calibration_temperature": 1.25}

    import onnx as onnx_library

    folders = {form: run(workdir, form)[0] for form in export_main.FORMATS}
    entries = onnx_library.load(folders["onnx"] / "model.onnx").metadata_props
    assert {entry.key: json.loads(entry.value) for entry in entries} == expected
    loaded = tf.saved_model.load(str(folders["savedmodel"]))
    assert [name.decode() for name in loaded.class_names().numpy()] == names
    assert loaded.calibration_temperature().numpy() == 1.25
    file = folders["safetensors"] / "model.safetensors"
    with safe_open(file, "numpy") as opened:
        assert json.loads(opened.metadata()["simclr_jax"]).items() >= expected.items()
    for folder in folders.values():
        card = (folder / "README.md").read_text()
        assert json.dumps(names, ensure_ascii=False) in card and "Divide them by 1.25 first" in card
    encoder, encoder_back = simclr_jax.load(workdir), simclr_jax.load(file)
    assert encoder.class_names == encoder_back.class_names == tuple(names)
    images = images_of(2, size)
    np.testing.assert_allclose(encoder_back.predict(images), encoder.predict(images), atol=1e-6)


def card_of(workdir, form="onnx", outputs=()):
    model, variables, meta = export.load(workdir)
    outputs = dict.fromkeys(outputs, (1, 1))
    text = card.model_card(form, model, variables, meta, outputs=outputs, summary=None, licence=None)
    [code] = re.findall("```python\n(.*?)```", text, re.DOTALL)
    return text, code


@pytest.mark.parametrize("form", export_main.FORMATS)
def test_lines_of_a_card_read_the_classifier_where_there_is_one(form, small):
    text, code = card_of(small, form, ["final_avg_pool"])
    assert "features = " in code.replace("[features] =", "features =") and "logits" not in code
    assert "classifier's" not in text
    text, code = card_of(small, form, ["logits_sup"])
    assert re.search(r"logits\]? = ", code) and "`logits` are the classifier's" in text


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("shape", [(40, 40), (57, 91), (120, 33), (16, 16)])
def test_lines_of_a_card_load_photos_as_evaluation_does(size, shape, tmp_path):
    from simclr_jax.data import augment

    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    text, code = card_of(save(tmp_path / "run", size, {"depth": 8, "width": 0.125, "stem": "auto"})[0])
    scope = {}
    exec(code.split("import onnxruntime")[0], scope)
    photo = scope["load_image"](tmp_path / "photo.png")
    assert photo.dtype == np.float32 and "divide 8-bit pixels by 255" in text
    np.testing.assert_allclose(photo, augment.eval_view(noise, size), atol=0.01)  # TensorFlow rounds weights
    assert np.abs(photo - augment.eval_view(noise, size)).mean() < 1e-3


@pytest.mark.parametrize(
    ("folder", "scores", "absent"),
    [
        (".", ("| top1 | 0.7 |", "| draw | 0 |", "| labels_per_class | 5 |"), ("0.6", "0.2", "0.1", "0.3")),
        ("draw1", ("| top1 | 0.5 |", "| draw | 1 |", "| steps | 9 |"), ("0.6", "0.7", "0.2", "0.1", "0.3")),
        ("scratch1", ("| top1 | 0.3 |", "| draw | 1 |"), ("0.6", "0.7", "0.2", "0.1", "0.5")),
        ("draw2", ("Nothing was measured.",), ("0.6", "0.7")),
        ("elsewhere", ("Nothing was measured.",), ("0.6", "0.7")),
    ],
)
def test_cards_tell_the_results_of_their_own_weights(folder, scores, absent, tmp_path):
    workdir = tmp_path / "run"
    save(workdir / folder, 16, {"depth": 8, "width": 0.125, "stem": "auto"}, task="finetune")
    draws = [{"top1": 0.7, "from_scratch_top1": 0.1}, {"top1": 0.5, "from_scratch_top1": 0.3}]
    summary = {"top1": 0.6, "from_scratch_top1": 0.2, "labels_per_class": 5, "draws": draws, "steps": 9}
    (workdir / "summary.json").write_text(json.dumps(summary))
    made, _ = run(workdir / folder, "safetensors")
    text = (made / "README.md").read_text()
    results = text[text.index("## Results") : text.index("## Licence")]
    assert all(score in results for score in scores), results
    assert not any(f" {score} |" in results for score in absent), results


def test_parts_that_are_gone_give_no_output(tmp_path):
    """Such as the rest of the projection head, after fine-tuning from its first layer."""
    settings = {"depth": 8, "width": 0.125, "supervised_layer": 1}
    workdir, *_ = save(tmp_path, 16, settings, task="finetune")
    model, variables, _ = export.load(workdir)
    outputs = export.outputs(model, variables, images_of(1, 16))
    assert "proj_head_output" not in outputs and outputs["logits_sup"].shape == (1, 10)
    workdir, *_ = save(
        tmp_path / "none", 16, settings | {"projection_layers": 1, "supervised_layer": 0}, classes=0
    )
    outputs = export.outputs(*export.load(workdir)[:2], images_of(1, 16))
    assert "logits_sup" not in outputs and outputs["proj_head_output"].shape == (1, 128)


def test_bfloat16_is_left_behind(tmp_path):
    workdir, *_ = save(tmp_path, 16, {"depth": 8, "width": 0.125, "dtype": "bfloat16"})
    model, variables, _ = export.load(workdir)
    assert export.outputs(model, variables, images_of(1, 16))["block_group1"].dtype == np.float32


def test_what_is_there_is_never_overwritten(small):
    folder = small / "export" / "onnx"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("precious")
    with pytest.raises(UserError, match=f"{folder} exists already: choose another --output, or remove it"):
        run(small, "onnx")
    assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_export_that_stops_half_way_leaves_nothing(error, small, monkeypatch):
    def stop(model, variables, folder, **settings):
        (folder / "model.onnx").write_text("half")
        raise error

    monkeypatch.setattr(onnx, "write", stop)
    with pytest.raises(error):
        run(small, "onnx")
    assert not list((small / "export").iterdir())


def test_an_export_that_differs_is_refused(small):
    model, variables, _ = export.load(small)

    def off(images):
        results = export.outputs(model, variables, images)
        return results | {"final_avg_pool": results["final_avg_pool"] * 1.001}

    with pytest.raises(UserError, match="^final_avg_pool differs by 1.0e-03 of its largest value from JAX's"):
        export.compare(model, variables, 16, 1, off)
    images = np.random.default_rng(0).random((1, 16, 16, 3), np.float32)
    for name in ("initial_conv", "logits_sup"):
        spoilt = export.outputs(model, variables, images) | {name: np.nan}
        with pytest.raises(UserError, match=f"^{name} differs by nan"):
            export.compare(model, variables, 16, 1, lambda images, spoilt=spoilt: spoilt)


def test_a_summary_cut_short_is_told(small):
    (small / "summary.json").write_text('{"top1": 0.')
    with pytest.raises(UserError, match="summary.json is no JSON .*: remove it, or finish the run"):
        run(small, "safetensors")
    assert not (small / "export").exists()


def test_official_checkpoints_need_an_output_and_say_what_they_do_not_tell(tmp_path):
    variables = golden_variables(build(10, depth=8, width=0.125), 16)
    write_tensors(tmp_path / "model.ckpt-1", by_tf1_name(variables))
    with pytest.raises(UserError, match="is no run of ours: give the --output folder to make"):
        run(tmp_path, "safetensors")
    export_main.main([str(tmp_path), "--format=safetensors", f"--output={tmp_path}/out"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"trained by the code of google-research/simclr, read from {tmp_path}." in text
    assert "trained on layer 0 of the projection head" in text and "Apache License 2.0" in text
    assert "Parameters: encoder 19,704, supervised head 330." in text


def test_one_checkpoint_is_not_said_to_have_the_results_of_the_run(small):
    (small / "summary.json").write_text('{"top1": 0.5}')
    for path, has_results in ((small, True), (small / "checkpoints" / "3", False)):
        output = small / "export" / "safetensors"
        export_main.main([str(path), "--format=safetensors", "--licence=ask: me"])
        text = (output / "README.md").read_text()
        assert ("| top1 | 0.5 |" in text) == has_results and ("Nothing was measured." in text) != has_results
        assert "license: other" in text and "## Licence\n\nask: me" in text
        shutil.rmtree(output)


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 50, "sk_ratio": 0.0625},
        {"depth": 10, "sk_ratio": 0.0625},
        {"depth": 10, "sk_ratio": 0.0625, "stem": "cifar"},
        {"depth": 10, "se_ratio": 0.25},
    ],
)
def test_torchvision_lacks_what_v2_adds(settings, tmp_path):
    workdir, *_ = save(tmp_path, 64, {"width": 0.0625, "stem": "imagenet"} | settings)
    with pytest.raises(
        UserError, match="torchvision's ResNet has neither selective kernels, .*choose --format=onnx"
    ):
        run(workdir, "safetensors")
    assert not list((workdir / "export").iterdir())


def test_cards_of_networks_that_torchvision_lacks_do_not_pretend(small):
    folder, printed = run(small, "safetensors")
    assert printed == f"{folder}: written and read back, same bits\n"
    assert "which torchvision lacks" in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (
        folder / "README.md"
    ).stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["RUN", "--format=pickle"],
            "--format=pickle is unknown: choose one of savedmodel, onnx, safetensors",
        ),
        (["RUN", "--format=onnx"], "RUN holds no checkpoint: give the workdir of a run"),
        (["RUN", "--format=onnx", "--output=gs://a/b"], "--output=gs://a/b is not on this machine: give a"),
    ],
)
def test_errors_are_one_line(arguments, expected, tmp_path):
    command = [sys.executable, "-m", "simclr_jax.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | PATHS)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert expected in done.stderr and not list(tmp_path.iterdir())


def test_a_classifier_of_the_projection_head_is_no_fc(tmp_path):
    for layer in (0, 1):
        settings = {"depth": 8, "width": 0.125, "supervised_layer": layer}
        workdir, *_ = save(tmp_path / str(layer), 16, settings, task="finetune")
        folder, _ = run(workdir, "safetensors")
        assert ("fc.weight" in load_file(folder / "model.safetensors")) == (layer == 0)
