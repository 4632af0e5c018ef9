"""Training with labels, as linear evaluation, fine-tuning and distillation share it."""

import re
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import losses, parallel, pretrained, train
from simclr_jax.evaluation import calibration, doubt, features, probes
from simclr_jax.evaluation.features import Features
from simclr_jax.evaluation.held_out import folds_of, labelled_by_csv
from simclr_jax.process import UserError, escape, files, group
from simclr_jax.views.recipe import make_recipe
from simclr_jax.workdir import report

CALIBRATED_ON = 10_000  # Largest number of held-out images that a calibration uses.
MAX_CONFUSION = 100  # Largest number of classes whose confusion matrix a summary holds.
_BLOCK = 4096  # Held-out images whose logits are ranked at once.
_UNEVEN = 10  # How many times larger than the smallest a class is, from which on a note says so.


def make_task(config, model, source, **attributes) -> train.Task:
    """Builds the training of `model` on the single images of `source` for the train loop.

    Args:
      config: the config of a task that trains.
      model: from `make_model`.
      source: from `datasets.load`.
      attributes: further ones of `train.Task`.
    """
    meta = pretrained.make_meta(config, model, source)
    return train.make_task(config, source, batches=partial(batches, config, source), meta=meta, **attributes)


def make_loss(model, config, *, after_block: int | None, class_weights=None, label_sets=None):
    """Builds the cross entropy of `image`, uint8 [b, h, w, 3], against `label`, int32 [b].

    Args:
      model: from `make_model`.
      config: the config of the task.
      after_block: layers behind this block group are in training mode, with -1 all layers. With None all are
        in eval mode: the statistics of batch norm stay as they are.
      class_weights: from `class_weights`.
      label_sets: those of the source.

    Returns:
      A `train.Task.loss`.
    """

    def loss(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        if after_block is None:
            outputs = model.apply(variables, batch["image"])
        else:
            options = {"after_block": after_block}
            outputs, batch_stats = train.apply_in_training(model, variables, batch["image"], **options)
        logits, label = outputs["logits"], batch["label"]
        if label_sets:
            targets = jnp.asarray(label_sets[1])[label]
            value = losses.binary_cross_entropy(logits, targets)
            accuracy = ((logits > 0) == targets).mean()
        else:
            value = losses.softmax_cross_entropy(logits, label, class_weights)
            accuracy = losses.top_k_correct(logits, label, k=1).mean()
        results = {"loss": value, "accuracy": accuracy}
        return value + head_decay(config.optimizer, params), (batch_stats, results)

    return loss


def head_decay(optimizer, params) -> jax.Array:
    """Returns the classifier's weight decay, a part of the loss since LARS excludes it (official code)."""
    decay = optimizer.weight_decay if optimizer.name == "lars" else 0.0
    return decay * 0.5 * (params["supervised_head"]["kernel"] ** 2).sum()


def is_head(path: str) -> bool:
    """Returns whether a parameter belongs to the classifier; a `train.Task.trained`."""
    return path.startswith("supervised_head/")


def is_after_block(path: str, *, after_block: int) -> bool:
    """Returns whether a parameter lies behind a block group, 0 being the stem; a `train.Task.trained`."""
    if not path.startswith("encoder/"):
        return True
    group = re.match(r"encoder/block_group(\d)", path)
    return int(group.group(1) if group else 0) > after_block


def batches(config, source, start_step):
    """Returns this process's batches of cropped and flipped images (v1 appendix B.6) from `start_step` on."""
    from simclr_jax.data import augment, datasets, pipeline

    if "balanced_draws" in config and config.balanced_draws:
        source = datasets.balanced(source, seed=config.seed)

    def transform(image, seed):
        view = augment.crop_and_flip(image, seed, config.image_size, make_recipe(config.augment))
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
    """Builds `evaluate(variables)`: the `scores_of` all examples of `source`, each of which counts once."""
    logits = make_logits(config, model, source)
    return lambda variables: scores_of(logits(variables), source)


def class_weights(config, source) -> np.ndarray | None:
    """Returns what an image of each class weighs by `config.class_weights`, float32 [classes]; None: alike.

    The weights are scaled so that their mean over the training images is 1.
    """
    from simclr_jax.data import datasets, labels

    if not config.class_weights:
        return None
    counts = datasets.class_counts(source, f"class_weights={config.class_weights}")
    weights = 1 / np.maximum(counts, 1)
    if config.class_weights != "balanced":
        names = source.class_names or tuple(map(str, range(source.num_classes)))
        weights = labels.read_weights(config.class_weights, names)
    return np.asarray(weights * counts.sum() / (weights @ counts), np.float32)


def class_scores(confusion: np.ndarray, class_names, workdir) -> dict:
    """Returns what a confusion matrix tells of each class, for a summary, and draws it in confusion.png.

    Args:
      confusion: int [classes, classes], counts by true class (rows) and predicted class (columns).
      class_names: names of the classes; numbers where they have none.
      workdir: folder of the run.

    Returns:
      `per_class`, the accuracy of each class that has images, `balanced_accuracy`, their mean, and, of at
      most `MAX_CONFUSION` classes, `confusion`, the matrix as lists.
    """
    class_names, counts = class_names or tuple(map(str, range(len(confusion)))), confusion.sum(axis=1)
    shares = confusion.diagonal() / np.maximum(counts, 1)
    scores = {
        "balanced_accuracy": float(shares[counts > 0].mean()),
        "per_class": {name: float(shares[i]) for i, name in enumerate(class_names) if counts[i]},
    }
    chance, balanced = 1 / np.count_nonzero(counts), scores["balanced_accuracy"]
    if balanced < chance + 2 * np.sqrt(chance * (1 - chance) / counts.sum()) and chance < 1:
        report.say(
            f"note: the accuracy of a class, {balanced:.2f} on average, is about that of chance, "
            f"{chance:.2f}: label more images, train for longer, or start from published weights "
            "(docs/published.md)"
        )
    if jax.process_index() == 0:
        from simclr_jax.plots import figures  # Importing matplotlib takes a second.

        with files.writing(workdir / "confusion.png") as file:
            figures.confusion(confusion, class_names).savefig(file, format="png", dpi=150)
    return scores | ({"confusion": confusion.tolist()} if len(confusion) <= MAX_CONFUSION else {})


def scores_of(logits: Features, source) -> dict[str, float]:
    """Returns `top1` and `top5`, or of several labels an image the `average_precision`, for its logits."""
    if source.label_sets:
        precisions = class_precisions(logits.features, targets_of(logits, source), source.class_names)
        return {"average_precision": precisions["average_precision"]}
    return {f"top{k}": top_k(logits, k) for k in (1, 5)}


def targets_of(logits: Features, source) -> np.ndarray:
    """Returns the labels, int [n], or of several labels an image which it has, bool [n, classes]."""
    return source.label_sets[1][logits.labels] if source.label_sets else logits.labels


def scores_of_classes(logits: Features, source, workdir) -> dict:
    """Returns the `class_scores` of logits and labels; of several labels an image the average precisions."""
    if source.label_sets:
        precisions = class_precisions(logits.features, targets_of(logits, source), source.class_names)
        return {"per_class": precisions["per_class"]}
    logits = probes.labelled(logits)
    confusion = np.zeros([logits.features.shape[1]] * 2, int)
    np.add.at(confusion, (logits.labels, logits.features.argmax(axis=1)), 1)
    return class_scores(confusion, source.class_names, workdir)


def class_precisions(scores: np.ndarray, targets: np.ndarray, class_names) -> dict:
    """Returns the `average_precision` of each class that has images, `per_class`, and their mean, or NaN.

    Args:
      scores, targets: [n, classes].
      class_names: names of the classes.
    """
    precisions = zip(class_names, probes.average_precisions(scores, targets).tolist())
    per_class = {name: precision for name, precision in precisions if not np.isnan(precision)}
    mean = float(np.mean([*per_class.values()])) if per_class else np.nan
    return {"average_precision": mean, "per_class": per_class}


def draw_labels(source, *, labels_per_class: int | None, seed: int, workdir):
    """Draws `labels_per_class` random examples of every class, or takes all of them where it is not set.

    The draw is written to `workdir`/labels.json: 'split', 'rows', 'labels', and 'names' of files.

    Returns:
      The examples, and their rows, int [n].
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


def train_and_score(task: train.Task, config, model, source, held_out, workdir, *, calibrate: bool) -> dict:
    """Trains a classifier and scores it on `held_out`, or by a cross-validation where that is None.

    Args:
      task: from `make_task`.
      config, workdir: config and folder of the run.
      model: from `make_model`.
      source: the training examples, all labels where there is a cross-validation.
      held_out: examples, or None.
      calibrate: whether held-out images also calibrate the classifier, as a cross-validation always does.

    Returns:
      Those of `scores_of`, or those of `cross_validate`; those of `class_scores`;
      `calibration_temperature`.
    """
    scores = {} if held_out else cross_validate(task, config, model, source, workdir)
    state = train.fit(task, config, workdir)
    save_labelled(config, model, source, state, workdir)
    if not held_out:
        return scores
    logits = make_logits(config, model, held_out)(state)
    scores = scores_of(logits, held_out) | scores_of_classes(logits, held_out, workdir)
    return scores | calibrated(logits, held_out) if calibrate else scores


def save_labelled(config, model, source, variables, workdir) -> None:
    """Keeps features of labelled images beside the classifier; see `evaluation.doubt`."""
    from simclr_jax.data import datasets

    source = datasets.sample(source, doubt.MAX_LABELLED, seed=config.seed)
    layer = model.supervised_layer
    extract = features.make_extract(model, lambda outputs: outputs["projection_hiddens"][layer])
    rows = probes.labelled(extract(variables, features.batches_of(config, source))).features
    group.run_on_first(lambda: doubt.save(workdir, rows))


def cross_validate(task: train.Task, config, model, source, workdir) -> dict:
    """Scores a classifier of all of `source` by classifiers that learn from a part each.

    They train as `task` does, for as many steps, in `workdir`/fold<i>.

    Returns:
      `top1`, `top5`, `top1_spread`, the deviation of the top-1 accuracy over the folds, `folds`, `labels`;
      of several labels an image `average_precision` and its spread instead;
      those of `class_scores`; and `calibration_temperature`, see `evaluation.calibration`. Where no class has
      two labels, `labels`.
    """
    from simclr_jax.data import datasets

    results, scores, folds = [], [], folds_of(source)
    for number, (learnt, tested) in enumerate(folds):
        folder = workdir / f"fold{number}"
        fold = task._replace(batches=partial(batches, config, datasets.subset(source, learnt)))
        logits = make_logits(config, model, datasets.subset(source, tested))
        with report.quiet():
            results.append(logits(train.fit(fold, config, folder)))
        name, score = next(iter(scores_of(results[-1], source).items()))
        scores.append(score)
        report.say(
            f"fold {number + 1} of {len(folds)}: {name} {score:.3f} of {len(tested)} images, after "
            f"learning from {len(learnt)}"
        )
    if not results:
        return {"labels": source.num_examples}
    joined = features.concatenate(results)
    summary = scores_of(joined, source) | {f"{name}_spread": float(np.nanstd(scores))}
    summary |= {"folds": len(folds), "labels": source.num_examples}
    return summary | scores_of_classes(joined, source, workdir) | calibrated(joined, source)


def top_k(logits: Features, k: int) -> float:
    """Returns the share of examples whose label is among the k classes of the highest logits."""
    starts = range(0, len(logits.labels), _BLOCK)  # The devices hold a block at a time.
    blocks = [probes.rows_of(logits, slice(start, start + _BLOCK)) for start in starts]
    return float(np.concatenate([losses.top_k_correct(*block, k=k) for block in blocks]).mean())


def calibrated(logits: Features, source) -> dict[str, float]:
    """Returns `calibration_temperature` for a summary; see `evaluation.calibration`."""
    rows = np.sort(np.random.default_rng(0).permutation(len(logits.labels))[:CALIBRATED_ON])
    logits = probes.labelled(probes.rows_of(logits, rows))
    temperature = calibration.temperature(logits.features, targets_of(logits, source))
    return {} if temperature is None else {"calibration_temperature": temperature}


def make_logits(config, model, source):
    """Builds `logits(variables) -> Features`: logits and labels of all examples."""
    extract = features.make_extract(model, itemgetter("logits"))
    return lambda variables: extract(variables, features.batches_of(config, source))


def load_labelled(config, workdir, splits=("train", "eval")):
    """Loads splits of the dataset, for a task that needs the labels of all of them.

    With `dataset.labels` they hold the labelled images alone. Where those are few, the first split holds all
    of them, and the second is None: see `labelled_by_csv`.

    Raises:
      UserError: a split has no labels.
    """
    from simclr_jax.data import datasets

    load = partial(datasets.load, config.dataset, seed=config.seed, workdir=workdir)
    sources = labelled_by_csv(load) if config.dataset.labels else [load(split) for split in splits]
    for split, source in zip(splits, filter(None, sources)):
        group.check_agreement(f"{split} split", datasets.fingerprint(source))
        if not source.num_classes:
            raise UserError(
                f"{source.name} has no labels, which {config.task} needs: choose a labelled dataset or "
                "split; of a folder set --config.dataset.labels=labels.csv, which its page writes, or give "
                "each class a sub-folder"
            )
    if sources[0].label_sets:
        names = sources[0].label_sets[0]
        return [source and source._replace(num_classes=len(names), class_names=names) for source in sources]
    source, held_out = sources[:2]
    if "class_weights" in config and source.random_access:
        _note_uneven_classes(config, source)
    if held_out and source.random_access and held_out.random_access:
        labels = (part.labels[part.labels >= 0] for part in (source, held_out))
        for note in probes.notes(*labels, labels_per_class=1, k=1):
            report.say(f"note: {note}")
    return sources


def _note_uneven_classes(config, source):
    """Prints a note where some class has ten times the images of another, and nothing evens that out."""
    from simclr_jax.data import datasets

    counts = datasets.class_counts(source, "class_weights")
    names = source.class_names or range(len(counts))
    smallest, largest = np.where(counts, counts, counts.max()).argmin(), counts.argmax()
    uneven = counts[largest] >= _UNEVEN * counts[smallest]
    if uneven and not (config.class_weights or ("balanced_draws" in config and config.balanced_draws)):
        report.say(
            f"note: {counts[largest]:,} images are {escape(names[largest])}, {counts[smallest]:,} are "
            f"{escape(names[smallest])}: --config.class_weights=balanced lets every class count alike"
        )
