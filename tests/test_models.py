"""Networks against the official implementation: activations, gradients, initial values and sizes."""

import json
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from networks import (
    GOLDENS,
    assert_close,
    build,
    by_tf1_name,
    golden_variables,
    load_golden,
    shapes_of,
)

from simclr_jax import losses, optim, parallel
from simclr_jax.models import describe, heads, make_model, resnet
from simclr_jax.official.names import tf1_names
from simclr_jax.process.errors import UserError

pytestmark = pytest.mark.slow

BN = {k[3:]: v for k, v in np.load(GOLDENS / "misc.npz").items() if k.startswith("bn/")}
COUNTS = json.loads((GOLDENS / "param_counts.json").read_text())
del COUNTS["r18_sk"]  # a message: the TF1 code fails to build it


def assert_stages_close(outputs, golden):
    for key in (key for key in golden if key.startswith("end/")):
        _, stage, statistic = key.split("/")
        x = np.asarray(outputs[stage], np.float64)
        corners = x[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        statistics = {"shape": x.shape, "spatial_mean": x.mean(axis=(1, 2)), "std": x.std(),
                      "corners": corners, "corner_00": corners[:, 0]}  # fmt: skip
        assert_close(statistics[statistic], golden[key], name=key)


@pytest.mark.parametrize("case", ["r18_cifar_h2", "r18_imagenet_stem", "r50_1x", "r50_1x_sk"])
def test_evaluation_matches_official(case):
    golden, flags, model, images = load_golden(case)
    np.testing.assert_array_equal(images.ravel()[:8], golden["input_first8"])
    variables = golden_variables(model, flags["image_size"])
    named = by_tf1_name(variables)
    assert list(named) == list(golden["names"])
    assert [str(list(value.shape)) for value in named.values()] == list(golden["shapes"])
    layers = [int(key.split("/")[1]) for key in golden if key.startswith("logits_for_ft_proj_selector/")]

    @jax.jit
    def apply(variables, images):
        logits = [model.clone(supervised_layer=k).apply(variables, images)["logits"] for k in layers]
        return model.apply(variables, images), logits

    outputs, logits = apply(variables, images)
    assert_stages_close(outputs, golden)
    assert_close(outputs["features"], golden["final_avg_pool"], name="features")
    assert_close(outputs["projection"], golden["proj_output"], name="projection")
    assert_close(outputs["logits"], golden["logits_from_final_avg_pool"], name="logits")
    np.testing.assert_array_equal(outputs["projection_hiddens"][0], outputs["features"])
    for k, hidden in enumerate(outputs["projection_hiddens"][1:], start=1):
        assert_close(hidden, golden[f"proj_hidden/{k}"], name=f"hidden {k}")
    for k in layers:
        expected = golden[f"logits_for_ft_proj_selector/{k}"]
        assert_close(logits[k][:, : expected.shape[1]], expected, name=f"logits of hidden {k}")


def test_training_step_matches_official():
    golden, flags, model, images = load_golden("train_r18_cifar_h2_globalbn")
    variables = golden_variables(model, flags["image_size"])
    optimizer = optim.make_optimizer("lars", flags["lr"], weight_decay=flags["weight_decay"])

    @jax.jit
    def step(variables, images):
        def loss(params):
            inputs = {**variables, "params": params}
            outputs, new = model.apply(inputs, images, train=True, mutable=["batch_stats"])
            views = jnp.split(outputs["projection"], 2)
            return losses.nt_xent(*views, temperature=flags["temperature"])[0], (outputs, new)

        params = variables["params"]
        (value, (outputs, new)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return value, outputs, gradient, {"params": jax.tree.map(jnp.add, params, updates), **new}

    loss, outputs, gradient, after = step(variables, images)
    assert_close(loss, golden["f64/loss"], name="loss")
    assert_close(outputs["features"], golden["f64/final_avg_pool"], name="features")
    assert_close(outputs["projection"], golden["f64/proj_output"], name="projection")
    assert_stages_close(outputs, golden)

    gradient, before, after = by_tf1_name({"params": gradient}), by_tf1_name(variables), by_tf1_name(after)
    names = list(golden["trainable_names"])
    assert list(gradient) == names
    norms = [np.linalg.norm(gradient[name]) for name in names]
    np.testing.assert_allclose(norms, golden["f64/grad_norms"], rtol=1e-4)
    changes = [np.linalg.norm(after[name] - before[name]) for name in names]
    np.testing.assert_allclose(changes, golden["update_norms"], rtol=1e-4)
    sums = [after[name].sum(dtype=np.float64) for name in golden["moving_names"]]
    np.testing.assert_allclose(sums, golden["moving_after_sum"], rtol=1e-4, atol=1e-4)
    ours = {"grad": gradient, "var_after": after, "moving_after": after}
    for key in golden:
        kind, _, name = key.partition("/")
        if kind in ours:
            assert_close(ours[kind][name], golden[key], name=key)
        elif kind.endswith("_first64"):
            assert_close(ours[kind.removesuffix("_first64")][name].ravel()[:64], golden[key], name=key)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_match_official(name):
    depth, width, sk = (float(part.strip("rskx")) for part in name.split("_"))
    model = build(1000, depth=int(depth), width=width, sk_ratio=sk / 16, projection_layers=3, stem="imagenet")
    variables = shapes_of(model, 32)[1]
    encoder = [variables[collection]["encoder"] for collection in ("params", "batch_stats")]

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert COUNTS[name] == {
        "base_trainable": count(encoder[0]),
        "base_all": count(encoder),
        "head3_trainable": count(variables["params"]["projection_head"]),
        "n_base_variables": len(jax.tree.leaves(encoder)),
        "sup_head_1000": count(variables["params"]["supervised_head"]),
    }


def test_tf1_numbers_layers_in_forward_order():
    names = tf1_names(shapes_of(build(0, depth=101), 8)[1])
    blocks = 1 + (3 * 3 + 1) + (4 * 3 + 1)  # convolutions of the stem and the first two groups
    for index in (2, 10, 22):
        path = ("params", "encoder", f"block_group3_{index}", "conv3", "kernel")
        assert names[path] == f"base_model/conv2d_{blocks + 3 * index + 3}/kernel"


def test_initial_values_match_official():
    golden = json.loads((GOLDENS / "init_stats.json").read_text())
    model = build(10, depth=18, projection_layers=3)
    values = by_tf1_name(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    assert values.keys() == golden["variables"].keys()
    for name, expected in golden["variables"].items():
        value = values[name].astype(np.float64)
        assert list(value.shape) == expected["shape"], name
        if expected["std"] == 0:
            np.testing.assert_array_equal(value, expected["mean"], err_msg=name)
        else:  # six standard errors of the difference between two samples
            sampling = 6 * np.sqrt(2 / value.size)
            assert abs(value.mean() - expected["mean"]) < sampling * expected["std"], name
            assert abs(value.std() / expected["std"] - 1) < sampling, name
            truncated = np.abs(value).max() / value.std() < 2.4
            assert truncated == (expected["max_over_std"] < 2.4), name


def test_initial_values_are_those_of_the_standard_initialisers():
    key, image, row = jax.random.key(4), jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 6))
    he = nn.initializers.variance_scaling(1, "fan_in", "truncated_normal")
    for layer, plain, inputs in (
        (resnet.conv(5, 3), nn.Conv(5, (3, 3), use_bias=False, kernel_init=he), image),
        (heads.supervised_head(7), nn.Dense(7, kernel_init=nn.initializers.normal(0.01)), row),
    ):
        kernels = [jax.jit(module.init)(key, inputs)["params"]["kernel"] for module in (layer, plain)]
        np.testing.assert_array_equal(*kernels)


@pytest.mark.parametrize("zero_init_logits", [True, False])
def test_zero_initialisation(zero_init_logits):
    """The last batch norm of every branch starts at zero; on request the supervised head does, too."""
    model = build(depth=50, width=0.0625, zero_init_logits=zero_init_logits)

    @jax.jit
    def initial():
        params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
        scales = {path: value for path, value in flatten_dict(params).items() if path[-1] == "scale"}
        return scales, params["supervised_head"]["kernel"]

    scales, kernel = initial()
    for path, scale in scales.items():
        assert (scale == (path[-2] != "bn3")).all(), path
    assert kernel.any() != zero_init_logits


@pytest.mark.parametrize(
    ("stem", "size", "kernel", "output"),
    [("auto", 32, 3, 32), ("auto", 33, 7, 9), ("cifar", 64, 3, 64), ("imagenet", 32, 7, 8)],
)
def test_stem(stem, size, kernel, output):
    outputs, variables = shapes_of(build(stem=stem), size)
    assert variables["params"]["encoder"]["conv1"]["kernel"].shape == (kernel, kernel, 3, 8)
    assert outputs["initial_max_pool"].shape == (1, output, output, 8)


def test_smallest_resnet_has_three_groups_and_takes_fractional_widths():
    outputs, variables = shapes_of(build(0, depth=8, width=0.375), 16)
    stages = [x.shape[2:] for name, x in outputs.items() if name.startswith(("block", "initial"))]
    assert stages == [(16, 24), (8, 48), (4, 96), (16, 24), (16, 24)]
    assert outputs["features"].shape == (1, 96)
    assert "logits" not in outputs and variables["params"].keys() == {"encoder", "projection_head"}


def test_basic_blocks_take_sk_ratio_on_stem_and_shortcut_only():
    encoder = shapes_of(build(depth=18, sk_ratio=0.0625), 64)[1]["params"]["encoder"]
    assert encoder["conv1"]["kernel"].shape == (3, 3, 3, 32) and "conv3" in encoder
    layers = {"conv_shortcut", "bn_shortcut", "conv1", "bn1", "conv2", "bn2"}
    assert encoder["block_group2_0"].keys() == layers


@pytest.mark.parametrize("size", [6, 7])
def test_resnet_d_shortcut_averages_over_zeros_beyond_the_edge(size):
    unchanged = lambda *args, name: lambda x: x  # noqa: E731
    block = resnet.BasicBlock(4, 2, True, 0.1, 0.0, unchanged, unchanged)
    x = np.random.default_rng(0).random((2, size, size, 4), np.float32)
    even = np.pad(x, ((0, 0), (0, size % 2), (0, size % 2), (0, 0)))
    expected = even.reshape(2, (size + 1) // 2, 2, (size + 1) // 2, 2, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(block.shortcut(x), expected, rtol=1e-6)


def test_squeeze_and_excitation():
    rng = np.random.default_rng(0)
    x = rng.random((2, 5, 5, 8), np.float32)
    module = resnet.SqueezeExcite(3, resnet.conv)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    reduce, expand = (variables["params"][layer] for layer in ("conv1", "conv2"))
    hidden = np.maximum(x.mean(axis=(1, 2)) @ reduce["kernel"][0, 0] + reduce["bias"], 0)
    gate = 1 / (1 + np.exp(-hidden @ expand["kernel"][0, 0] - expand["bias"]))
    assert_close(module.apply(variables, x), x * gate[:, None, None], 1e-6)

    # The reduced width follows the block's filters (64, 128, ...), not its four times wider output.
    encoder = shapes_of(build(depth=50, se_ratio=0.1), 8)[1]["params"]["encoder"]
    assert encoder["block_group1_1"]["se"]["conv1"]["kernel"].shape == (1, 1, 256, 6)


@pytest.mark.parametrize(("layers", "name", "width"), [(0, "", 64), (1, "l_0", 128), (2, "nl_1", 128)])
def test_projection_layers(layers, name, width):
    outputs, variables = shapes_of(build(width=0.25, projection_layers=layers, supervised_layer=layers), 8)
    assert [x.shape for x in outputs["projection_hiddens"]] == [(1, 64)] * layers + [(1, width)]
    assert outputs["projection"].shape == (1, width) and outputs["logits"].shape == (1, 10)
    names = [n for n in tf1_names(variables).values() if n.startswith("head_contrastive")]
    assert len(names) == max(5 * layers - 1, 0)  # the last batch norm has no beta
    assert all(n.startswith(f"head_contrastive/{name}/") for n in names[-4:])


def test_detached_logits_train_the_supervised_head_only():
    model = build(supervised_layer=1)
    variables = golden_variables(model, 8)
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))

    @partial(jax.jit, static_argnums=0)
    def gradient(detach):
        def loss(params):
            outputs = model.apply({**variables, "params": params}, images, detach_logits=detach)
            return jnp.sum(outputs["logits"] ** 2)

        return jax.grad(loss)(variables["params"])

    def trained(detach):
        parts = gradient(detach).items()
        return {name for name, part in parts if any(leaf.any() for leaf in jax.tree.leaves(part))}

    assert trained(detach=False) == {"encoder", "projection_head", "supervised_head"}
    assert trained(detach=True) == {"supervised_head"}


