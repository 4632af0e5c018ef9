"""The train step over several devices, and the loop."""

import signal
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_runs
from conftest import log_of
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import digits
from simclr_jax import checkpoint, losses, train
from simclr_jax.models import make_init, make_model
from simclr_jax.parallel import AXIS
from simclr_jax.process import stopping
from simclr_jax.process.errors import UserError
from simclr_jax.profiling import chips
from simclr_jax.tasks import pretrain
from simclr_jax.views import distort, recipe

pytestmark = pytest.mark.slow

ROWS = 16


def config_of(**model):
    config = digits.get_config()
    config.model.update(width=0.125, stem="auto")
    config.model.update(model)
    return config


def views_batch(seed=0, on_device=False):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (ROWS, 16, 16, 3), np.uint8) for name in ("view1", "view2")}
    images |= {"label": rng.integers(0, 10, ROWS).astype(np.int32)}
    if on_device:
        images |= {name: images[name].astype(np.float32) for name in ("view1", "view2")}
        images |= {name: rng.random((len(recipe.DRAWS), ROWS), np.float32).T for name in ("draws1", "draws2")}
    return images


class Frozen:
    """A model whose batch norm keeps to its moving statistics."""

    def __init__(self, model):
        self.init, self.channels = model.init, model.channels
        self.apply = lambda *arguments, **options: model.apply(*arguments, **options | {"train": False})


def step_on(devices, config, frozen=False):
    """One step on so many devices, with an optimiser that keeps the raw gradient as its state."""
    model = make_model(config.model, num_classes=10, remat=config.remat)
    model = Frozen(model) if frozen else model
    keep_gradient = optax.trace(decay=0.0)
    task = train.Task(
        init=make_init(model, 16),
        loss=pretrain.make_loss(model, config),
        optimizer=keep_gradient,
        schedule=lambda step: 0.1,
        batches=None,
        num_steps=1,
        meta={},
    )
    step = train.make_train_step(task.loss, task.optimizer, task.schedule)
    step = jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, devices=jax.devices()[:devices])
    batch = views_batch(on_device=config.augment.on_device)
    batch = {name: rows.reshape(devices, -1, *rows.shape[1:]) for name, rows in batch.items()}
    state, results = step(train.init_state(task, seed=3), batch)
    return jax.device_get((state["opt_state"].trace, state["batch_stats"], results))


def assert_trees_close(actual, expected, tolerance):
    """The largest difference in every array is within `tolerance` of the array's largest value."""
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        scale = np.abs(b).max()
        assert np.abs(a - b).max() <= tolerance * max(scale, 1e-6), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def on_one_device():
    return step_on(1, config_of())


def distorting_config():
    config = config_of()
    config.augment.update(on_device=True, blur=True, crop_dtype="float32")
    return config


@pytest.fixture(scope="module")
def distorted_on_one_device():
    return step_on(1, distorting_config())


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_raw_gradients_and_statistics_do_not_depend_on_the_number_of_devices(devices, on_one_device):
    assert_trees_close(step_on(devices, config_of()), on_one_device, tolerance=1e-4)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_nor_where_the_devices_distort_the_views(devices, distorted_on_one_device):
    actual = step_on(devices, distorting_config())
    assert_trees_close(actual, distorted_on_one_device, tolerance=1e-4)


def test_views_distorted_in_the_step_have_the_gradient_of_the_same_views(
    distorted_on_one_device, monkeypatch
):
    """Also in microbatches, of whose parts each distorts its own."""
    config, batch = distorting_config(), views_batch(on_device=True)
    views = {
        f"view{view}": distort.distort(
            batch[f"view{view}"], batch[f"draws{view}"], recipe.DEFAULT._replace(color_jitter_strength=0.75)
        )
        for view in "12"
    }
    frozen = step_on(1, config, frozen=True)
    config.microbatches = 4
    assert_trees_close(step_on(1, config, frozen=True), frozen, tolerance=3e-4)
    plain = config_of()
    monkeypatch.setattr(sys.modules[__name__], "views_batch", lambda **_: views | {"label": batch["label"]})
    assert_trees_close(step_on(1, plain), distorted_on_one_device, tolerance=1e-5)


def test_unsynchronised_batch_norm_does_depend_on_it(on_one_device):
    _, statistics, _ = step_on(4, config_of(sync_batch_norm=False))
    with pytest.raises(AssertionError):
        assert_trees_close(statistics, on_one_device[1], tolerance=1e-3)


@pytest.mark.parametrize("devices", [1, 4])
def test_microbatches_have_the_gradient_of_the_whole_batch(devices):
    plain, in_parts = config_of(), config_of()
    in_parts.microbatches = 4
    expected = step_on(1, plain, frozen=True)
    actual = step_on(devices, in_parts, frozen=True)
    # Over several devices sums are taken in another order.
    assert_trees_close(actual, expected, tolerance=1e-5 if devices == 1 else 1e-4)


