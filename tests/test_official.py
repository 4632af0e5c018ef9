"""Checkpoints of the official code, in its three formats, filled by the rule of the goldens."""

import ast
import json
import random
import subprocess
import sys
from functools import cache

import jax
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_task, tiny_config
from flax.traverse_util import flatten_dict
from networks import (
    GOLDENS,
    assert_close,
    build,
    by_tf1_name,
    golden_value,
    golden_variables,
    load_golden,
    shapes_of,
    write_tensors,
)

from simclr_jax import checkpoint, official, pretrained
from simclr_jax.models import make_model, resnet
from simclr_jax.official import __main__ as official_main
from simclr_jax.official import names
from simclr_jax.process.errors import UserError
from simclr_jax.tasks import finetune

pytestmark = pytest.mark.slow

CASES = ["r18_cifar_h2", "r18_imagenet_stem", "r50_1x", "r50_1x_sk"]
FORMATS = ["tf1", "tf2", "tf2_keys", "saved_model"]
TF2_NAMES = {
    case: json.loads((GOLDENS / f"tf2_names_{case}.json").read_text())
    for case in ("r18_cifar_h3", "r50_1x_sk")
}
Node = tf.__internal__.tracking.AutoTrackable


def node(**attributes):
    made = Node()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@cache
def fill(case):
    """TF1 name -> value of a golden case."""
    golden = np.load(GOLDENS / f"resnet_{case}.npz")
    return {
        str(name): golden_value(str(name), ast.literal_eval(str(shape)))
        for name, shape in zip(golden["names"], golden["shapes"])
    }


def fill_model(model, size=32):
    """TF1 name -> value of a model of ours."""
    return by_tf1_name(golden_variables(model, size))


def with_training(values):
    """A TF1 checkpoint's tensors: the model's, the optimiser's, the moving average's and the memory's."""
    trained = [name for name in values if "moving" not in name]
    return {
        **values,
        **{f"{name}/Momentum": values[name] * 0 for name in trained},
        **{f"ema_model/{name}": value + 1 for name, value in values.items() if "supervised" not in name},
        "global_step": np.int64(3),
        "memory/keys": np.zeros((8, 4), np.float32),
    }


def tf2_objects(values, flags):
    """The official TF2 model's variables in lists and attributes as its constructors make them."""
    variables = {name: tf.Variable(value) for name, value in values.items()}
    counts = {"conv2d": 0, "batch_normalization": 0}

    def layer(scope):
        """Attributes of all variables right under `scope`."""
        below = {
            name.removeprefix(f"{scope}/"): value
            for name, value in variables.items()
            if name.startswith(scope)
        }
        return node(**{leaf: value for leaf, value in below.items() if "/" not in leaf and leaf[0] != "_"})

    def next_layer(kind):
        number = f"_{counts[kind]}" if counts[kind] else ""
        counts[kind] += 1
        return layer(f"base_model/{kind}{number}")

    def conv():
        return node(conv2d=next_layer("conv2d"))

    def bn():
        return node(bn=next_layer("batch_normalization"))

    def squeeze_excite():
        return node(se_reduce=next_layer("conv2d"), se_expand=next_layer("conv2d"))

    def selective_kernel():
        return node(conv2d_fixed_padding=conv(), batch_norm_relu=bn(), conv2d_0=next_layer("conv2d"),
                    batch_norm_relu_1=bn(), conv2d_1=next_layer("conv2d"))  # fmt: skip

    def shortcut(strided):
        if not flags["sk_ratio"]:
            return [conv(), bn()]
        return [*([Node()] if strided else []), Node(), conv(), bn()]

    def basic_block(first, strided):
        made = node(
            shortcut_layers=shortcut(strided) if first else [], conv2d_bn_layers=[conv(), bn(), conv(), bn()]
        )
        if flags.get("se_ratio"):
            made.se_layer = squeeze_excite()
        return made

    def bottleneck_block(first, strided):
        made = node(projection_layers=shortcut(strided) if first else [], shortcut_dropblock=Node())
        layers = [conv(), bn(), Node()]
        layers += [selective_kernel()] if flags["sk_ratio"] else [conv(), bn()]
        layers += [Node(), conv(), bn(), Node()]
        made.conv_relu_dropblock_layers = layers + ([squeeze_excite()] if flags.get("se_ratio") else [])
        return made

    if flags["image_size"] <= 32:
        stem = [conv(), Node(), bn(), Node()]
    elif flags["sk_ratio"]:
        stem = [conv(), bn(), conv(), bn(), conv(), Node(), bn(), Node(), Node()]
    else:
        stem = [conv(), Node(), bn(), Node(), Node()]
    block, sizes = resnet.RESNETS[flags["resnet_depth"]].args
    make_block = bottleneck_block if block is resnet.BottleneckBlock else basic_block
    groups = [
        node(layers=[make_block(index == 0, group > 0) for index in range(size)])
        for group, size in enumerate(sizes)
    ]
    scopes = [f"head_contrastive/nl_{index}" for index in range(flags["num_proj_layers"])]
    heads = [
        node(dense=layer(f"{scope}/dense"), bn_relu=node(bn=layer(f"{scope}/batch_normalization")))
        for scope in scopes
    ]
    model = node(
        resnet_model=node(initial_conv_relu_max_pool=stem, block_groups=groups),
        _projection_head=node(linear_layers=heads),
        supervised_head=node(linear_layer=node(dense=layer("head_supervised/linear_layer/dense"))),
    )
    return model, variables