def test_bfloat16_computes_with_float32_parameters_and_statistics():
    images = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    results = []
    for dtype in ("float32", "bfloat16"):
        model = build(dtype=dtype)
        variables = golden_variables(model, 16)
        outputs, new = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
        assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves((shapes_of(model, 16)[1], new)))
        for name, value in outputs.items():
            expected = dtype if name.startswith(("initial", "block")) else "float32"
            assert all(x.dtype == expected for x in jax.tree.leaves(value)), name
        head = {collection: parts["projection_head"] for collection, parts in variables.items()}
        projection = model.projection_head.apply(head, jnp.linspace(-1, 1, 32).reshape(1, 32))[-1]
        results.append((outputs["features"], projection, new))
    # Both parts compute in bfloat16: rounding shows in their float32 outputs, and stays small.
    assert not np.array_equal(results[0][0], results[1][0])
    assert not np.array_equal(results[0][1], results[1][1])
    jax.tree.map(partial(assert_close, tolerance=0.03), results[1], results[0])


def batch_norm_and_gradients(x, weights, *, sync):
    module = resnet.batch_norm(train=True, sync=sync, dtype=jnp.float32)()
    statistics = {"mean": BN["moving_mean"], "var": BN["moving_var"]}

    def loss(x, params):
        variables = {"params": params, "batch_stats": statistics}
        y, new = module.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(y * weights), (y, new["batch_stats"])

    params = {"scale": BN["gamma"], "bias": BN["beta"]}
    (dx, dparams), (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)
    return {"y": y, "dx": dx, "dgamma": dparams["scale"], "dbeta": dparams["bias"],
            "moving_mean": new["mean"], "moving_var": new["var"]}  # fmt: skip


