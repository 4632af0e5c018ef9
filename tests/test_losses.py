"""Losses against the official implementation's numbers and float64 recomputations of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from simclr_jax import losses

NTXENT = np.load(Path(__file__).parent / "goldens/ntxent.npz")
MISC = np.load(Path(__file__).parent / "goldens/misc.npz")
CASES = sorted({key.split("/")[0] for key in NTXENT} - {"mr2_4_16"})


@pytest.fixture(autouse=True, params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["32", "64"])
def bits(request):
    """Every test runs in JAX's 64-bit mode, too, in which other types come of what has none."""
    with jax.enable_x64(request.param):
        yield


def loss_of(hidden, case, axis_name=None, tile=None):
    view1, view2 = jnp.split(hidden, 2)
    return losses.nt_xent(
        view1,
        view2,
        temperature=float(NTXENT[f"{case}/temperature"]),
        hidden_norm=bool(NTXENT[f"{case}/hidden_norm"]),
        axis_name=axis_name,
        tile=tile,
    )


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def assert_gradients_close(actual, expected):
    row_maximum = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(actual - expected) <= 2e-5 * row_maximum).all()


@pytest.mark.parametrize("tile", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_nt_xent_matches_official(case, tile):
    evaluate = jax.jit(jax.value_and_grad(lambda hidden: loss_of(hidden, case, tile=tile), has_aux=True))
    (loss, metrics), gradient = evaluate(NTXENT[f"{case}/hidden"])
    assert_close(loss, NTXENT[f"{case}/loss"])
    assert_close(loss, NTXENT[f"{case}/np64_loss"])
    assert_gradients_close(gradient, NTXENT[f"{case}/np64_grad"])
    assert_close(metrics["contrastive_accuracy"], NTXENT[f"{case}/contrast_acc"])
    assert_close(metrics["contrastive_entropy"], NTXENT[f"{case}/np64_entropy"])


@pytest.mark.parametrize("tile", [0, 3])
def test_nt_xent_over_two_devices_matches_official(tile):
    def step(hidden):
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            hidden, "mr2_4_16", "batch", tile
        )
        return loss, metrics, gradient, jax.lax.pmean(loss, "batch")

    hidden = NTXENT["mr2_4_16/hidden_per_replica"]
    loss, metrics, gradient, global_loss = jax.pmap(step, axis_name="batch")(hidden)
    assert_close(loss, NTXENT["mr2_4_16/loss_per_replica"])
    assert_close(global_loss[0], NTXENT["mr2_4_16/np64_global_loss"])
    assert_close(metrics["contrastive_accuracy"], NTXENT["mr2_4_16/contrast_acc_per_replica"])
    assert_close(metrics["contrastive_entropy"], NTXENT["mr2_4_16/contrast_entropy_per_replica"])
    # Each device holds the sum over devices of what its rows contribute: the mean is half of it.
    assert_gradients_close(gradient / 2, NTXENT["mr2_4_16/grad_of_mean_loss_per_replica"])


def loss_in_float64(views, keys, memory, rows, temperature, decoupled):
    """The loss as its definition has it, view by view: arrays [2, b, d] and [m, d] of float64."""

    def normalized(x):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

    views, keys, memory = (normalized(np.asarray(x, np.float64)) for x in (views, keys, memory))
    total = 0.0
    for mine, others in ((0, 1), (1, 0)):
        for row, view in enumerate(views[mine]):
            negatives = [key for side in keys for other, key in enumerate(side) if other != row]
            negatives += [*memory[:rows]]
            positive = view @ keys[others, row] / temperature
            exponents = np.array([view @ negative / temperature for negative in negatives])
            if not decoupled:
                exponents = np.append(exponents, positive)
            total += np.log(np.exp(exponents).sum()) - positive
    return total / views.shape[1]


@pytest.mark.parametrize("tile", [0, 3])
@pytest.mark.parametrize("loss", ["nt_xent", "dcl"])
@pytest.mark.parametrize("size, rows", [(0, 0), (7, 7), (7, 4), (7, 0)])
@pytest.mark.parametrize("with_keys", [False, True])
def test_keys_memory_and_decoupling_match_their_definition(with_keys, size, rows, loss, tile):
    rng = np.random.default_rng(size + rows)
    views, keys = rng.standard_normal((2, 2, 5, 4)).astype(np.float32)
    memory = rng.standard_normal((size, 4)).astype(np.float32)
    options = {"memory": memory, "memory_rows": jnp.int32(rows)} if size else {}

    def ours(views, keys, options):
        keys = {"keys": tuple(keys)} if with_keys else {}
        return losses.LOSSES[loss](*views, temperature=0.5, tile=tile, **keys, **options)[0]

    def expected(views):
        return loss_in_float64(views, keys if with_keys else views, memory, rows, 0.5, loss == "dcl")

    value, gradient = jax.jit(jax.value_and_grad(ours))(views, keys, options)
    assert_close(value, expected(views))
    step = 1e-5
    numerical = np.zeros(views.shape)
    for place in np.ndindex(*views.shape):
        high, low = views.astype(np.float64), views.astype(np.float64)
        high[place] += step
        low[place] -= step
        numerical[place] = (expected(high) - expected(low)) / (2 * step)
    np.testing.assert_allclose(gradient, numerical, atol=2e-6)
    leaks = jax.grad(lambda others: ours(views, *others), allow_int=True)((keys, options))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(leaks) if leaf.dtype != jax.dtypes.float0)