def object_keys(model):
    """Key -> variable of a TF2 checkpoint of these objects."""
    graph = tf.train.Checkpoint(model=model)
    keys, waiting = {}, [("model", graph.model)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, tf.Variable):
            keys[place] = value
        else:
            waiting += [(f"{place}/{name}", child) for name, child in value._trackable_children().items()]
    return keys


def save(case, form, folder):
    """Writes a golden case, as the official code would; returns what to load."""
    flags = json.loads(str(np.load(GOLDENS / f"resnet_{case}.npz")["flags"]))
    if form == "tf1":
        return write_tensors(folder / "model.ckpt-3", with_training(fill(case)))
    model, variables = tf2_objects(fill(case), flags)
    if form == "tf2_keys":
        suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
        tensors = {key + suffix: value for key, value in object_keys(model).items()}
        slots = {
            key.replace(suffix, f"/.OPTIMIZER_SLOT/optimizer/Momentum{suffix}") for key in [*tensors][:9]
        }
        others = ("global_step", "save_counter", "optimizer/learning_rate")
        tensors |= dict.fromkeys(slots, 0.0) | {name + suffix: 1.0 for name in others}
        return write_tensors(folder / "ckpt-3", tensors)
    if form == "tf2":
        saved = tf.train.Checkpoint(
            model=model, global_step=tf.Variable(3), optimizer=node(iter=tf.Variable(3))
        )
        return saved.save(str(folder / "ckpt"))
    trained = [variable for name, variable in variables.items() if "moving" not in name]
    random.Random(0).shuffle(trained)  # positions in the list tell nothing
    tf.saved_model.save(node(trainable_variables_list=trained, model=model), str(folder))
    return folder


def assert_filled(variables, model):
    """Every variable is what the rule makes of its official name."""
    expected = flatten_dict(golden_variables(model, 32))
    actual = flatten_dict(variables)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg="/".join(path))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_formats(case, form, tmp_path):
    config, variables = official.load(save(case, form, tmp_path))
    golden, flags, model, images = load_golden(case)
    assert (config.depth, config.width) == (flags["resnet_depth"], flags["width_multiplier"])
    assert config.sk_ratio == flags["sk_ratio"] and config.se_ratio == 0
    assert config.stem == ("cifar" if flags["image_size"] <= 32 else "imagenet")
    assert (config.projection_layers, config.projection_dim) == (flags["num_proj_layers"], 128)
    assert_filled(variables, model.clone(encoder=model.encoder.clone(stem=config.stem)))
    if form != "saved_model":  # the others have the same variables
        return
    model = make_model(config, len(variables["params"]["supervised_head"]["bias"]))
    outputs = jax.jit(model.apply)(variables, images)
    assert_close(outputs["features"], golden["final_avg_pool"], name="features")
    assert_close(outputs["projection"], golden["proj_output"], name="projection")
    assert_close(outputs["logits"], golden["logits_from_final_avg_pool"], name="logits")
    for index, hidden in enumerate(outputs["projection_hiddens"][1:], start=1):
        assert_close(hidden, golden[f"proj_hidden/{index}"], name=f"hidden {index}")