@pytest.mark.parametrize("sync", [False, True])
def test_batch_norm_matches_official(sync):
    """`sync` changes nothing outside a mapped step."""
    actual = jax.jit(partial(batch_norm_and_gradients, sync=sync))(BN["x"], BN["loss_weights"])
    for name, value in actual.items():
        assert_close(value, BN[f"tf2_plain/{name}"], 1e-5, name)

    # The official evaluation comes after the training step and uses the statistics it left.
    statistics = {"mean": actual["moving_mean"], "var": actual["moving_var"]}
    variables = {"params": {"scale": BN["gamma"], "bias": BN["beta"]}, "batch_stats": statistics}
    evaluate = resnet.batch_norm(train=False, sync=sync, dtype=jnp.float32)()
    assert_close(evaluate.apply(variables, BN["x"]), BN["tf2_plain/y_eval"], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 5, 4)])
def test_batch_norm_equals_flaxs(shape, train, dtype):
    x = (jax.random.normal(jax.random.key(0), shape) * 3 + 1).astype(dtype)
    ours = resnet.batch_norm(train=train, sync=False, dtype=dtype)(use_bias=len(shape) > 2)
    flax = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype, use_bias=len(shape) > 2)
    variables = jax.jit(ours.init)(jax.random.key(1), x)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, flax.init(jax.random.key(1), x)))
    variables = jax.tree.map(lambda array: array + jnp.linspace(0, 0.5, 4), variables)

    def results(module):
        def loss(variables, x):
            y, new = module.apply(variables, x, mutable=["batch_stats"])
            return (y.astype("float32") ** 3).mean(), (y, new)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x)

    actual, expected = results(ours), results(flax)
    jax.tree.map(partial(assert_close, tolerance=1e-6), actual[0][1][1], expected[0][1][1])  # in float32
    tolerance = 1e-5 if dtype == "float32" else 0.01
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), tolerance, tolerance)


