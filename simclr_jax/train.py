"""The train step and the one loop that every trained task shares."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from simclr_jax import checkpoint, models, optim, parallel
from simclr_jax.parallel import AXIS
from simclr_jax.process import UserError, group, say_once, stopping, trial
from simclr_jax.profiling import flops, trace
from simclr_jax.workdir import lock, records, report

Tree = Any


def all_parameters(path: str) -> bool:
    """Returns True: the step changes every parameter; a `Task.trained`."""
    return True


class Task(NamedTuple):
    """A task that trains, as the loop takes it.

    Attributes:
      init: key -> {'params', 'batch_stats'}, on the host or on one device.
      loss: (params, batch_stats, batch) -> (loss, (batch_stats, metrics)), of one device's rows. A `loss`
        among the metrics is reported in the place of the loss itself. With `extra`, it is the fourth
        argument.
      optimizer: updates the parameters.
      schedule: step -> learning rate, for the log.
      batches: start step -> this process's batches from there on, as host arrays [rows, ...].
      num_steps: length of training.
      meta: saved with every checkpoint.
      evaluate: train state -> metrics, every `evaluate_every_steps`.
      evaluate_first: whether a fresh run is evaluated before its first step too, as step 0.
      best: the metric of the evaluation whose highest value marks the best checkpoint.
      trained: path of a parameter, as 'encoder/conv1/kernel' -> whether the step changes it. Frozen
        parameters have neither gradients nor optimiser state.
      on_devices: maps a batch that lies on the devices to the batch that `loss` takes.
      extra: variables of `init` -> further train state that checkpoints keep, the same on every device: a
        moving average of the weights, or a queue of earlier projections.
      after_update: (state after the update, with the `extra` before it; the loss's metric `kept`, of this
        device's rows) -> the new `extra`.
    """

    init: Callable[[jax.Array], Tree]
    loss: Callable[[Tree, Tree, Tree], tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    num_steps: int
    meta: dict[str, Any]
    evaluate: Callable[[Tree], dict[str, float]] | None = None
    evaluate_every_steps: int = 0
    evaluate_first: bool = False
    best: str | None = None
    trained: Callable[[str], bool] = all_parameters
    on_devices: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = lambda batch: batch
    extra: Callable[[Tree], Tree] | None = None
    after_update: Callable[[Tree, Tree], Tree] | None = None


def init_state(task: Task, seed: int) -> dict[str, Any]:
    """Makes the state before the first step: step, params, batch_stats, opt_state, and the task's `extra`."""
    variables = task.init(jax.random.key(seed))
    # The step donates its state, and an average that shared its arrays with the weights would be donated
    # twice.
    extra = {"extra": jax.tree.map(jnp.copy, task.extra(variables))} if task.extra else {}
    opt_state = jax.jit(task.optimizer.init)(_split(variables["params"], task.trained)[0])
    return {"step": jnp.zeros((), jnp.int32), "opt_state": opt_state, **variables, **extra}


def make_train_step(
    loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    trained=all_parameters,
    after_update=None,
):
    """Builds `step(state, batch) -> (state, metrics)`, one device's part of a step over `AXIS`.

    The arguments are attributes of `Task`. The loss is the mean over this device's rows. Loss, metrics and
    gradients are averaged over the devices, which makes them those of the global batch. Batch statistics are
    averaged too: that changes nothing where batch norm is synchronised, and keeps the devices equal where it
    is not. Statistics that the loss returns unchanged stay the same to the bit.
    """

    def step(state, batch):
        updated, frozen = _split(state["params"], trained)
        extra = (state["extra"],) if "extra" in state else ()

        def loss_of_updated(updated):
            return loss(_merge(updated, frozen), state["batch_stats"], batch, *extra)

        (value, (batch_stats, metrics)), gradients = jax.value_and_grad(loss_of_updated, has_aux=True)(
            updated
        )
        metrics = {"loss": value, **metrics}
        kept = metrics.pop("kept", None)
        gradients, metrics = jax.lax.pmean((gradients, metrics), AXIS)
        batch_stats = jax.tree.map(
            lambda new, old: old if new is old else jax.lax.pmean(new, AXIS),
            batch_stats,
            state["batch_stats"],
        )
        updates, opt_state = optimizer.update(gradients, state["opt_state"], updated)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = schedule(state["step"])
        state = state | {
            "step": state["step"] + 1,
            "params": _merge(optax.apply_updates(updated, updates), frozen),
            "batch_stats": batch_stats,
            "opt_state": opt_state,
        }
        if after_update:
            state["extra"] = after_update(state, kept)
        return state, metrics

    return step


def mapped_step(task: Task, devices=None):
    """Maps the train step of a task over all devices, or over the given ones; it donates its state."""
    parts = task.loss, task.optimizer, task.schedule, task.trained, task.after_update
    return _mapped_step(*parts, devices and tuple(devices))


@functools.lru_cache(maxsize=2)  # runs that differ in their data only compile once
def _mapped_step(loss, optimizer, schedule, trained, after_update, devices):
    step = make_train_step(loss, optimizer, schedule, trained, after_update)
    return parallel.pmap(step, donate_state=True, devices=devices)


def _split(params, trained):
    """Splits parameters into those to update, as a tree, and the frozen ones, flat."""
    flat = flatten_dict(params, sep="/")
    updated = {path: value for path, value in flat.items() if trained(path)}
    return unflatten_dict(updated, sep="/"), {path: flat[path] for path in flat.keys() - updated.keys()}


def _merge(updated, frozen):
    return unflatten_dict(flatten_dict(updated, sep="/") | frozen, sep="/")


def apply_in_training(model, variables: dict[str, Tree], images: jax.Array, **options):
    """Applies a model in training mode.

    Args:
      model, variables: from `make_model`, and {'params', 'batch_stats'}.
      images, options: arguments of the model.

    Returns:
      Its outputs, and the new `batch_stats`; without batch norm they are those of `variables`.
    """
    outputs, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], **options)
    return outputs, updates.get("batch_stats", variables["batch_stats"])