@pytest.mark.parametrize("case", TF2_NAMES)
def test_places_in_the_object_graph_are_the_from_officials(case):
    """Both those that this file's tests write and those that are read."""
    rows = TF2_NAMES[case]["rows"]
    flags = {"r18_cifar_h3": {"resnet_depth": 18, "sk_ratio": 0, "image_size": 32},
             "r50_1x_sk": {"resnet_depth": 50, "sk_ratio": 0.0625, "image_size": 64}}[case]  # fmt: skip
    model, variables = tf2_objects({row[0]: np.float32(0) for row in rows}, flags | {"num_proj_layers": 3})
    called = {id(variable): name for name, variable in variables.items()}
    written = {called[id(variable)]: key for key, variable in object_keys(model).items()}
    assert written == {name: key for name, _, key in rows}
    model = build(10, depth=flags["resnet_depth"], sk_ratio=flags["sk_ratio"], projection_layers=3)
    paths = names.tf1_names(shapes_of(model, flags["image_size"])[1])
    assert {"/".join(path): name for path, name in paths.items()} == {
        names.from_tf2_object(key): name for name, _, key in rows
    }


@pytest.mark.parametrize("case", TF2_NAMES)
def test_saved_model_of_named_variables_without_the_official_objects(case, tmp_path):
    rows = TF2_NAMES[case]["rows"]
    shapes = (
        fill("r50_1x_sk") if case == "r50_1x_sk" else fill_model(build(10, depth=18, projection_layers=3))
    )
    variables = [tf.Variable(shapes[name], name=tf2_name.removesuffix(":0")) for name, tf2_name, _ in rows]
    random.Random(0).shuffle(variables)
    tf.saved_model.save(node(variables_list=variables), str(tmp_path))
    config, loaded = official.load(tmp_path)
    assert_filled(loaded, make_model(config, 10 if case == "r18_cifar_h3" else 1000))


def architectures():
    """Networks whose parameters the goldens count, and some that they leave out."""
    for name in json.loads((GOLDENS / "param_counts.json").read_text()):
        depth, *rest = (float(part.strip("rskx") or 0) for part in name.split("_"))
        if rest[1:] and (depth < 100 or rest[0] == 3):  # the other large ones differ in depth alone
            yield {"depth": int(depth), "width": rest[0], "sk_ratio": rest[1] / 16, "stem": "imagenet"}
    for stem in ("cifar", "imagenet"):
        for ratios in ({"sk_ratio": 0.0625}, {"se_ratio": 0.25}, {"sk_ratio": 0.25, "se_ratio": 0.1}):
            yield {"depth": 50, "width": 0.5, "stem": stem, **ratios}
            yield {"depth": 10, "width": 1.5, "stem": stem, **ratios}
    for depth in resnet.RESNETS:
        yield {"depth": depth, "width": 0.375, "stem": "cifar"}