def test_synchronised_batch_norm_matches_official():
    x, weights = (BN[name].reshape(2, 6, 3, 3, 5) for name in ("x", "loss_weights"))
    actual = jax.pmap(partial(batch_norm_and_gradients, sync=True), axis_name=parallel.AXIS)(x, weights)
    for name in ("y", "dx"):
        assert_close(actual[name].reshape(BN["x"].shape), BN[f"sync2/{name}"], 1e-5, name)
    for name in ("dgamma", "dbeta"):
        assert_close(actual[name], BN[f"sync2/{name}_per_replica"], 1e-5, name)
    for name in ("moving_mean", "moving_var"):
        assert_close(actual[name], np.stack([BN[f"sync2/{name}"]] * 2), 1e-5, name)


@pytest.mark.parametrize("sync", [True, False])
def test_two_devices_see_one_batch_if_synchronised(sync):
    """In every layer of encoder and head: how the batch is split matters only without `sync`."""
    model = build(0, sk_ratio=0.0625, stem="imagenet", sync_batch_norm=sync)
    brightness = jnp.linspace(0.1, 1, 8)[:, None, None, None]
    images = brightness * jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    variables = golden_variables(model, 16)
    train = partial(model.apply, train=True, mutable=["batch_stats"])
    whole = jax.jit(train)(variables, images)
    on_devices = jax.pmap(train, axis_name=parallel.AXIS, in_axes=(None, 0))
    split = on_devices(variables, images.reshape(2, 4, 16, 16, 3))

    def same(actual, expected):
        return np.allclose(actual, expected, rtol=1e-3, atol=1e-4)

    outputs = [same(split[0][k].reshape(whole[0][k].shape), whole[0][k]) for k in ("features", "projection")]
    statistics = jax.tree.leaves(jax.tree.map(same, split[1], whole[1]))
    assert all(outputs + statistics) if sync else not any(outputs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", 51), ("width", 0.01), ("sk_ratio", -0.5), ("se_ratio", 2.0), ("stem", "stl10"),
        ("projection_layers", -1), ("projection_dim", 0), ("supervised_layer", 3), ("supervised_layer", -1),
        ("dtype", "half"), ("encoder", "vit"), ("max_pool", "caffe"), ("bottleneck_width", 0.0),
        ("width", "wide"), ("input_std", (0.2, 0.2, 0.2)),
    ],
)  # fmt: skip
def test_bad_values_are_one_line_errors(key, value):
    with pytest.raises(UserError) as error:
        build(**{"depth": 18, key: value})
    message = str(error.value)
    assert "\n" not in message
    assert f"model.{key}={value}" in message.replace("'", "")
    assert (
        f"set --config.model.{key} to" in message or f"--config.model.{key}=" in message or key == "encoder"
    )


def test_keys_that_a_config_lacks_have_the_defaults_of_base():
    """As configs of older runs and of official checkpoints lack them."""
    assert build() == build(
        encoder="resnet", max_pool="tensorflow", project_first=True, input_mean=None, bottleneck_width=1.0
    )
    namespace = types.SimpleNamespace(depth=50, width=2, dtype="float32")
    model = make_model(namespace, 0)
    assert (model.encoder.width, model.encoder.stem, model.projection_head.num_layers) == (2, "auto", 2)
    assert describe(namespace) == "ResNet-50 2x"