def test_microbatches_normalise_by_their_own_statistics():
    config = config_of()
    config.microbatches = 2
    model = make_model(config.model, num_classes=0)
    variables = make_init(model, 16)(jax.random.key(3))
    batch = views_batch()

    def expected_loss(params):
        statistics, parts = variables["batch_stats"], []
        for rows in (slice(0, 8), slice(8, 16)):
            images = jnp.concatenate([batch["view1"][rows], batch["view2"][rows]])
            outputs, updates = model.apply(
                {"params": params, "batch_stats": statistics}, images, train=True, mutable=["batch_stats"]
            )
            statistics = updates["batch_stats"]
            parts.append(jnp.split(outputs["projection"], 2))
        view1, view2 = (jnp.concatenate(view) for view in zip(*parts))
        return losses.nt_xent(view1, view2, temperature=config.temperature)[0], statistics

    def loss(params):
        value, (statistics, _) = pretrain.make_loss(model, config)(params, variables["batch_stats"], batch)
        return value, statistics

    actual, expected = (
        jax.jit(jax.value_and_grad(function, has_aux=True))(variables["params"])
        for function in (loss, expected_loss)
    )
    # Sums in another order: 1.1e-5 on one processor, less on others.
    assert_trees_close(actual, expected, tolerance=3e-5)


def test_rematerialised_step_is_the_same_step(on_one_device):
    config = config_of()
    config.remat = True
    assert_trees_close(step_on(1, config), on_one_device, tolerance=1e-5)


def test_gradient_is_that_of_the_plain_loss(on_one_device):
    config = config_of()
    model = make_model(config.model, num_classes=10)
    variables = make_init(model, 16)(jax.random.key(3))
    loss = pretrain.make_loss(model, config)
    gradient = jax.grad(lambda params: loss(params, variables["batch_stats"], views_batch())[0])(
        variables["params"]
    )
    assert_trees_close(on_one_device[0], gradient, tolerance=1e-4)


def test_second_step_does_not_recompile():
    config = config_of()
    model = make_model(config.model, num_classes=10)
    traces = []

    def loss(*arguments):
        traces.append(1)
        return pretrain.make_loss(model, config)(*arguments)

    optimizer = optax.sgd(0.1)
    step = jax.pmap(
        train.make_train_step(loss, optimizer, lambda _: 0.1), AXIS, in_axes=(None, 0), out_axes=None
    )
    task = train.Task(make_init(model, 16), loss, optimizer, None, None, 1, {})
    state = jax.device_put(
        train.init_state(task, 0), NamedSharding(Mesh(jax.devices(), (AXIS,)), PartitionSpec())
    )
    batch = {name: rows.reshape(8, -1, *rows.shape[1:]) for name, rows in views_batch().items()}
    for _ in range(3):
        state, _ = step(state, batch)
    assert len(traces) == 1


@pytest.mark.parametrize("batch_size, nearest", [(12, "8|16"), (3, "8"), (0, "8")])
def test_batch_that_does_not_divide_over_the_devices_is_a_user_error(batch_size, nearest):
    with pytest.raises(
        UserError, match=rf"batch_size={batch_size} .* 8 devices.* multiple of 8, such as ({nearest})"
    ):
        train.check_batch_size(batch_size, 8)
    with pytest.raises(UserError, match="batch_size=24 .* 2 devices of 8 microbatches each.* such as 32"):
        train.check_batch_size(24, 2, 8)


def linear_task(num_steps, *, evaluate=None, explode_at=None, on_batch=None):
    """A task of one weight that learns from one number a row; `batches` tell which step they are for."""

    def batches(start_step):
        step = start_step
        while True:
            step += 1
            if on_batch:
                on_batch(step)
            value = np.inf if step == explode_at else step
            yield {"x": np.full((8,), value, np.float32), "index": np.arange(8)}

    def loss(params, batch_stats, batch):
        value = (params["w"] * batch["x"]).mean()
        return value, (batch_stats, {"x": batch["x"].mean()})

    return train.Task(
        init=lambda key: {"params": {"w": jnp.ones(())}, "batch_stats": {}},
        loss=loss,
        optimizer=optax.sgd(0.01),
        schedule=lambda step: 0.01,
        batches=batches,
        num_steps=num_steps,
        meta={"config": {}, "num_classes": 0},
        evaluate=evaluate,
        evaluate_every_steps=4,
        best="score" if evaluate else None,
    )


