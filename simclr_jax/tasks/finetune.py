"""Fine-tuning of a pretrained network on labels, all of them or few (v1 section 4.2, v2 section 3.1)."""

from functools import partial

import numpy as np

from simclr_jax import official, pretrained, supervised, train
from simclr_jax.models import make_init, make_model
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Fine-tunes, and where `evaluate.compare` trains the same network from scratch for as long.

    With `labels_per_class`, `draws` times on other labels: the first draw in `workdir`, the others in
    `workdir/draw<i>`, networks from scratch in `workdir/scratch<i>`. Each keeps its labels in labels.json.
    Where labels by CSV are few, it learns from all of them, after a cross-validation.

    Returns:
      The summary: `top1`, `top5` and `balanced_accuracy` of the held-out images, `from_scratch_top1`, ...,
      each the mean over the draws, `draws` with the scores of every draw, `labels_per_class`; or those of
      `supervised.cross_validate`; `per_class`, `confusion` and `calibration_temperature` of the first draw,
      `steps`.
    """
    source, held_out = supervised.load_labelled(config, workdir)
    if not held_out and config.labels_per_class:
        report.say(
            f"note: all {source.num_examples} labels are learnt from, not labels_per_class="
            f"{config.labels_per_class} of each class: they are too few to judge by the others"
        )
        config = config.copy_and_resolve_references()
        config.labels_per_class = None
    warn_of_weights(config)
    model = make_model(config.model, source.num_classes, whole_projection=False)
    evaluate = held_out and supervised.make_evaluate(config, model, held_out)
    train_draws = partial(_train_draws, config, model, source, held_out, evaluate, workdir)
    draws, steps = train_draws(from_scratch=False)
    if config.evaluate.compare and "per_class" in draws[0]:
        for scores, scratch_scores in zip(draws, train_draws(from_scratch=True)[0]):
            scores |= {
                f"from_scratch_{name}": score
                for name, score in scratch_scores.items()
                if isinstance(score, int | float)
            }
    calibration = {name: draws[0].pop(name) for name in [*draws[0]] if name == "calibration_temperature"}
    summary = {
        name: float(np.mean([scores[name] for scores in draws])) if isinstance(first, int | float) else first
        for name, first in draws[0].items()
    } | calibration
    if config.labels_per_class:
        summary |= {"labels_per_class": config.labels_per_class, "draws": draws}
    return summary | {"steps": steps}


def _train_draws(config, model, source, held_out, evaluate, workdir, *, from_scratch):
    """Trains a network on every draw of labels; returns the scores of each, and the steps of one."""
    config = config.copy_and_resolve_references()
    if from_scratch:
        init, after_block = make_init(model, config.image_size), -1
        if config.evaluate.scratch_learning_rate:
            config.optimizer.learning_rate = config.evaluate.scratch_learning_rate
    else:
        init, after_block = pretrained.make_init(config, model), config.fine_tune_after_block
    trained = partial(supervised.is_after_block, after_block=after_block)
    shared, scores, seed = None, [], config.seed
    for draw in range(config.draws if config.labels_per_class else 1):
        config.seed = seed + draw
        folder = workdir / f"scratch{draw}" if from_scratch else workdir / f"draw{draw}" if draw else workdir
        subset, _ = supervised.draw_labels(
            source, labels_per_class=config.labels_per_class, seed=config.seed, workdir=folder
        )
        weights = supervised.class_weights(config, subset)
        options = {"class_weights": weights, "label_sets": source.label_sets}
        loss = supervised.make_loss(model, config, after_block=after_block, **options)
        attributes = {"init": init, "loss": loss, "evaluate": evaluate, "trained": trained}
        task = supervised.make_task(config, model, subset, **attributes)
        shared = shared or task  # All draws run the same compiled step.
        task = shared._replace(batches=task.batches, meta=task.meta)
        first = folder == workdir
        if first:
            report.announce(train.describe(task, config, subset, workdir), task.batches)
        else:
            report.say(f"draw {draw + 1}{', from scratch' if from_scratch else ''}: {folder}")
        scores.append(
            supervised.train_and_score(task, config, model, subset, held_out, folder, calibrate=first)
        )
    return scores, shared.num_steps


def warn_of_weights(config) -> None:
    """Prints a note where the optimiser does not suit the checkpoint that fine-tuning starts from."""
    if config.optimizer.name == "sgd" and official.find(config.pretrained):
        report.say(f"note: {official.WEIGHT_SCALE_NOTE} (simclr_jax/official/)")