@pytest.mark.journey
def test_networks_are_told_from_their_shapes():
    for index, network in enumerate(architectures()):
        layers, classes = index % 4, (0, 10)[index % 2]
        expected = {"sk_ratio": 0.0, "se_ratio": 0.0, "projection_layers": layers, **network}
        variables = shapes_of(build(classes, **expected), 32)[1]
        flat = flatten_dict(variables)
        if network["depth"] in (8, 10, 18, 34):  # basic blocks have no selective kernels
            expected["sk_ratio"] = 0.0625 if expected["sk_ratio"] and network["stem"] == "imagenet" else 0.0
        for called in (names.our_names(variables), names.tf1_names(variables)):
            named = {name: flat[path].shape for path, name in called.items()}
            config, num_classes = official._infer(named, "", pooled=False)
            assert num_classes == classes, network
            inferred = {key: config[key] for key in expected}
            if inferred != expected:  # another ratio may round to the same widths
                again = flatten_dict(shapes_of(make_model(config, num_classes), 32)[1])
                assert {path: leaf.shape for path, leaf in again.items()} == {
                    path: leaf.shape for path, leaf in flat.items()
                }, (network, inferred)
                ratios = [key for key in inferred if inferred[key] != expected[key]]
                assert {"sk_ratio", "se_ratio"}.issuperset(ratios), (network, inferred)


@pytest.fixture
def small(tmp_path):
    """TF1 name -> value of a small network, and what writes it as a checkpoint."""
    model = build(10, depth=8, width=0.25)
    return fill_model(model), lambda values: write_tensors(tmp_path / "model.ckpt-3", values)


def test_any_two_kernels_swapped_are_noticed(tmp_path):
    """By what the tests above compare, were they swapped while reading."""
    model = build(10, depth=18, width=0.125)
    values, shapes = fill_model(model), {}
    for name in values:
        if name.endswith("kernel"):
            shapes.setdefault(values[name].shape, []).append(name)
    pairs = [random.Random(0).sample(names, 2) for names in shapes.values() if len(names) > 1]
    assert len(pairs) > 3
    for one, other in pairs:
        swapped = write_tensors(tmp_path / "model", values | {one: values[other], other: values[one]})
        with pytest.raises(AssertionError, match="kernel"):
            assert_filled(official.load(swapped)[1], model)


def test_moving_average_of_the_weights(small):
    values, save = small
    path = save(with_training(values))
    plain, average = (official.load(path, ema=ema)[1]["params"] for ema in (False, True))
    for part, shift in (("encoder", 1), ("projection_head", 1), ("supervised_head", 0)):
        for one, other in zip(jax.tree.leaves(plain[part]), jax.tree.leaves(average[part])):
            np.testing.assert_array_equal(one + np.float32(shift), other)
    for use_average, params in ((False, plain), (True, average)):
        jax.tree.map(
            np.testing.assert_array_equal,
            pretrained.read(path, use_average=use_average)[0]["params"],
            params,
        )


def test_head_of_one_layer_and_no_heads(tmp_path):
    for layers, classes in ((0, 0), (1, 0), (0, 7)):
        model = build(classes, depth=8, width=0.25, projection_layers=layers, stem="imagenet")
        config, variables = official.load(
            write_tensors(tmp_path / f"{layers}{classes}", fill_model(model, 64))
        )
        assert config.projection_layers == layers and config.stem == "imagenet"
        assert_filled(variables, model)


def change(name, new):
    return lambda values: {key: value for key, value in values.items() if key != name} | new


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (change("base_model/conv2d_4/kernel", {}), "missing base_model/conv2d_4/kernel"),
        (change("base_model/conv2d_3/kernel", {}), "missing base_model/conv2d_3/kernel"),
        (
            change("base_model/batch_normalization_5/gamma", {}),
            "missing base_model/batch_normalization_5/gamma",
        ),
        (change("", {"base_model/dense/kernel": np.zeros(3)}), "unknown base_model/dense/kernel"),
        (change("", {"decoder/bias": np.zeros(3)}), "unknown decoder/bias"),
        (
            change("", {"base_model/conv2d_5/kernel": np.zeros((3, 3, 9, 16), np.float32)}),
            r"of another shape base_model/conv2d_5/kernel \(3, 3, 9, 16\) instead of \(3, 3, 16, 32\)",
        ),
        (change("", {"head_supervised/linear_layer/dense/bias": np.zeros(9)}), "of another shape head_sup"),
        (change("", {"head_supervised/linear_layer/dense/kernel": np.zeros(9)}), "unknown head_sup"),
        (change("", {"head_contrastive/nl_1/dense/kernel": np.zeros(9)}), "missing head_contrastive/l_0"),
        (change("", {"base_model/conv2d_3/bias": np.zeros(())}), "unknown base_model/conv2d_3/bias"),
        (
            change("", {"base_model/conv2d_3/kernel": np.zeros((2, 2))}),
            "of another shape base_model/conv2d_3",
        ),
    ],
)
def test_what_does_not_fit_is_listed(small, changed, expected):
    values, save = small
    with pytest.raises(
        UserError, match=rf"model.ckpt-3 differs from ResNet-8 0.25x, which it resembles: {expected}"
    ):
        official.load(save(changed(values)))