@pytest.fixture
def loop_config():
    config = config_of()
    config.update(log_every_steps=2, checkpoint_every_steps=3, batch_size=8, keep_checkpoints=2)
    return config


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_loop_logs_averages_and_keeps_the_newest_checkpoints(tmp_path, loop_config):
    state = train.fit(linear_task(10), loop_config, tmp_path)
    assert int(state["step"]) == 10
    np.testing.assert_allclose(state["params"]["w"], 1 - 0.01 * sum(range(1, 11)), rtol=1e-5)
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [2, 4, 6, 8, 10]
    assert [line["x"] for line in log] == [1.5, 3.5, 5.5, 7.5, 9.5]
    assert all(line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in log)
    assert saved_steps(tmp_path) == [9, 10]


def test_loop_keeps_the_best_checkpoint_as_well(tmp_path, loop_config):
    def evaluate(state):
        return {"score": 1.0 if int(state["step"]) == 4 else 0.5}

    train.fit(linear_task(16, evaluate=evaluate), loop_config, tmp_path)
    assert saved_steps(tmp_path) == [4, 15, 16]
    assert [line["step"] for line in log_of(tmp_path) if "score" in line] == [4, 8, 12, 16]


def test_evaluation_before_the_first_step_is_of_a_fresh_run(tmp_path, loop_config):
    seen = []

    def evaluate(state):
        seen.append(int(state["step"]))
        return {"score": float(state["params"]["w"])}

    task = linear_task(4, evaluate=evaluate)._replace(evaluate_first=True)
    train.fit(task, loop_config, tmp_path)
    assert log_of(tmp_path)[0] == {"step": 0, "score": 1.0}
    assert [line["step"] for line in log_of(tmp_path)] == [0, 2, 4] and saved_steps(tmp_path) == [3, 4]
    train.fit(task._replace(num_steps=6), loop_config, tmp_path)
    assert seen == [0, 4, 6]


def test_a_signal_in_the_evaluation_before_the_first_step_stops_after_it(tmp_path, loop_config):
    def evaluate(state):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal did not stop it")

    task = linear_task(4, evaluate=evaluate)._replace(evaluate_first=True)
    with pytest.raises(stopping.Stopped) as stopped:
        train.fit(task, loop_config, tmp_path)
    assert stopped.value.code == 0 and saved_steps(tmp_path) == [1]
    assert [line["step"] for line in log_of(tmp_path)] == []
    train.fit(task._replace(evaluate=lambda state: {"score": 1.0}), loop_config, tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == [2, 4]


def test_stopped_and_restarted_equals_straight(tmp_path, loop_config, capsys):
    straight = train.fit(linear_task(10), loop_config, tmp_path / "straight")

    def stop_at_5(step):
        if step == 5 + 2:  # two batches are prefetched
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        train.fit(linear_task(10, on_batch=stop_at_5), loop_config, tmp_path / "restarted")
    assert stopped.value.code == 0
    assert "SIGTERM" in capsys.readouterr().out
    (step,) = [step for step in saved_steps(tmp_path / "restarted") if step not in (3, 6)]
    seen = []
    restarted = train.fit(linear_task(10, on_batch=seen.append), loop_config, tmp_path / "restarted")
    assert seen[0] == step + 1
    assert "resuming after step" in capsys.readouterr().out
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), restarted, straight))
    steps = [line["step"] for line in log_of(tmp_path / "restarted")]
    assert steps == [2, 4, 6, 8, 10]


def test_ctrl_c_exits_with_130(tmp_path, loop_config):
    def interrupt(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        train.fit(linear_task(10, on_batch=interrupt), loop_config, tmp_path)
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_utilisation_is_that_of_the_chips_peak_where_it_is_known(tmp_path, loop_config, monkeypatch):
    def batches(start_step):
        while True:
            yield {"x": np.ones((8, 5), np.float32)}

    def loss(params, batch_stats, batch):
        hidden = batch["x"] @ params["frozen"] @ params["w"]
        return hidden.mean(), (batch_stats, {})

    task = linear_task(4)._replace(
        init=lambda key: {"params": {"frozen": jnp.ones((5, 3)), "w": jnp.ones((3, 2))}, "batch_stats": {}},
        loss=loss,
        batches=batches,
        trained=lambda path: path == "w",
    )
    train.fit(task, loop_config, tmp_path / "unknown")
    assert not [line for line in log_of(tmp_path / "unknown") if "mfu" in line]
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(memory=1, flops=1e-6, bandwidth=1, link=1, slowness=1))
    train.fit(task, loop_config, tmp_path / "known")
    # A row a device: the frozen product forwards, the other one forwards and for its gradient.
    seconds = (2 * 5 * 3 + 2 * 2 * 3 * 2) / 1e6
    for line in log_of(tmp_path / "known"):
        assert line["mfu"] == pytest.approx(seconds * line["images_per_second"] / 8)


