"""The memory of negatives: the same on any devices, which keys it holds, the average, stops, its use."""

import jax
import numpy as np
import optax
import pytest
from conftest import log_of, run_task, tiny_config
from flax.traverse_util import flatten_dict
from test_losses import loss_in_float64

import simclr_jax
from simclr_jax import checkpoint, memory, pretrained, train
from simclr_jax.data import datasets
from simclr_jax.models import make_model
from simclr_jax.process import UserError
from simclr_jax.tasks import pretrain
from simclr_jax.views import batches

pytestmark = pytest.mark.slow

SIZE, BATCH = 40, 16  # A step has 32 keys: the second one wraps around.
MEMORY = {"memory.size": SIZE, "memory.decay": 0.9}


def task_and_batch(number=0, **overrides):
    """A task whose steps subtract the raw gradients, its model, and a batch, by default its first."""
    config = tiny_config("pretrain", **{"batch_size": BATCH, **MEMORY, **overrides})
    source = datasets.load(config.dataset, "train", seed=0)
    model = make_model(config.model, source.num_classes, remat=config.remat)
    task = pretrain.make_task(config, model, source)._replace(
        optimizer=optax.sgd(1.0), schedule=lambda step: 1.0
    )
    batch = next(batches.train_batches(config, source, None, number))
    return task, model, {name: rows for name, rows in batch.items() if name != "index"}


def step_from(state, task, batch, devices):
    """The state and the metrics after a step from a state of `init_state` or of this function."""
    parts = {name: rows.reshape(devices, -1, *rows.shape[1:]) for name, rows in batch.items()}
    step = train.mapped_step(task, jax.devices()[:devices])
    return jax.device_get(step(jax.tree.map(np.copy, state), parts))


def assert_close(actual, expected, tolerance=1e-4):
    for path, leaf in flatten_dict(expected, sep="/").items():
        scale = max(np.abs(leaf).max(), 1e-6)
        assert np.abs(flatten_dict(actual, sep="/")[path] - leaf).max() <= tolerance * scale, path


@pytest.fixture(scope="module")
def one_device():
    """Task, model and batch; the states before, between and after two steps; the metrics of both."""
    task, model, batch = task_and_batch()
    return task, model, batch, *two_steps(task, batch)


def two_steps(task, batch):
    states, metrics = [jax.device_get(train.init_state(task, 0))], []
    for _ in range(2):
        state, results = step_from(states[-1], task, batch, 1)
        states.append(state)
        metrics.append(results)
    return states, metrics


@pytest.mark.journey
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_gradients_queue_and_average_are_those_of_one_device(devices):
    """In the second step the queue takes part. Rounding may turn a ReLU at 0: two of three batches count."""
    failures = []
    for first in range(3):
        task, _, batch = task_and_batch(first)
        states, metrics = two_steps(task, batch)
        try:
            for number in (0, 1):
                state, results = step_from(states[number], task, batch, devices)
                for name in ("params", "batch_stats", "extra"):
                    assert_close(state[name], states[number + 1][name])
                np.testing.assert_allclose(results["loss"], metrics[number]["loss"], rtol=1e-4)
        except AssertionError as error:
            failures.append(error)
    assert len(failures) < 2, failures


def keys_of(model, variables, batch):
    """The projections of both views by a network in training mode, [2 b, d]."""
    images = np.concatenate([batch["view1"], batch["view2"]])
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    return jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[0])(variables, images)[
        "projection"
    ]


def test_the_queue_turns_and_the_average_follows(one_device):
    _, model, batch, (start, first, second), _ = one_device
    assert not start["extra"]["queue"].any()
    assert [state["extra"]["rows"] for state in (start, first, second)] == [0, 32, SIZE]
    assert [state["extra"]["next"] for state in (start, first, second)] == [0, 32, 64 - SIZE]
    old = keys_of(model, start["extra"]["average"], batch)
    new = keys_of(model, first["extra"]["average"], batch)
    np.testing.assert_allclose(first["extra"]["queue"][:32], old, atol=1e-4)
    np.testing.assert_allclose(second["extra"]["queue"][32:], new[:8], atol=1e-4)
    np.testing.assert_allclose(second["extra"]["queue"][:24], new[8:], atol=1e-4)
    np.testing.assert_allclose(second["extra"]["queue"][24:32], old[24:], atol=1e-4)
    for name in ("params", "batch_stats"):
        expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start[name], first[name])
        assert_close(first["extra"]["average"][name], expected, 1e-5)


def test_a_queue_shorter_than_a_batch_holds_its_last_keys():
    task, model, batch = task_and_batch(**{"memory.size": 5})
    start = jax.device_get(train.init_state(task, 0))
    state, _ = step_from(start, task, batch, 2)
    keys = keys_of(model, start, batch)
    np.testing.assert_allclose(state["extra"]["queue"], keys[-5:], atol=1e-4)
    assert (state["extra"]["rows"], state["extra"]["next"]) == (5, 0)