def in_microbatches(function, batch_stats: Tree, batch: dict[str, jax.Array], count: int):
    """Applies `function(batch_stats, batch) -> (batch_stats, outputs)` to `count` parts of a batch in turn.

    It returns the outputs, arrays [rows, ...], of the whole batch. Backpropagation goes through the parts
    once more, one at a time, so that memory holds the activations of one part only: as in GradCache (arXiv
    2101.06983), but for any loss of the outputs, with its exact gradient. The statistics of batch norm are
    those of a part.
    """
    if count == 1:
        return function(batch_stats, batch)

    def on_part(batch_stats, index):
        # The part is cut out inside the loop, since TPUs would copy a batch that was reshaped before it.
        part = jax.tree.map(
            lambda rows: jax.lax.dynamic_slice_in_dim(rows, index * (len(rows) // count), len(rows) // count),
            batch,
        )
        return function(batch_stats, part)

    on_part = jax.checkpoint(on_part, prevent_cse=False)
    batch_stats, outputs = jax.lax.scan(on_part, batch_stats, jnp.arange(count))
    return batch_stats, jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), outputs)


def make_task(config, source, **attributes) -> Task:
    """Describes a training by `config.optimizer` on the examples of `source`, with further `attributes`."""
    schedule, num_steps = make_schedule(config, source.num_examples)
    optimizer = config.optimizer
    return Task(
        optimizer=optim.make_optimizer(
            optimizer.name, schedule, weight_decay=optimizer.weight_decay, momentum=optimizer.momentum
        ),
        schedule=schedule,
        num_steps=num_steps,
        evaluate_every_steps=steps_in(config.evaluate.every_epochs, config, source.num_examples),
        **attributes,
    )


def make_schedule(config, num_examples: int) -> tuple[optax.Schedule, int]:
    """Makes the learning rate schedule of a config, and counts the steps; notes odd settings.

    Raises:
      UserError: training has no end.
    """
    if config.batch_size > num_examples:
        say_once(
            f"note: batch_size={config.batch_size} exceeds the {num_examples:,} training images: a batch "
            "holds some of them more than once"
        )
    sizes = {"batch_size": config.batch_size, "num_examples": num_examples, "epochs": config.num_epochs}
    num_steps = config.num_steps or optim.total_steps(**sizes)
    if num_steps >= 2**31:  # the state counts them in 32 bits
        raise UserError(f"num_epochs={config.num_epochs} are {num_steps:,} steps: lower --config.num_epochs")
    warmup = config.warmup_epochs * num_examples // config.batch_size
    if warmup >= num_steps:
        say_once(
            f"note: warmup_epochs={config.warmup_epochs:g} are {warmup:,.0f} steps, but training has "
            f"{num_steps:,}: the learning rate never reaches its peak; lower --config.warmup_epochs"
        )
    return optim.warmup_cosine(
        config.optimizer.learning_rate,
        scaling=config.optimizer.scaling,
        warmup_epochs=config.warmup_epochs,
        num_steps=num_steps,
        **sizes,
    ), num_steps


def steps_in(epochs: float, config, num_examples: int) -> int:
    """Returns the number of steps in so many epochs; at least one."""
    return max(1, round(epochs * num_examples / config.batch_size))


def describe(task: Task, config, source, workdir) -> dict[str, str]:
    """Describes a run that is about to start, as rows of a table."""
    params = jax.eval_shape(lambda: init_state(task, 0))["params"]
    devices = jax.devices()
    classes = f"{source.num_classes} classes" if source.num_classes else "no labels"
    peak = optim.scaled_learning_rate(
        config.optimizer.learning_rate, scaling=config.optimizer.scaling, batch_size=config.batch_size
    )
    epochs = task.num_steps * config.batch_size / source.num_examples
    return {
        "task": config.task,
        "dataset": f"{source.name}: {source.num_examples:,} images of {config.image_size} pixels, {classes}",
        "model": models.describe(config.model),
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}",
        "batch": f"{config.batch_size} images, {config.batch_size // len(devices)} a device",
        "learning rate": f"{peak:.4g} at its peak, {config.optimizer.name}",
        "steps": f"{task.num_steps:,} ({epochs:.1f} epochs)",
        "devices": trial.devices
        or f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)",
        "workdir": str(workdir),
    }