def assert_same_on_devices(step, arrays, devices):
    """Compares step(arrays, axis_name) -> ((loss, metrics), gradient) with that of one device."""
    (loss, metrics), gradient = jax.jit(step)(arrays)
    sharded = arrays.reshape(len(arrays), devices, -1, arrays.shape[2]).swapaxes(0, 1)
    (losses_, metrics_), gradients = jax.pmap(lambda v: step(v, "batch"), axis_name="batch")(sharded)
    np.testing.assert_allclose(losses_.mean(), loss, rtol=1e-5)
    np.testing.assert_allclose(
        gradients.swapaxes(0, 1).reshape(gradient.shape) / devices, gradient, atol=1e-6
    )
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_[name].mean(), value, rtol=1e-5)


@pytest.mark.parametrize("tile", [0, 3])
@pytest.mark.parametrize("devices", [2, 8])
def test_memory_and_keys_do_not_depend_on_the_number_of_devices(devices, tile):
    rng = np.random.default_rng(devices)
    arrays = rng.standard_normal((4, 16, 12)).astype(np.float32)  # views and keys of both sides
    memory = rng.standard_normal((9, 12)).astype(np.float32)

    def step(arrays, axis_name=None):
        def loss(views):
            keys = tuple(arrays[2:])
            options = {"keys": keys, "memory": memory, "memory_rows": 6, "tile": tile}
            return losses.dcl(*views, temperature=0.3, axis_name=axis_name, **options)

        return jax.value_and_grad(loss, has_aux=True)(arrays[:2])

    assert_same_on_devices(step, arrays, devices)


@pytest.mark.parametrize("tile", [1, 8, 24, 100])
@pytest.mark.parametrize("hidden_norm", [True, False])
def test_tiles_equal_the_whole_matrix(tile, hidden_norm):
    views = jnp.asarray(np.random.default_rng(tile).standard_normal((2, 24, 6)), jnp.float32)
    views = views.at[1, 3].set(views[1, 7])  # equally similar to everything: the first one counts

    def loss_fn(views, tile):
        return losses.nt_xent(*views, temperature=0.1, hidden_norm=hidden_norm, tile=tile)

    evaluate = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=1)
    (whole, metrics), gradient = evaluate(views, 0)
    (tiled, tiled_metrics), tiled_gradient = evaluate(views, tile)
    np.testing.assert_allclose(tiled, whole, rtol=1e-5)
    np.testing.assert_allclose(tiled_gradient, gradient, atol=1e-5 * np.abs(gradient).max())
    for name, value in metrics.items():
        np.testing.assert_allclose(tiled_metrics[name], value, rtol=1e-5)


def largest_array(jaxpr):
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [largest_array(inner) for equation in jaxpr.eqns for inner in jaxprs_in_params(equation.params)]
    return max(sizes + inner, default=0)


def test_large_batches_never_hold_their_square():
    def largest(pairs):
        views = jax.ShapeDtypeStruct((2, pairs, 128), jnp.float32)
        gradient = jax.grad(lambda views: losses.nt_xent(*views, temperature=0.1)[0])
        return largest_array(jax.make_jaxpr(gradient)(views).jaxpr)

    assert largest(1024) >= 1024**2
    assert largest(2**17) == 2 * 2**17 * 128


@pytest.mark.parametrize("tile", [0, 3])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_nt_xent_does_not_depend_on_the_number_of_devices(devices, tile):
    rng = np.random.default_rng(devices)
    views = rng.standard_normal((2, 16, 12)).astype(np.float32)

    def step(views, axis_name=None):
        return jax.value_and_grad(
            lambda v: losses.nt_xent(v[0], v[1], temperature=0.3, axis_name=axis_name, tile=tile),
            has_aux=True,
        )(views)

    assert_same_on_devices(step, views, devices)


def test_nt_xent_computes_in_float32_from_bfloat16():
    hidden = NTXENT["c2/hidden"].astype(jnp.bfloat16)
    loss, _ = loss_of(hidden, "c2")
    assert loss.dtype == jnp.float32
    assert_close(loss, loss_of(hidden.astype(jnp.float32), "c2")[0])


def test_nt_xent_of_zero_projections_has_a_finite_gradient():
    gradient = jax.grad(lambda h: loss_of(h, "c0")[0])(jnp.zeros((8, 8)))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("case", range(len(MISC["kd/temperatures"])))
def test_distillation_matches_official(case):
    def loss_fn(student, teacher):
        return losses.distillation(student, teacher, temperature=float(MISC["kd/temperatures"][case]))

    logits = MISC["kd/student_logits"], MISC["kd/teacher_logits"]
    loss, (student, teacher) = jax.value_and_grad(loss_fn, argnums=(0, 1))(*logits)
    np.testing.assert_allclose(loss, MISC["kd/loss"][case], rtol=1e-5)
    np.testing.assert_allclose(student, MISC["kd/grad_student"][case], rtol=1e-5, atol=1e-6)
    assert not teacher.any()


def test_softmax_cross_entropy_and_top_k_match_official():
    logits, labels = jnp.asarray(MISC["sup/logits"]), jnp.asarray(MISC["sup/labels"])
    loss, gradient = jax.value_and_grad(losses.softmax_cross_entropy)(logits, labels)
    np.testing.assert_allclose(loss, MISC["sup/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, MISC["sup/grad"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses.top_k_correct(logits, labels, k=1).mean(), MISC["sup/top1"])
    np.testing.assert_allclose(losses.top_k_correct(logits, labels, k=5).mean(), MISC["sup/top5"])


def test_top_k_of_fewer_classes_than_k_counts_every_row():
    assert losses.top_k_correct(jnp.zeros((2, 3)), jnp.array([0, 2]), k=5).all()