def test_the_loss_compares_with_the_average_and_with_filled_rows_alone(one_device):
    _, model, batch, states, metrics = one_device
    for state, results in zip(states, metrics):
        networks = state, state["extra"]["average"]
        views, keys = (np.reshape(keys_of(model, network, batch), (2, BATCH, -1)) for network in networks)
        rows = int(state["extra"]["rows"])
        expected = loss_in_float64(views, keys, state["extra"]["queue"], rows, 0.5, decoupled=False)
        np.testing.assert_allclose(results["loss"], expected, rtol=1e-3)


@pytest.mark.parametrize(
    "changes", [{"remat": True}, {"microbatches": 2}, {"microbatches": 2, "remat": True}]
)
def test_microbatches_and_remat_change_nothing(changes):
    """The batch holds each image twice, so that both halves have the statistics of the whole."""
    (task, _, batch), (changed, _, _) = task_and_batch(), task_and_batch(**changes)
    half = BATCH // 2
    batch = {name: np.concatenate([rows[:half], rows[:half]]) for name, rows in batch.items()}
    start = jax.device_get(train.init_state(task, 0))
    (expected, _), (state, _) = (step_from(start, chosen, batch, 1) for chosen in (task, changed))
    assert_close(state["params"], expected["params"])
    np.testing.assert_allclose(state["extra"]["queue"], expected["extra"]["queue"], atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of pretraining with a memory and DCL."""
    workdir = tmp_path_factory.mktemp("memory")
    run_task("pretrain", workdir, num_steps=6, loss="dcl", checkpoint_every_steps=2, **MEMORY)
    return workdir


def test_both_networks_are_measured_while_it_trains(run):
    *_, last = log_of(run)
    for name in ("knn_accuracy", "features_effective_rank", "projection_alignment"):
        assert last[name] > 0 and last[f"average_{name}"] > 0
    assert last["knn_accuracy"] != last["average_knn_accuracy"] and "kept" not in last


@pytest.mark.journey
def test_a_stopped_run_goes_on_to_the_bit(run, tmp_path):
    config = tiny_config(
        "pretrain", num_steps=6, loss="dcl", checkpoint_every_steps=2, log_every_steps=1, **MEMORY
    )

    def stop(step, metrics):
        if step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        simclr_jax.run(config, tmp_path, stop)
    simclr_jax.run(config, tmp_path)
    for average in (False, True):
        whole, resumed = (checkpoint.load_params(path, average=average)[0] for path in (run, tmp_path))
        jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_the_average_is_taken_on_request(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    learning, average = (simclr_jax.load(run, use_average=use_average) for use_average in (False, True))
    assert np.abs(learning(images) - average(images)).max() > 1e-4
    saved, _ = checkpoint.load_params(run, average=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(average.variables), saved)
    settings = {"pretrained": str(run), "k": 200, "temperature": 0.07}
    for use_average, network in ((False, learning), (True, average)):
        config = tiny_config("knn", **settings, use_average=use_average)
        loaded = pretrained.load(config, make_model(config.model, 0, whole_projection=False))
        leaves = flatten_dict(jax.device_get(network.variables), sep="/")
        for path, leaf in flatten_dict(loaded, sep="/").items():
            np.testing.assert_array_equal(leaf, leaves[path])
        assert 0 < run_task("knn", tmp_path, **settings, use_average=use_average)["top1"] <= 1


def test_exports_take_the_average(run, tmp_path):
    from safetensors.numpy import load_file

    from simclr_jax.export import __main__ as export

    tensors = []
    for flags in ([], ["--use_average"]):
        output = tmp_path / f"export{len(flags)}"
        export.main([str(run), "--format=safetensors", f"--output={output}", *flags])
        tensors.append(load_file(output / "model.safetensors")["conv1.weight"])
    assert np.abs(tensors[0] - tensors[1]).max() > 0


def test_what_has_no_average_is_refused(pretrained_run, tmp_path):
    with pytest.raises(UserError, match="holds no moving average.*leave use_average out.*memory.size"):
        run_task("knn", tmp_path, pretrained=str(pretrained_run), use_average=True)
    with pytest.raises(UserError, match="holds no moving average"):
        simclr_jax.load(pretrained_run, use_average=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "own"}, "memory.size=40, but loss=own takes none: set --config.memory.size=0"),
        ({"model.projection_layers": 0}, "memory.size=40, but there is no projection head"),
        ({"memory.size": 4000}, "1,437 images have fewer keys.*memory.size to at most 2842"),
    ],
)
def test_what_takes_no_memory_is_refused(changes, message, monkeypatch):
    from simclr_jax import losses

    monkeypatch.setitem(losses.LOSSES, "own", lambda view1, view2, *, temperature, axis_name: (0.0, {}))
    with pytest.raises(UserError, match=message):
        task_and_batch(**changes)


def test_a_memory_starts_as_a_copy():
    variables = {"params": {"w": np.ones(2)}, "batch_stats": {}, "other": 0}
    state = memory.init(variables, size=3, dim=2)
    assert state["average"] == {"params": variables["params"], "batch_stats": {}} and state[
        "queue"
    ].shape == (3, 2)
