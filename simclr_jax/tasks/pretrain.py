"""Contrastive pretraining: SimCLR (arXiv 2002.05709) and SimCLR v2 (arXiv 2006.10029)."""

import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp

from simclr_jax import checkpoint, losses, memory, parallel, pretrained, supervised, train
from simclr_jax.evaluation.judge import Judge
from simclr_jax.models import make_init, make_model
from simclr_jax.plots import board
from simclr_jax.process import UserError, group
from simclr_jax.views import batches, resident
from simclr_jax.views.distort import distort
from simclr_jax.views.recipe import make_recipe
from simclr_jax.workdir import report


def run(config, workdir, view: batches.View | None = None) -> dict:
    """Pretrains, then measures how good the features are.

    Args:
      config: a config of pretraining.
      workdir: folder of the run.
      view: makes the views in the place of the recipe in `config.augment`.

    Returns:
      The summary: `steps`; `view`, the name of a program's own; `health` of the `features` and the
      `projection` of training images; where there are labels `trained`, `untrained` and `raw_pixels`, each
      with `linear_accuracy`, `knn_accuracy` and `few_label_accuracy` on held-out images, and
      `few_label_deviation` over the draws of labels; `notes`. See `evaluation.judge`.
    """
    from simclr_jax.data import datasets  # TensorFlow, which steps and benchmarks do without.

    load = partial(datasets.load, config.dataset, seed=config.seed, workdir=workdir)
    source = load("train")
    batches.prepare(config, source, view)
    group.check_agreement("train split", datasets.fingerprint(source))
    model = make_model(config.model, _num_probed_classes(source), remat=config.remat)
    judge = Judge(config, model, source, load, partial(batches.views, config, view))
    images = resident.load(config, source, view)
    task = make_task(config, model, source, view, images)._replace(
        evaluate=partial(_evaluate, judge, config),
        evaluate_first=True,
        best="knn_accuracy" if judge.labelled else None,
    )
    rows = train.describe(task, config, source, workdir)
    if config.loss == "nt_xent" and not config.memory.size:
        loss, accuracy = 2 * math.log(2 * config.batch_size - 1), 1 / config.batch_size
        rows["by chance"] = f"loss {loss:.4g}, contrastive accuracy {accuracy:.2g}"
    if images is not None:
        judge.device_bytes = resident.evaluation_room(images)
        size = f"{images.nbytes / 1e6:,.1f} MB"
        rows["views"] = f"made by the devices, of {size} of images there, by other draws than the host's"
        del images  # the devices have them
    report.announce(rows, task.batches)

    begins = not checkpoint.steps_in(workdir)
    if begins and not task.meta["on_device"]:
        state = jax.eval_shape(lambda: train.init_state(task, config.seed))
        batch = batches.batch_shapes(config, config.batch_size)
        evaluate = parallel.compile_during(task.evaluate, train.mapped_step(task), state, batch)
        task = task._replace(evaluate=evaluate)
    draws_pictures = config.evaluate.pictures and jax.process_index() == 0
    if draws_pictures and begins:
        board.begin(config, workdir, partial(batches.example_views, config, workdir, view, count=10))
    state = train.fit(task, config, workdir)

    fresh_init = make_init(model, config.image_size)
    untrained = fresh_init(jax.random.key(config.seed)) if config.evaluate.compare else None
    summary = {"steps": task.num_steps, **({"view": task.meta["view"]} if view else {})}
    summary |= judge.summarize(state, untrained)
    if draws_pictures:
        board.end(config, workdir, task.num_steps)
    return summary


def make_task(config, model, source, view: batches.View | None = None, images=None) -> train.Task:
    """Describes the pretraining of `model` on `source`, or on its `images` of `resident.load`, to the loop.

    Raises:
      UserError: an image would be twice in a batch.
    """
    check_batch(config, source.num_examples)
    if config.memory.size:
        _check_memory(config, source.num_examples)
    loss = losses.LOSSES[config.loss]
    init = pretrained.make_init(config, model) if config.pretrained else make_init(model, config.image_size)
    meta = pretrained.make_meta(config, model, source) | {"on_device": images is not None}
    meta["view"] = view and getattr(view, "__qualname__", repr(view))
    attributes = {"init": init, "loss": make_loss(model, config), "meta": meta}
    if images is None:
        attributes["batches"] = partial(batches.train_batches, config, source, view)
    else:
        attributes["batches"] = partial(resident.batches, config, source)
        attributes["on_devices"] = resident.make_views(config, images)
    dim = config.model.projection_dim
    if config.memory.size:
        attributes["extra"] = partial(memory.init, size=config.memory.size, dim=dim)
        attributes["after_update"] = partial(memory.update, decay=config.memory.decay)
    elif isinstance(loss, losses.StatefulLoss):
        attributes |= {"extra": lambda _: loss.init(dim), "after_update": _next_loss_state}
    return train.make_task(config, source, **attributes)


