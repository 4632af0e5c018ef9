"""Schedules and optimisers against the official implementation's numbers."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax import optim
from simclr_jax.config import validation
from simclr_jax.process.errors import UserError

GOLDENS = Path(__file__).parent / "goldens"
LARS = np.load(GOLDENS / "lars.npz")
SCHEDULES = json.loads((GOLDENS / "schedule.json").read_text())


@pytest.fixture(autouse=True, params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["32", "64"])
def bits(request):
    """Every test runs in JAX's 64-bit mode, too, in which other types come of what has none."""
    with jax.enable_x64(request.param):
        yield


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedule_matches_official(case):
    golden = SCHEDULES[case]
    sizes = {"batch_size": golden["train_batch_size"], "num_examples": golden["num_examples"]}
    sizes["epochs"] = golden["train_epochs"]
    assert optim.total_steps(**sizes) == golden["total_steps"]
    schedule = optim.warmup_cosine(
        golden["learning_rate"],
        scaling=golden["learning_rate_scaling"],
        warmup_epochs=golden["warmup_epochs"],
        **sizes,
    )
    rates = jnp.array([schedule(step) for step in golden["steps"]])
    np.testing.assert_allclose(rates, golden["lr_tf2"], rtol=0, atol=1.3e-7 * golden["peak"])
    np.testing.assert_allclose(rates, golden["lr_tf1"], rtol=0, atol=1.3e-7 * golden["peak"])


def test_num_steps_wins_over_epochs():
    schedule = optim.warmup_cosine(
        0.3, scaling="linear", batch_size=256, num_examples=2560, epochs=1000, warmup_epochs=1, num_steps=20
    )
    assert schedule(10) == pytest.approx(0.3)
    assert schedule(20) == pytest.approx(0, abs=1e-7)


def follow(optimizer, golden, tolerance=2e-6):
    """Applies the six golden gradients and compares the parameters after every step."""
    names = [key.removeprefix("init/") for key in LARS if key.startswith("init/")]
    params = {name: jnp.asarray(LARS[f"init/{name}"]) for name in names}
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for step in range(len(LARS["lrs"])):
        gradients = {name: jnp.asarray(LARS[f"grads/{name}"][step]) for name in names}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name in names:
            expected = LARS[f"{golden}/param/{name}"][step]
            atol = 1e-6 + tolerance * np.abs(expected).max()
            np.testing.assert_allclose(params[name], expected, rtol=0, atol=atol, err_msg=name)


def rates(step):
    return jnp.asarray(LARS["lrs"])[step]


@pytest.mark.parametrize("weight_decay", ["1e-4", "0"])
def test_lars_matches_official(weight_decay):
    optimizer = optim.make_optimizer("lars", rates, weight_decay=float(weight_decay))
    follow(optimizer, f"lars_wd{weight_decay}")


def test_sgd_matches_official():
    follow(optim.make_optimizer("sgd", rates, weight_decay=0), "tf1_sgd_nesterov")


def test_adam_matches_official():
    # optax adds epsilon after the bias correction, TensorFlow before: they differ where gradients are tiny.
    follow(optim.make_optimizer("adam", rates, weight_decay=0), "tf1_adam", tolerance=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_sgd_and_adam_decay_all_but_batch_norm(name):
    params = {"bn1": {"scale": jnp.ones(2)}, "dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    optimizer = optim.make_optimizer(name, 0.1, weight_decay=0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = jax.tree.map(lambda update: bool(update.any()), updates)
    assert moved == {"bn1": {"scale": False}, "dense": {"kernel": True, "bias": True}}


def test_lars_takes_the_supervised_head_and_batch_norm_at_the_full_rate():
    params = {
        "encoder": {"bn_init": {"scale": jnp.ones(2)}, "conv": {"kernel": jnp.ones(2)}},
        "supervised_head": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
    }
    optimizer = optim.make_optimizer("lars", 1.0, weight_decay=0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    full = -np.ones(2)
    np.testing.assert_allclose(updates["encoder"]["bn_init"]["scale"], full)
    np.testing.assert_allclose(updates["supervised_head"]["kernel"], full)
    np.testing.assert_allclose(updates["supervised_head"]["bias"], full)
    np.testing.assert_allclose(updates["encoder"]["conv"]["kernel"], 1e-3 * full, rtol=1e-5)


def test_an_optimizer_of_ones_own_is_an_entry(monkeypatch):
    config = importlib.import_module("configs.digits").get_config()
    config.optimizer.name = "plain"
    with pytest.raises(UserError, match="optimizer.name='plain': set it to 'lars', 'sgd' or 'adam'"):
        validation.check(config, file="digits")
    plain = lambda schedule, weight_decay, momentum: optax.sgd(schedule)  # noqa: E731
    monkeypatch.setitem(optim.OPTIMIZERS, "plain", plain)
    assert validation.check(config, file="digits") == []
    optimizer, params = optim.make_optimizer("plain", 0.5, weight_decay=1.0), jnp.ones(2)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-0.5, -0.5])


def test_unknown_names_are_user_errors():
    with pytest.raises(UserError, match="'lamb'.*'lars', 'sgd' or 'adam'"):
        optim.make_optimizer("lamb", 0.1, weight_decay=0)
    with pytest.raises(UserError, match="'cubic'.*'linear' or 'sqrt'"):
        optim.scaled_learning_rate(0.3, scaling="cubic", batch_size=1)
