"""Training with labels: what linear evaluation, fine-tuning and the baselines of distillation share."""

import re
from functools import partial

import jax
import numpy as np

from simclr_jax import losses, parallel, pretrained, train
from simclr_jax.evaluation import calibration, features, probes
from simclr_jax.evaluation.features import Features
from simclr_jax.process import files, group
from simclr_jax.process.console import say_once
from simclr_jax.process.errors import UserError
from simclr_jax.workdir import report

CALIBRATED_ON = 10_000  # held-out images at most
FEW = 20  # labels of the smallest class, by CSV, below which none is held out: of 20 a tenth are 2


def make_task(config, model, source, *, init, loss, evaluate) -> train.Task:
    """Training of `model` on the labels of `source`, as the train loop takes it.

    Args:
      config: of a task that trains on single images.
      model: from `make_model`.
      source: from `datasets.load`.
      init, loss, evaluate: of `train.Task`.
    """
    schedule, num_steps = train.make_schedule(config, source.num_examples)
    return train.Task(
        init=init,
        loss=loss,
        optimizer=train.make_optimizer(config, schedule),
        schedule=schedule,
        batches=partial(batches, config, source),
        num_steps=num_steps,
        meta=meta_of(config, model, source),
        evaluate=evaluate,
        evaluate_every_steps=train.steps_in(config.evaluate.every_epochs, config, source.num_examples),
    )


def meta_of(config, model, source) -> dict:
    """What checkpoints of a classifier tell beside the train state."""
    return {
        "config": config.to_dict(),
        "num_classes": model.supervised_head.features,
        "class_names": list(source.class_names),
        "value_range": source.value_range,
        "order": source.order,
        "source": pretrained.source_of(config),
    }