def _evaluate(judge, config, state):
    """Returns the metrics of the network that learns, and with a memory those of its average."""
    metrics = judge.log(state)
    if config.memory.size:
        average = judge.log(state["extra"]["average"])
        metrics |= {f"average_{name}": value for name, value in average.items()}
    return metrics


def _check_memory(config, num_examples):
    """Raises a UserError unless the loss, the head and the number of images go with a memory."""
    loss, largest = losses.LOSSES[config.loss], 2 * (num_examples - config.batch_size)
    if isinstance(loss, losses.StatefulLoss) or "memory" not in inspect.signature(loss).parameters:
        problem = f"loss={config.loss} takes none: set --config.memory.size=0, or --config.loss=nt_xent"
    elif not config.model.projection_layers:
        problem = "there is no projection head: set --config.model.projection_layers=2"
    elif config.memory.size > largest:
        problem = (
            f"{num_examples:,} images have fewer keys, so each would be its own negative: set "
            f"--config.memory.size to at most {max(largest, 0)}"
        )
    else:
        return
    raise UserError(f"memory.size={config.memory.size}, but {problem}")


def _next_loss_state(state, loss_state):
    return loss_state


def _num_probed_classes(source) -> int:
    """Returns the number of classes of the linear probe in the step: 0 where an image has no label."""
    labels = getattr(source, "labels", None)
    return source.num_classes if labels is None or labels.min() >= 0 else 0


def check_batch(config, num_examples: int) -> None:
    """Raises a UserError where an image would be twice in a batch, and so its own negative."""
    if config.batch_size <= num_examples:
        return
    parts = jax.device_count() * config.microbatches
    largest = num_examples // parts * parts
    remedy = f"set --config.batch_size={largest}" if largest > 1 else "add images, or use fewer devices"
    raise UserError(
        f"batch_size={config.batch_size} exceeds the {num_examples:,} training images, and an image is no "
        f"negative of itself: {remedy}"
    )


def make_loss(model, config):
    """Builds the loss of a batch, as `batches.batch_shapes` describes it; a `train.Task.loss`.

    Where the batch holds crops and their draws, the step makes the views of them.

    Where there are classes, the supervised head learns beside the encoder from `label`, int32 [b], on
    features that its gradient does not reach: a linear probe of the pretraining so far, as in the official
    code.

    With `config.memory.size` the fourth argument is that of `simclr_jax.memory`, else the state of a
    `losses.StatefulLoss`.

    With `config.microbatches` the loss is still that of the whole batch. Batch norm takes its statistics over
    a microbatch of every device.
    """
    contrast, recipe = losses.LOSSES[config.loss], make_recipe(config.augment)

    def loss(params, batch_stats, batch, *extra):
        def encode(batch_stats, batch):
            images = jnp.concatenate([batch["view1"], batch["view2"]])
            if "draws1" in batch:
                images = distort(images, jnp.concatenate([batch["draws1"], batch["draws2"]]), recipe)
            variables = {"params": params, "batch_stats": batch_stats}
            outputs, batch_stats = train.apply_in_training(model, variables, images, detach_logits=True)
            pairs = {
                name: jnp.split(outputs[name], 2) for name in ("projection", "logits") if name in outputs
            }
            if config.memory.size:
                keys, _ = train.apply_in_training(model, extra[0]["average"], images)
                pairs["keys"] = jnp.split(keys["projection"], 2)
            return batch_stats, pairs

        batch_stats, pairs = train.in_microbatches(encode, batch_stats, batch, config.microbatches)
        options = {"temperature": config.temperature, "axis_name": parallel.bound_axis()}
        if config.memory.size:
            value, metrics = memory.contrast(contrast, pairs, *extra, **options)
        else:
            value, metrics = contrast(*pairs["projection"], *extra, **options)
        metrics["loss"] = value  # The reported loss leaves the probe's out.
        if "logits" in pairs:
            logits, labels = jnp.concatenate(pairs["logits"]), jnp.tile(batch["label"], 2)
            probe_loss = losses.softmax_cross_entropy(logits, labels)
            value += probe_loss + supervised.head_decay(config.optimizer, params)
            metrics["probe_loss"] = probe_loss
            metrics["probe_accuracy"] = losses.top_k_correct(logits, labels, k=1).mean()
        return value, (batch_stats, metrics)

    return loss