def microbatches_of(config) -> int:
    """Returns into how many parts a step of the config's task cuts a device's batch."""
    return config.microbatches if config.task == "pretrain" else 1


def check_batch_size(batch_size: int, devices: int, microbatches: int = 1) -> None:
    """Raises a UserError unless the global batch spreads evenly over all devices and their microbatches."""
    parts = devices * microbatches
    if batch_size < 1 or batch_size % parts:
        multiple = max(parts, round(batch_size / parts) * parts)
        parts_of_each = f" of {microbatches} microbatches each" if microbatches > 1 else ""
        raise UserError(
            f"batch_size={batch_size} does not divide over {devices} devices{parts_of_each}: "
            f"set --config.batch_size to a multiple of {parts}, such as {multiple}"
        )


def fit(task: Task, config, workdir) -> dict[str, Any]:
    """Trains from the newest whole checkpoint in a workdir, or from scratch, to the end.

    On a signal to any process all processes save, and exit as `stopping` describes. The same command resumes
    the run, on any number of processes and devices.

    Returns:
      The final train state.
    """
    begun = time.monotonic()
    group.check_agreement("data or model", flatten_dict(task.meta, sep="."))
    group.run_on_first(lambda: records.save_config(workdir, config.to_dict()))
    group.run_on_first(lambda: records.note(workdir, steps=task.num_steps, ended=None))
    with (
        stopping.saving() as received,
        checkpoint.opened(workdir, keep=config.keep_checkpoints, best=task.best) as manager,
    ):
        state = checkpoint.restore(manager, parallel.replicate(init_state(task, config.seed)))
        start = int(state["step"])
        if start:
            report.say(f"resuming after step {start} of {task.num_steps}")
            _check_order_and_views(checkpoint.load_meta(workdir), task.meta, workdir)
        train_step, agreed_stop, stop = mapped_step(task), group.make_stop_agreement(), None
        with (
            closing(parallel.prefetch_to_devices(task.batches(start))) as batches,
            closing(report.Meter(workdir, config, start_step=start, num_steps=task.num_steps)) as meter,
            closing(trace.Profile(workdir, config.profile_steps, meter.paused)) as profile,
        ):
            if task.evaluate_first and not start:
                meter.report_start(stopping.unless_stopped(functools.partial(task.evaluate, state)))
            for step in range(start + 1, task.num_steps + 1):
                with profile.step(step):
                    with meter.waiting_for_data():
                        batch = task.on_devices(next(batches))
                    state, results = train_step(state, batch)
                if step == start + 1:
                    jax.block_until_ready(results)
                    report.say_aloud(f"first step after {time.monotonic() - begun:.1f} s of compiling")
                    meter.seconds_at_peak = flops.seconds_at_peak(task.loss, task.trained, state, batch)
                stopping.expect_save()
                profile.end_after(step, results)
                meter.add(step, results)
                stop = agreed_stop(received)
                last = step == task.num_steps
                evaluation = {}
                if task.evaluate and not stop and (last or step % task.evaluate_every_steps == 0):
                    jax.block_until_ready(results)
                    with meter.paused():
                        evaluation = stopping.unless_stopped(functools.partial(task.evaluate, state)) or {}
                    stop = agreed_stop(received)
                checkpoint.check(manager)
                lock.check()
                if last or stop or evaluation or step % config.checkpoint_every_steps == 0:
                    meter.flush(evaluation)
                    # A checkpoint without an evaluation is never the best.
                    scores = evaluation or (task.best and {task.best: -math.inf})
                    checkpoint.save(manager, step, state, task.meta, scores)
                if stop:
                    break
    if stop:
        report.say(f"stopped by {stop.name}, saved after step {step}: the same command goes on")
        raise stopping.Stopped(stopping.exit_code(stop))
    return state


def _check_order_and_views(saved, meta, workdir):
    """Notes an order of examples, and refuses views, that differ from those of the run that is resumed."""
    if saved.get("order") != meta.get("order"):
        report.say(
            "note: this run began when streams were shuffled otherwise: of the epoch that it goes on in, "
            "some images come twice and others not"
        )
    if saved.get("view") != meta.get("view"):
        raise UserError(
            f"{workdir} holds a run with view={saved.get('view')}, but here it is {meta.get('view')}: "
            "pass the function of that run, or choose another workdir"
        )
    if (began := bool(saved.get("on_device"))) != bool(meta.get("on_device")):
        raise UserError(
            f"{workdir} holds a run whose views {'the devices' if began else 'the host'} made, by other "
            f"draws: set --config.dataset.on_device={began}"
        )