def test_finished_run_starts_no_step(tmp_path, loop_config):
    train.fit(linear_task(4), loop_config, tmp_path)
    state = train.fit(linear_task(4), loop_config, tmp_path)
    assert int(state["step"]) == 4


def test_non_finite_loss_stops_the_run_and_saves_nothing_of_it(tmp_path, loop_config):
    with pytest.raises(UserError, match="loss is (inf|nan|-inf) at step 5: .*learning rate"):
        train.fit(linear_task(10, explode_at=5), loop_config, tmp_path)
    assert saved_steps(tmp_path) == [3]
    variables, _ = checkpoint.load_params(tmp_path)
    assert np.isfinite(variables["params"]["w"])


def test_steps_in():
    config = config_of()
    config.batch_size = 100
    assert partial(train.steps_in, config=config, num_examples=1000)(1.5) == 15
    assert train.steps_in(0.001, config, 1000) == 1


# ----------------------------------------------------------------- state beside the weights


def remember(variables):
    """An average of the weights, and a queue of earlier projections: the state of MoCo (arXiv 1911.05722)."""
    return {"average": variables["params"], "queue": jnp.zeros((2 * ROWS, 128)), "filled": jnp.zeros((), int)}


def note(state, kept):
    """Moves the average on, and puts the projections of the whole batch into the queue."""
    extra = state["extra"]
    new = jax.lax.all_gather(kept, AXIS, tiled=True)
    return {
        "average": jax.tree.map(lambda a, w: 0.9 * a + 0.1 * w, extra["average"], state["params"]),
        "queue": jnp.concatenate([new, extra["queue"]])[: 2 * ROWS],
        "filled": extra["filled"] + len(new),
    }


def with_memory(num_steps=5):
    """Pretraining whose views also look away from what the averaged network made of earlier ones."""
    config = config_of()
    model = make_model(config.model, num_classes=0)

    def loss(params, batch_stats, batch, extra):
        def project(params, images):
            variables = {"params": params, "batch_stats": batch_stats}
            outputs, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return outputs["projection"], updates["batch_stats"]

        view1, batch_stats_ = project(params, batch["view1"])
        view2, _ = project(jax.lax.stop_gradient(extra["average"]), batch["view2"])
        value, results = losses.nt_xent(view1, view2, temperature=0.5, axis_name=AXIS)
        value += 0.1 * (view1 @ extra["queue"].T).mean()
        return value, (batch_stats_, results | {"kept": view2})

    def batches(start):
        while True:
            start += 1
            yield views_batch(seed=start)

    return config, train.Task(
        init=make_init(model, 16),
        loss=loss,
        optimizer=optax.sgd(0.1, momentum=0.9),
        schedule=lambda step: 0.1,
        batches=batches,
        num_steps=num_steps,
        meta={"config": config.to_dict(), "num_classes": 0},
        extra=remember,
        after_update=note,
    )


def test_state_beside_the_weights_is_that_of_the_whole_batch_on_any_devices():
    _, task = with_memory()
    states = {}
    for devices in (1, 4):
        step = train.mapped_step(task, jax.devices()[:devices])
        state = jax.device_get(train.init_state(task, 0))
        for seed in (1, 2, 3):
            batch = {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in views_batch(seed).items()}
            state, results = step(state, batch)
            assert "kept" not in results
        states[devices] = jax.device_get(state["extra"])
    assert states[1]["filled"] == 3 * ROWS
    assert_trees_close(states[4], states[1], tolerance=1e-3)
    start = task.extra(train.init_state(task, 0))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[1]["average"], start["average"])
    assert max(jax.tree.leaves(moved)) > 0


def test_state_beside_the_weights_outlives_a_restart_to_the_bit(tmp_path, monkeypatch):
    config, task = with_memory()
    with config.unlocked():
        config.update(log_every_steps=1, checkpoint_every_steps=2)
    whole = train.fit(task, config, tmp_path / "whole")
    train.fit(task._replace(num_steps=3), config, tmp_path / "again")
    resumed = train.fit(task, config, tmp_path / "again")
    assert int(resumed["extra"]["filled"]) == 5 * ROWS
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_that_began_with_another_order_of_a_stream_says_so(tmp_path, capsys):
    config = config_of()
    config.update(checkpoint_every_steps=2, keep_checkpoints=2, log_every_steps=2, profile_steps=None)
    orders = [(None, 2), (None, 4), ("blocks", 6), ("blocks", 8)]  # and steps; the first two know no order
    for order, num_steps in orders:
        task = small_runs.task_of(num_steps=num_steps)
        train.fit(task._replace(meta=task.meta | ({"order": order} if order else {})), config, tmp_path)
    said = capsys.readouterr().out.split("resuming after step ")[1:]
    assert ["streams were shuffled otherwise" in part for part in said] == [False, True, False]
