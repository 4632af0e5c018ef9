"""Fine-tuning of a pretrained network on labels, all of them or few (v1 section 4.2, v2 section 3.1)."""

import time
from functools import partial

import numpy as np
from etils import epath

from simclr_jax import official, pretrained, supervised, train
from simclr_jax.models import make_init, make_model
from simclr_jax.process.errors import UserError
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Fine-tunes, and where `evaluate.compare` trains the same network from scratch for as long.

    With `labels_per_class`, `draws` times on other labels: the first draw in `workdir`, the others in
    `workdir/draw<i>`, networks from scratch in `workdir/scratch<i>`. Each keeps its labels in labels.json.
    Where labels by CSV are few, all of them are learnt from, after a cross-validation.

    Returns:
      The summary: `top1` and `top5` of the held-out images, `from_scratch_top1`, each the mean over the
      draws, `draws` with every one of them, `labels_per_class`; or those of `supervised.cross_validate`;
      `calibration_temperature` of the first draw, `steps`, `seconds`.
    """
    begun = time.monotonic()
    workdir = epath.Path(workdir)
    source, held_out = supervised.load_labelled(config, workdir)
    if not held_out and config.labels_per_class:
        raise UserError(
            f"labels_per_class={config.labels_per_class}: the {source.num_examples} labels of "
            f"{config.dataset.labels} are too few to draw some of them and judge by the others; leave it out"
        )
    model = make_model(config.model, source.num_classes, whole_projection=False)
    starts = {"": (pretrained.make_init(config, model), config.fine_tune_after_block)}
    if config.evaluate.compare:
        starts["from_scratch_"] = (make_init(model, config.image_size), -1)
    warn_of_weights(config)
    evaluate = held_out and supervised.make_evaluate(config, model, held_out)
    results = [{} for _ in range(config.draws if config.labels_per_class else 1)]
    calibrated = {}
    for prefix, (init, after_block) in starts.items():
        loss = supervised.make_loss(model, config, after_block=after_block)
        trained = partial(supervised.is_after_block, after_block=after_block)
        shared = None  # so that all draws run the same compiled step
        for draw, result in enumerate(results):
            ours = config.copy_and_resolve_references()
            ours.seed = config.seed + draw
            if prefix and config.evaluate.scratch_learning_rate:
                ours.optimizer.learning_rate = config.evaluate.scratch_learning_rate
            place = workdir / f"scratch{draw}" if prefix else workdir / f"draw{draw}" if draw else workdir
            subset, _ = supervised.draw_labels(
                source, labels_per_class=config.labels_per_class, seed=ours.seed, workdir=place
            )
            task = supervised.make_task(ours, model, subset, init=init, loss=loss, evaluate=evaluate)
            shared = shared or task
            task = shared._replace(batches=task.batches, meta=task.meta, trained=trained)
            if place == workdir:
                report.print_table(train.describe(task, config, subset, workdir))
            else:
                report.say(f"draw {draw + 1}{', from scratch' if prefix else ''}: {place}")
            scores = {} if held_out else supervised.cross_validate(task, ours, model, subset, place)
            state = train.fit(task, ours, place)
            if held_out:
                scores = evaluate(state)
                if place == workdir:
                    logits = supervised.make_logits(config, model, held_out)
                    calibrated = supervised.calibrated(logits(state))
            result |= {prefix + name: score for name, score in scores.items()}
    summary = {name: float(np.mean([result[name] for result in results])) for name in results[0]} | calibrated
    if config.labels_per_class:
        summary |= {"labels_per_class": config.labels_per_class, "draws": results}
    return summary | {"steps": task.num_steps, "seconds": round(time.monotonic() - begun, 1)}


def warn_of_weights(config) -> None:
    """Tells where the optimiser of the config and the checkpoint that it starts from do not go together."""
    if config.optimizer.name == "sgd" and official.find(config.pretrained):
        report.say(f"note: {official.WEIGHTS} (simclr_jax/official/)")