def test_slots_memory_and_steps_are_told_apart_but_nothing_else(small):
    values, save = small
    others = {
        "beta1_power": np.float32(1),
        "queue/memory_1": np.zeros(2),
        "base_model/conv2d/kernel/Adam_1": np.zeros(2),
    }
    assert_filled(official.load(save(values | others))[1], build(10, depth=8, width=0.25))


@pytest.mark.parametrize(
    ("tensors", "ema", "expected"),
    [
        ({"resnet/w": np.zeros(3)}, False, "expected variables such as base_model/conv2d/.*found resnet/w$"),
        ({"global_step": np.int64(1)}, False, "holds no network of SimCLR"),
        ({"base_model/conv2d/kernel": np.zeros((3, 3, 3, 8))}, True, "no network of SimCLR under ema_model/"),
        ({"base_model/conv2d/kernel": np.zeros((5, 5, 1, 8))}, False, r"no ResNet of Sim.*\(5, 5, 1, 8\)"),
        ({"model/x/.ATTRIBUTES/VARIABLE_VALUE": np.zeros(3)}, False, "holds no network of SimCLR"),
        ({"model/x/.ATTRIBUTES/VARIABLE_VALUE": np.zeros(3)}, True, "no network of SimCLR under ema_model/"),
    ],
)  # fmt: skip
def test_checkpoints_of_other_projects(tensors, ema, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        official.load(write_tensors(tmp_path / "model", tensors), ema=ema)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / "model.ckpt-3.index"),
        lambda folder: truncate(folder / "model.ckpt-3.data-00000-of-00001"),
        lambda folder: (folder / "model.ckpt-3.data-00000-of-00001").unlink(),
        lambda folder: (folder / "model.ckpt-3.index").write_text("not this"),
        lambda folder: (folder / "model.ckpt-3.data-00000-of-00001").write_bytes(bytes(3_000_000)),
    ],
)
def test_damaged_files(small, damage, tmp_path):
    values, save = small
    save(values)
    damage(tmp_path)
    with pytest.raises(UserError, match=r"model.ckpt-3 is damaged \(.+\): copy all its files again$"):
        official.load(tmp_path)


def test_a_damaged_object_graph(tmp_path):
    prefix = write_tensors(
        tmp_path / "ckpt-1",
        {"model/x/.ATTRIBUTES/VARIABLE_VALUE": np.zeros(3), "_CHECKPOINTABLE_OBJECT_GRAPH": b"no graph"},
    )
    with pytest.raises(UserError, match="ckpt-1 is damaged"):
        official.load(prefix)


def test_an_object_graph_that_names_what_is_not_there(tmp_path):
    model = node(resnet_model=node(initial_conv_relu_max_pool=[node(conv2d=node(kernel=tf.Variable(0.0)))]))
    saved = tf.train.Checkpoint(model=model).save(str(tmp_path / "ckpt"))
    reader = tf.train.load_checkpoint(saved)
    graph = reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    others = {"model/x/.ATTRIBUTES/VARIABLE_VALUE": np.zeros(3), "_CHECKPOINTABLE_OBJECT_GRAPH": graph}
    with pytest.raises(UserError, match="holds no network of SimCLR"):
        official.load(write_tensors(tmp_path / "other" / "ckpt", others))


