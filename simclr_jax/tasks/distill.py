"""Distillation of a fine-tuned network on unlabelled images (SimCLR v2, arXiv 2006.10029, section 2)."""

from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import losses, parallel, pretrained, supervised, train
from simclr_jax.evaluation import parts, stored
from simclr_jax.evaluation.features import batches_of, make_extract, unit_rows
from simclr_jax.evaluation.held_out import labelled_by_csv
from simclr_jax.models import make_init, make_model
from simclr_jax.process import UserError, escape, first_few, group
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Trains `config.model`, from scratch, to predict what the teacher, `config.pretrained`, predicts.

    With the teacher's own `config.model` this is self-distillation. Where labels by CSV are few, the teacher
    has learnt from all of them, and no held-out image is left to score either. With `evaluate.compare`, the
    same network is trained for as long on the teacher's labels alone, in `workdir`/labels_only.

    With `embeddings`, vectors of the images by any network are what it learns, and there is no classifier.

    Returns:
      The summary: `top1` and `top5` of the held-out images, `teacher_top1`, `labels_only_top1`, `parameters`
      and `teacher_parameters`, `steps`; with `embeddings`, the mean cosine `similarity` of the held-out
      images' vectors to those that the student tells.
    """
    from simclr_jax.data import datasets

    if config.embeddings:
        return _learn_embeddings(config, workdir)
    teacher, teacher_variables, meta = pretrained.load_model(
        config.pretrained, use_average=config.use_average
    )
    if not meta["num_classes"]:
        raise UserError(f"{config.pretrained} holds no classifier: give the workdir of a finetune run")
    if meta.get("several_labels"):
        raise UserError(f"{config.pretrained} tells several labels an image: distill needs a teacher of one")
    load = partial(datasets.load, config.dataset, seed=config.seed, workdir=workdir)
    source = load("train")
    held_out = labelled_by_csv(load)[1] if config.dataset.labels else load("eval")
    group.check_agreement("train split", datasets.fingerprint(source))
    for split in filter(None, (source, held_out)):
        _check_classes(config.pretrained, meta, split)
    model = make_model(config.model, meta["num_classes"], whole_projection=False)
    source, labelled = _keep_the_teachers_labels(meta["config"], source, workdir)
    make_evaluate = partial(supervised.make_evaluate, config, source=held_out)
    evaluate = make_evaluate(model=model) if held_out and held_out.num_classes else None
    init = make_init(model, config.image_size)
    make_task = partial(supervised.make_task, config, model, init=init, evaluate=evaluate)
    task = make_task(source, loss=make_loss(model, config))
    class_names = meta.get("class_names", [])  # Older checkpoints have none.
    task = task._replace(meta=task.meta | {"class_names": class_names})
    report.announce(train.describe(task, config, source, workdir), task.batches)
    teacher_variables = parallel.replicate(teacher_variables)
    task = task._replace(on_devices=make_teach(teacher, teacher_variables))
    state = train.fit(task, config, workdir)

    summary = {"parameters": optax.tree.size(state["params"])}
    summary["teacher_parameters"] = optax.tree.size(teacher_variables["params"])
    if evaluate:
        summary |= evaluate(state) | {"teacher_top1": make_evaluate(model=teacher)(teacher_variables)["top1"]}
        if source.num_classes and config.evaluate.compare:
            report.say(f"the same network on the labels alone: {workdir / 'labels_only'}")
            alone = make_task(labelled, loss=supervised.make_loss(model, config, after_block=-1))
            alone = task._replace(loss=alone.loss, batches=alone.batches, on_devices=lambda batch: batch)
            state = train.fit(alone, config, workdir / "labels_only")
            summary["labels_only_top1"] = evaluate(state)["top1"]
    return summary | {"steps": task.num_steps}


def _learn_embeddings(config, workdir):
    """Trains `config.model`, from scratch, to tell vectors of images by a linear head on its features."""
    from simclr_jax.data import datasets

    if config.pretrained:
        raise UserError("embeddings and pretrained are both set: a student has one teacher, leave one out")
    names, vectors = stored.read_vectors(config.embeddings)
    rows = {name: row for row, name in enumerate(names)}
    sources = []
    for split in ("train", "eval"):
        source = datasets.load(config.dataset, split, seed=config.seed, workdir=workdir)
        group.check_agreement(f"{split} split", datasets.fingerprint(source))
        row_of_image = np.array([rows.get(name, -1) for name in parts.names(source, split)], np.int32)
        known = np.flatnonzero(row_of_image >= 0)
        if not len(known):
            raise UserError(
                f"embeddings={escape(config.embeddings)} has {escape(names[0])} and others, and none is an "
                f"image of {source.name}: give vectors of these images, by the names that embed gives them"
            )
        if len(known) < source.num_examples:
            report.say(f"note: {source.name}: {source.num_examples - len(known)} images have no vector")
        # A label is the row of the vector from here on.
        source = source._replace(labels=row_of_image, num_classes=0, class_names=())
        sources.append(datasets.subset(source, known))
    source, held_out = sources
    vectors = unit_rows(vectors - vectors[source.labels].mean(axis=0))
    with_head = config.copy_and_resolve_references()  # of the checkpoint; the run's own stays as it was set
    with_head.model.update(projection_layers=1, projection_dim=vectors.shape[1], channels=source.channels)
    model = make_model(with_head.model, 0)
    extract = make_extract(model, itemgetter("projection"))

    def evaluate(variables):
        told = extract(variables, batches_of(with_head, held_out))
        return {"held_out_similarity": float((unit_rows(told.features) * vectors[told.labels]).sum(1).mean())}

    def loss(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, batch_stats = train.apply_in_training(model, variables, batch["image"])
        similarity = optax.cosine_similarity(outputs["projection"], batch["vector"], epsilon=1e-6).mean()
        results = {"loss": 1 - similarity, "similarity": similarity}
        return 1 - similarity, (batch_stats, results)

    def batches(start_step):
        for batch in supervised.batches(with_head, source, start_step):
            yield batch | {"vector": vectors[batch["label"]]}

    init = make_init(model, config.image_size)
    task = supervised.make_task(with_head, model, source, init=init, loss=loss, evaluate=evaluate)
    task = task._replace(batches=batches)
    report.announce(train.describe(task, config, source, workdir), batches)
    state = train.fit(task, config, workdir)
    return {"similarity": evaluate(state)["held_out_similarity"], "steps": task.num_steps}


def _check_classes(path, meta, split):
    """Raises a UserError where the teacher, the checkpoint at `path`, has other classes than a split."""
    names = tuple(meta.get("class_names", ())), split.class_names
    counts = meta["num_classes"], split.num_classes
    if split.num_classes and (counts[0] != counts[1] or (all(names) and names[0] != names[1])):
        teacher_names, split_names = (first_few(class_names or ["unnamed"]) for class_names in names)
        raise UserError(
            f"{path} tells {counts[0]} classes apart ({teacher_names}), but {split.name} has {counts[1]} "
            f"({split_names}): choose the dataset or the labels that it was fine-tuned on"
        )


def _keep_the_teachers_labels(teacher_config, source, workdir):
    """The training images with -1 in place of labels that the teacher has not learnt from.

    Returns:
      All images, and those with a label.
    """
    from simclr_jax.data import datasets

    if not source.num_classes:
        return source, source
    labels_per_class = teacher_config.get("labels_per_class")
    labelled, rows = supervised.draw_labels(
        source, labels_per_class=labels_per_class, seed=teacher_config["seed"], workdir=workdir
    )
    if labels_per_class:
        learnt = np.isin(np.arange(source.num_examples), rows)
        source = source._replace(labels=np.where(learnt, source.labels, -1).astype(np.int32))
    return source, datasets.labelled(labelled)


def make_loss(model, config):
    """Builds the distillation of `teacher_logits`, float32 [b, classes], on `image`, uint8 [b, h, w, 3].

    `label_weight` is the share of the cross entropy against `label`, int32 [b], -1 where there is none:
    1 - alpha of the paper's equation 3.

    Returns:
      A `train.Task.loss`.
    """

    def loss(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, batch_stats = train.apply_in_training(model, variables, batch["image"])
        logits, teacher_logits = outputs["logits"], batch["teacher_logits"]
        value = losses.distillation(logits, teacher_logits, temperature=config.temperature)
        results = {"agreement": (logits.argmax(axis=1) == teacher_logits.argmax(axis=1)).mean()}
        if config.label_weight:
            results["label_loss"] = masked_cross_entropy(logits, batch["label"])
            value = (1 - config.label_weight) * value + config.label_weight * results["label_loss"]
        results["loss"] = value
        return value + supervised.head_decay(config.optimizer, params), (batch_stats, results)

    return loss


def masked_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross entropy over the rows of all devices whose label is not -1; 0 without any."""
    mask = labels >= 0
    cross_entropies = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    count = mask.sum()
    if (axis := parallel.bound_axis()) is not None:  # Devices may hold different numbers of labels.
        count = jax.lax.pmean(count, axis)
    return jnp.where(mask, cross_entropies, 0).sum() / jnp.maximum(count, 1 / jax.device_count())


def make_teach(teacher, variables):
    """Builds a `Task.on_devices` that adds `teacher_logits`, in eval mode, to a batch on the devices."""
    forward = parallel.pmap_rows(lambda variables, batch: teacher.apply(variables, batch["image"])["logits"])
    return lambda batch: batch | {"teacher_logits": forward(variables, batch)}