def make_loss(model, config, *, after_block: int | None):
    """Cross entropy of `image`, uint8 [b, h, w, 3], against `label`, int32 [b]; a `train.Task.loss`.

    What lies behind block group `after_block` is in training mode (-1: everything); None: nothing is, the
    statistics of batch norm stay as they are.
    """

    def loss(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        if after_block is None:
            outputs = model.apply(variables, batch["image"])
        else:
            outputs, updates = model.apply(
                variables, batch["image"], train=True, after_block=after_block, mutable=["batch_stats"]
            )
            batch_stats = updates.get("batch_stats", batch_stats)
        value = losses.softmax_cross_entropy(outputs["logits"], batch["label"])
        accuracy = losses.top_k_correct(outputs["logits"], batch["label"], k=1).mean()
        results = {"loss": value, "accuracy": accuracy}
        return value + head_decay(config.optimizer, params), (batch_stats, results)

    return loss


def head_decay(optimizer, params) -> jax.Array:
    """The part of the loss that decays the classifier, which LARS leaves alone (official code)."""
    decay = optimizer.weight_decay if optimizer.name == "lars" else 0.0
    return decay * 0.5 * (params["supervised_head"]["kernel"] ** 2).sum()


def is_head(path: str) -> bool:
    """Whether a parameter belongs to the classifier; a `train.Task.trained`."""
    return path.startswith("supervised_head/")


def is_after_block(path: str, *, after_block: int) -> bool:
    """Whether a parameter lies behind block group `after_block`, 0 being the stem; a `train.Task.trained`."""
    if not path.startswith("encoder/"):
        return True
    group = re.match(r"encoder/block_group(\d)", path)
    return int(group.group(1) if group else 0) > after_block


def batches(config, source, start_step):
    """Cropped and flipped images (v1 appendix B.6) of this process, from `start_step` on."""
    from simclr_jax.data import augment, pipeline

    def transform(image, seed):
        view = augment.crop_and_flip(
            image, seed, config.image_size, min_area=config.augment.min_area, flip=config.augment.flip
        )
        return {"image": view}

    return pipeline.train_batches(
        source,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        **parallel.this_process(),
    )


def make_evaluate(config, model, source):
    """Builds `evaluate(variables) -> {'top1', 'top5'}`: every example of `source` counts once.

    The devices share every batch; rows that only fill the last ones are masked.
    """

    def count(variables, batch):
        logits = model.apply(variables, batch["image"])["logits"]
        hits = {f"top{k}": losses.top_k_correct(logits, batch["label"], k=k) & batch["mask"] for k in (1, 5)}
        hits["all"] = batch["mask"]
        return jax.lax.psum({name: hit.sum() for name, hit in hits.items()}, parallel.AXIS)

    mapped = parallel.pmap(count)

    def evaluate(variables) -> dict[str, float]:
        variables = {name: variables[name] for name in ("params", "batch_stats")}
        held_out = features.batches_of(config, source)
        hits = [mapped(variables, batch) for batch in train.prefetch_to_devices(held_out)]
        hits = jax.device_get(hits)
        sums = {name: int(np.sum([hit[name] for hit in hits])) for name in hits[0]}
        count = sums.pop("all")  # less than the split has where files were lost
        return {name: hit / count for name, hit in sums.items()}

    return evaluate


def draw_labels(source, *, labels_per_class: int | None, seed: int, workdir):
    """The examples whose labels may be used, and their rows: all, or `labels_per_class` of every class.

    Which ones they are is written to `workdir`/labels.json: 'split', 'rows', 'labels', and 'names' of files.
    """
    from simclr_jax.data import datasets

    if not labels_per_class:
        return source, np.arange(source.num_examples)
    rows = datasets.few_labels(source, labels_per_class, seed=seed)
    chosen = datasets.subset(source, rows)
    if jax.process_index() == 0:
        labels = {"split": source.name, "rows": rows.tolist(), "labels": chosen.labels.tolist()}
        if chosen.names is not None:
            labels["names"] = chosen.names.tolist()
        with files.storage(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / "labels.json", labels)
    return chosen, rows


def labelled_by_csv(load):
    """All labelled images, and the held-out ones among them, of a folder with `dataset.labels`.

    The latter are None where labels are too few to hold some out. Then a cross-validation tells how good a
    classifier is, and the classifier learns from all of them. `load` is split -> source.
    """
    from simclr_jax.data import datasets

    everything, held_out = (datasets.labelled(load(split)) for split in ("all", "eval"))
    smallest = np.bincount(everything.labels, minlength=everything.num_classes).min()
    if smallest >= FEW and len(set(held_out.labels)) == everything.num_classes:
        return everything, held_out
    say_once(
        f"note: {everything.num_examples} labels, {smallest} of the smallest class: too few to hold some of "
        f"them out, so accuracy is that of a cross-validation ({len(probes.folds(everything.labels))} folds)"
    )
    return everything, None


def cross_validate(task: train.Task, config, model, source, workdir) -> dict:
    """How good a classifier is that learns from all of `source`: by others that learn from a part each.

    They train as `task` does, for as many steps, in `workdir`/fold<i>.

    Returns:
      `top1`, `top5`, `top1_spread`, the deviation of the top-1 accuracy over the folds, `folds`, `labels`;
      and `calibration_temperature`, see `evaluation.calibration`.
    """
    from simclr_jax.data import datasets

    told = []
    for number, (learnt, tested) in enumerate(probes.folds(source.labels)):
        place = workdir / f"fold{number}"
        report.say(f"fold {number + 1} of the cross-validation: {place}")
        fold = task._replace(batches=partial(batches, config, datasets.subset(source, learnt)))
        logits = make_logits(config, model, datasets.subset(source, tested))
        told.append(logits(train.fit(fold, config, place)))
    everything = Features(*map(np.concatenate, zip(*told)))
    spread = np.std([top_k(part, 1) for part in told])
    summary = {f"top{k}": top_k(everything, k) for k in (1, 5)}
    summary |= {"top1_spread": float(spread), "folds": len(told), "labels": source.num_examples}
    return summary | calibrated(everything)


def top_k(scores: Features, k: int) -> float:
    """The share of examples whose label is among the k classes of the highest logits."""
    return float(np.mean(losses.top_k_correct(scores.features, scores.labels, k=k)))


def calibrated(scores: Features) -> dict[str, float]:
    """`calibration_temperature` for a summary; see `evaluation.calibration`."""
    scores = probes.labelled(scores)
    found = calibration.temperature(scores.features, scores.labels)
    return {} if found is None else {"calibration_temperature": found}


def make_logits(config, model, source):
    """Builds `logits(variables) -> Features`: logits and labels of `source`, or of some of many."""
    from simclr_jax.data import datasets

    source = datasets.sample(source, CALIBRATED_ON, seed=config.seed)
    mapped = features.make_map(
        lambda variables, batch: {"logits": model.apply(variables, batch["image"])["logits"]}
    )

    def logits(variables) -> Features:
        variables = {name: variables[name] for name in ("params", "batch_stats")}
        rows = mapped(variables, features.batches_of(config, source))
        return Features(rows["logits"], rows["label"])

    return logits


def load_labelled(config, workdir, splits=("train", "eval")):
    """Splits of the dataset, for a task that needs the labels of all of them.

    With `dataset.labels` they hold the labelled images alone. Where those are few, the first is of all of
    them, and the others are None: see `labelled_by_csv`.

    Raises:
      UserError: one has none.
    """
    from simclr_jax.data import datasets

    load = partial(datasets.load, config.dataset, seed=config.seed, workdir=workdir)
    if config.dataset.labels:
        everything, held_out = labelled_by_csv(load)
        group.check_agreement("labels", datasets.fingerprint(everything))
        return [everything, None] if held_out is None else [datasets.labelled(load("train")), held_out]
    sources = [load(split) for split in splits]
    for split, source in zip(splits, sources):
        group.check_agreement(f"{split} split", datasets.fingerprint(source))
    for source in sources:
        if not source.num_classes:
            raise UserError(
                f"{source.name} has no labels, which {config.task} needs: choose a labelled dataset or "
                "split; a folder needs a sub-folder for each class"
            )
    return sources