def test_shortcuts_that_pool_are_told_by_their_place(tmp_path):
    """TF2 builds ResNet-18 with `sk_ratio` at 32 pixels: only its shortcuts differ, by an average pool."""
    for sk_ratio in (0, 0.0625):
        expected = build(10, depth=18, width=0.125, sk_ratio=sk_ratio, stem="cifar")
        flags = {"resnet_depth": 18, "sk_ratio": sk_ratio, "image_size": 32, "num_proj_layers": 2}
        model, _ = tf2_objects(fill_model(expected), flags)
        config, variables = official.load(
            tf.train.Checkpoint(model=model).save(str(tmp_path / str(sk_ratio)))
        )
        assert config.sk_ratio == sk_ratio
        assert_filled(variables, expected)


@pytest.mark.parametrize(("depth", "sk_ratio"), [(18, 0), (50, 0), (50, 0.0625)])
def test_squeeze_and_excitation(depth, sk_ratio, tmp_path):
    expected = build(10, depth=depth, width=0.125, sk_ratio=sk_ratio, se_ratio=0.25, stem="imagenet")
    flags = {"resnet_depth": depth, "sk_ratio": sk_ratio, "se_ratio": 0.25, "image_size": 64}
    values = fill_model(expected, 64)
    model, _ = tf2_objects(values, flags | {"num_proj_layers": 2})
    saved = tf.train.Checkpoint(model=model).save(str(tmp_path / "tf2"))
    for path in (saved, write_tensors(tmp_path / "tf1", values)):
        config, variables = official.load(path)
        assert (config.se_ratio, config.sk_ratio) == (0.25, sk_ratio)
        assert_filled(variables, expected)


def test_one_projection_layer_of_the_nonlinear_head(tmp_path):
    values = fill_model(build(0, depth=8, width=0.25, projection_layers=1))
    renamed = {name.replace("/l_0/", "/nl_0/"): value for name, value in values.items()}
    config, variables = official.load(write_tensors(tmp_path / "model", renamed))
    assert config.projection_layers == 1
    kernel = variables["params"]["projection_head"]["dense0"]["kernel"]
    np.testing.assert_array_equal(kernel, values["head_contrastive/l_0/dense/kernel"])


def test_every_way_to_name_a_checkpoint(small, tmp_path):
    values, save = small
    prefix = save(values)
    for name in (tmp_path, prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001", f"{prefix}.meta"):
        assert official.find(name) == str(prefix)
    other = write_tensors(tmp_path / "model.ckpt-12", values)
    with pytest.raises(UserError, match="holds several checkpoints: give one of them, .*ckpt-12, .*ckpt-3$"):
        official.find(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/somewhere/else/model.ckpt-12"\nall_model_')
    assert official.find(tmp_path) == str(other)
    assert official.find(tmp_path / "nothing") is None and official.find(tmp_path / "model.ckpt-1") is None
    for name in ("saved_model", "hub"):  # as Google's folders are
        folder = tmp_path / f"r50_{name}" / name
        folder.mkdir(parents=True)
        (folder / "saved_model.pb").touch()
        for path in (folder, folder.parent, folder / "saved_model.pb"):
            assert official.find(path) == str(folder / "variables" / "variables")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no TensorFlow checkpoint"):
        official.load(tmp_path / "empty")


def test_conversion(small, tmp_path, capsys):
    values, save = small
    prefix = str(save(with_training(values)))
    official_main.main([prefix, f"--output={tmp_path}/run", "--supervised_layer=1"])
    printed = capsys.readouterr().out
    assert "ResNet-8 0.25x, cifar stem" in printed and "encoder" in printed and "classes     10" in printed
    variables, meta = checkpoint.load_params(tmp_path / "run")
    assert meta["num_classes"] == 10 and meta["config"]["model"]["supervised_layer"] == 1
    assert meta["config"]["image_size"] == 32
    assert_filled(variables, build(10, depth=8, width=0.25))
    for folder in (tmp_path / "run", tmp_path):  # a run, and anything else
        with pytest.raises(
            UserError, match=f"{folder} exists already: choose another --output, or remove it"
        ):
            official_main.main([prefix, f"--output={folder}"])
    with pytest.raises(UserError, match="model.supervised_layer=3, but there are 2"):
        official_main.main([prefix, f"--output={tmp_path}/other", "--supervised_layer=3"])
    assert not (tmp_path / "other").exists()
    official_main.main([prefix, f"--output={tmp_path}/average", "--ema"])
    average, _ = checkpoint.load_params(tmp_path / "average")
    kernel = average["params"]["encoder"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, values["base_model/conv2d/kernel"] + 1)
    metas = [checkpoint.load_params(tmp_path / name)[1] for name in ("run", "average")]
    assert [meta["config"]["ema"] for meta in metas] == [False, True]


def test_the_command_tells_errors_in_one_line(tmp_path):
    command = [sys.executable, "-m", "simclr_jax.official", str(tmp_path), f"--output={tmp_path}/run"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr == f"error: {tmp_path} holds no TensorFlow checkpoint: give its folder or prefix\n"


@pytest.fixture(scope="module")
def official_run(pretrained_run, tmp_path_factory):
    """The network of `pretrained_run`, classifier included, as the official code would have saved it."""
    variables, _ = checkpoint.load_params(pretrained_run)
    tensors = with_training(by_tf1_name(variables))
    return write_tensors(tmp_path_factory.mktemp("official") / "model.ckpt-5", tensors)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_tasks_take_from_it_what_they_take_from_ours(layer, pretrained_run, official_run):
    loaded = []
    for path in (pretrained_run, official_run):
        config = tiny_config("finetune", pretrained=str(path), **{"model.supervised_layer": layer})
        loaded.append(pretrained.load(config, make_model(config.model, 10, whole_projection=False)))
    jax.tree.map(np.testing.assert_array_equal, *loaded)
    kept = loaded[1]["params"].get("projection_head", {})
    assert kept.keys() == {f"{kind}{index}" for kind in ("dense", "bn") for index in range(layer)}


def test_fine_tuning_by_sgd_is_warned_of_the_weights(pretrained_run, official_run, capsys):
    warned = []
    for path, optimizer in ((official_run, "sgd"), (official_run, "lars"), (pretrained_run, "sgd")):
        config = tiny_config("finetune", pretrained=str(path), **{"optimizer.name": optimizer})
        finetune.warn_of_weights(config)
        warned.append("note: kernels of v1's networks are 16.8 times" in capsys.readouterr().out)
    assert warned == [True, False, False]


def test_features_are_those_of_our_checkpoint(pretrained_run, official_run, tmp_path):
    own, from_official = (
        run_task("embed", tmp_path / name, pretrained=str(path), splits="eval")
        for name, path in (("ours", pretrained_run), ("theirs", official_run))
    )
    assert own["dimensions"] == from_official["dimensions"]
    own, from_official = (
        np.load(tmp_path / name / "embeddings.npz")["features"] for name in ("ours", "theirs")
    )
    np.testing.assert_array_equal(own, from_official)


@pytest.mark.journey
def test_an_official_classifier_teaches(official_run, tmp_path):
    summary = run_task("distill", tmp_path, pretrained=str(official_run), num_steps=2)
    teacher, variables, meta = pretrained.load_model(official_run)
    assert summary["teacher_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert meta["num_classes"] == 10 and teacher.supervised_layer == 0


def test_a_task_tells_what_does_not_fit_in_one_line(official_run, tmp_path):
    command = [
        sys.executable,
        "-m",
        "simclr_jax.main",
        "--config=configs/digits.py:knn",
        f"--workdir={tmp_path}/run",
    ]
    command += ["--config.model.stem=imagenet", f"--config.pretrained={official_run}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=GOLDENS.parent.parent)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "error: model.stem=imagenet does not fit" in result.stderr
    assert "set --config.model.stem=cifar" in result.stderr
