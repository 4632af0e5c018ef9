"""Contrastive pretraining: SimCLR (arXiv 2002.05709) and SimCLR v2 (arXiv 2006.10029)."""

import math
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import losses, parallel, pretrained, supervised, train
from simclr_jax.evaluation import features, health, probes
from simclr_jax.models import make_init, make_model
from simclr_jax.parallel import bound_axis
from simclr_jax.process import group
from simclr_jax.process.errors import UserError
from simclr_jax.views.distort import DRAWS, distort
from simclr_jax.workdir import report

_CALLED = {"untrained": "those of an untrained network", "raw_pixels": "raw pixels"}
SPACES = ("features", "projection")
HEALTH_EXAMPLES = 2048  # images, of two views each; their rank is at most twice that


def run(config, workdir) -> dict:
    """Pretrains, then measures what the features are worth.

    Returns:
      The summary: `steps`, `seconds`; `notes` where there are some; `health`, see `evaluation.health`, of the
      `features` and the `projection` of training images; where there are labels `trained`, `untrained` and
      `raw_pixels`, each with `linear_accuracy`, `knn_accuracy` and `few_label_accuracy` on the held-out
      images. The three are measured by the same probes: of the encoder, of the same network with random
      weights, even where the run started from others, and of the pixels themselves, see
      `evaluation.features.raw_pixels`, and `few_label_deviation` has the deviation of each over the draws of
      labels. Where labels by CSV are few, scores are those of a cross-validation.
    """
    from simclr_jax.data import datasets  # TensorFlow: not needed to build the step

    begun = time.monotonic()
    train.check_batch_size(config.batch_size, jax.device_count(), config.microbatches)
    load = partial(datasets.load, seed=config.seed, workdir=workdir)
    source = load(config.dataset, "train")
    group.check_agreement("train split", datasets.fingerprint(source))
    model = make_model(config.model, _probed_classes(source), remat=config.remat)
    task = make_task(config, model, source)
    examine = _make_examine(config, model, source)
    measure = _make_measure(config, model, source, load)

    def evaluate(variables):
        figures = {
            f"{space}_{name}": value
            for space, values in examine(variables).items()
            for name, value in values.items()
            if name != "dimensions"
        }
        return figures | (measure(variables, only_knn=True) if measure else {})

    task = task._replace(
        evaluate=evaluate,
        evaluate_every_steps=train.steps_in(config.evaluate.every_epochs, config, source.num_examples),
        evaluate_first=True,
        best="knn_accuracy" if measure else None,
    )
    rows = train.describe(task, config, source, workdir)
    if config.loss == "nt_xent":
        others = 2 * config.batch_size - 1
        rows["by chance"] = f"loss {2 * math.log(others):.4g}, contrastive accuracy {1 / others:.2g}"
    report.print_table(rows)
    state = train.fit(task, config, workdir)

    compared = {"trained": state}
    if config.evaluate.compare:
        compared["untrained"] = make_init(model, config.image_size)(jax.random.key(config.seed))
        compared |= {"raw_pixels": None} if measure else {}
    report.say(f"measuring: {', '.join(compared).replace('_', ' ')}")
    summary, spread = {"steps": task.num_steps, "health": {}}, {}
    for name, variables in compared.items():
        if variables is not None:
            prefix = "" if name == "trained" else f"{name}_"
            summary["health"] |= {prefix + space: values for space, values in examine(variables).items()}
        if measure:
            summary[name] = measure(variables, only_knn=not config.evaluate.compare)
            if "few_labels" in summary[name]:
                summary[name]["few_label_accuracy"], spread[name] = map(
                    float, summary[name].pop("few_labels")
                )
    summary |= {"few_label_deviation": spread} if spread else {}
    images, dimensions = _health_examples(config, source), summary["health"]["features"]["dimensions"]
    if images < dimensions:
        report.say(
            f"note: health is that of {images:,} images, fewer than the features' {dimensions:,} dimensions: "
            "their effective rank is limited by the images, too"
        )
    found = notes(summary)
    return summary | {"seconds": round(time.monotonic() - begun, 1)} | ({"notes": found} if found else {})


def notes(summary) -> list[str]:
    """Where the trained features are no better than what they are compared with, a sentence each."""
    found = []
    for other in [other for other in _CALLED if other in summary]:
        worse = [
            f"{name.replace('_', ' ')} {score:.3f} against {summary[other][name]:.3f}"
            for name, score in summary["trained"].items()
            if score <= summary[other][name]
        ]
        if worse:
            found.append(
                f"the trained features are no better than {_CALLED[other]}: {', '.join(worse)}. Few images "
                "want published weights to start from (docs/published.md), others more epochs"
            )
    return found


def make_task(config, model, source) -> train.Task:
    """Pretraining of `model` on `source`, as the train loop takes it.

    Raises:
      UserError: an image would be twice in a batch.
    """
    check_batch(config, source.num_examples)
    schedule, num_steps = train.make_schedule(config, source.num_examples)
    return train.Task(
        init=(
            pretrained.make_init(config, model) if config.pretrained else make_init(model, config.image_size)
        ),
        loss=make_loss(model, config),
        optimizer=train.make_optimizer(config, schedule),
        schedule=schedule,
        batches=partial(batches, config, source),
        num_steps=num_steps,
        meta={
            "config": config.to_dict(),
            "num_classes": model.supervised_head.features if model.supervised_head else 0,
            "class_names": list(source.class_names),
            "value_range": source.value_range,
            "order": source.order,
            "source": pretrained.source_of(config),
        },
    )


def _probed_classes(source) -> int:
    """Classes of the linear probe beside the training; 0, none, where some images have no label."""
    return source.num_classes if getattr(source, "labels", np.zeros(1)).min() >= 0 else 0


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
    """`config.loss` of the batch's `view1` and `view2`, uint8 [b, h, w, 3]; a `train.Task.loss`.

    With `config.augment.on_device` these are crops, and what follows a crop is done here, see `crops`.

    Where there are classes, the supervised head learns beside it from `label`, int32 [b], on features that
    its gradient does not reach: a linear probe of the pretraining so far, as in the official code.

    With `config.microbatches` the loss is still that of the whole batch, only batch norm takes its statistics
    over a microbatch of every device.
    """

    def loss(params, batch_stats, batch):
        def encode(batch_stats, batch):
            images = jnp.concatenate([batch["view1"], batch["view2"]])
            if config.augment.on_device:
                draws = jnp.concatenate([batch["draws1"], batch["draws2"]])
                images = distort(images, draws, **_of_colour(config))
            outputs, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                detach_logits=True,
                mutable=["batch_stats"],
            )
            kept = {name: jnp.split(outputs[name], 2) for name in ("projection", "logits") if name in outputs}
            return updates.get("batch_stats", batch_stats), kept

        batch_stats, outputs = train.in_microbatches(encode, batch_stats, batch, config.microbatches)
        value, results = losses.LOSSES[config.loss](
            *outputs["projection"], temperature=config.temperature, axis_name=bound_axis()
        )
        results["loss"] = value  # what is reported; the probe has a loss of its own
        if "logits" in outputs:
            logits, labels = jnp.concatenate(outputs["logits"]), jnp.tile(batch["label"], 2)
            probe_loss = losses.softmax_cross_entropy(logits, labels)
            value += probe_loss + supervised.head_decay(config.optimizer, params)
            results["probe_loss"] = probe_loss
            results["probe_accuracy"] = losses.top_k_correct(logits, labels, k=1).mean()
        return value, (batch_stats, results)

    return loss


def example_views(config, workdir, count: int) -> dict[str, list]:
    """`count` training images as the eye knows them, `image`, with a first and a second view of each."""
    from simclr_jax.data import augment, datasets, pipeline

    def transform(image, seed):
        return {"image": augment.eval_view(image, config.image_size)} | views(config, image, seed)

    source = datasets.load(config.dataset, "train", seed=config.seed, workdir=workdir)
    batch = next(pipeline.train_batches(source, transform, batch_size=count, seed=config.seed))
    return {name: batch[name] for name in ("image", "view1", "view2")}


def views(config, image, seed):
    """Two views of an image, `view1` and `view2`; a transform of the input pipeline."""
    from simclr_jax.data import augment

    view1, view2 = augment.two_views(
        image, seed, config.image_size, **_of_colour(config), **_of_crops(config), dtype="uint8"
    )
    return {"view1": view1, "view2": view2}


def crops(config, image, seed):
    """What `views` are made of on the devices: as `view1` and `view2` their crops, `draws1` and `draws2`."""
    from simclr_jax.data import augment

    dtype = config.augment.crop_dtype
    pair = augment.two_crops(image, seed, config.image_size, **_of_crops(config), dtype=dtype)
    (view1, draws1), (view2, draws2) = pair
    return {"view1": view1, "view2": view2, "draws1": draws1, "draws2": draws2}


def _of_crops(config):
    return {"min_area": config.augment.min_area, "flip": config.augment.flip}


def _of_colour(config):
    return {"color_jitter_strength": config.augment.color_jitter_strength, "blur": config.augment.blur}


def batch_shapes(config, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch of so many rows holds, as the train step takes it."""
    on_device, images = config.augment.on_device, (rows, config.image_size, config.image_size, 3)
    dtype = config.augment.crop_dtype if on_device else "uint8"
    shapes = {view: jax.ShapeDtypeStruct(images, dtype) for view in ("view1", "view2")}
    if on_device:
        shapes |= {draws: jax.ShapeDtypeStruct((rows, DRAWS), "float32") for draws in ("draws1", "draws2")}
    return shapes | {"label": jax.ShapeDtypeStruct((rows,), "int32")}


def batches(config, source, start_step):
    """This process's batches of `batch_shapes`, from `start_step` on."""
    from simclr_jax.data import pipeline

    on_device = config.augment.on_device
    return pipeline.train_batches(
        source,
        partial(crops if on_device else views, config),
        dtype=config.augment.crop_dtype if on_device else "uint8",
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        **parallel.this_process(),
    )


def _health_examples(config, source):
    return min(HEALTH_EXAMPLES, config.evaluate.max_examples, source.num_examples)


def _make_examine(config, model, source):
    """Builds `examine(variables) -> {'features': health, 'projection': health}`, of training images."""
    from simclr_jax.data import datasets

    source = datasets.sample(source, _health_examples(config, source), seed=config.seed)

    def encode(variables, batch):
        outputs = {view: model.apply(variables, batch[view]) for view in ("view1", "view2")}
        return {f"{view}_{space}": outputs[view][space] for view in outputs for space in SPACES}

    encode_all = features.make_map(encode)

    def examine(variables):
        batches = features.batches_of(config, source, transform=partial(views, config), seed=config.seed)
        rows = encode_all({name: variables[name] for name in ("params", "batch_stats")}, batches)
        return {space: health.measure(rows[f"view1_{space}"], rows[f"view2_{space}"]) for space in SPACES}

    return examine


def _make_measure(config, model, source, load):
    """Builds `measure(variables) -> scores` on held-out images, raw pixels for None; None without labels."""
    from simclr_jax.data import datasets

    if config.dataset.probe_split:
        source = load(config.dataset, "probe")
    if not source.num_classes:
        return None
    if config.dataset.labels:
        everything, held_out = supervised.labelled_by_csv(partial(load, config.dataset))
        source = source if held_out else everything
    else:
        held_out = load(config.dataset, "eval")
        if not held_out.num_classes:
            return None
    sources = [
        datasets.sample(_labelled(of), config.evaluate.max_examples, seed=config.seed)
        for of in (source, held_out)
        if of
    ]
    if len(sources) == 2 and all(isinstance(of, datasets.Source) for of in sources):
        for note in probes.notes(*(of.labels for of in sources), labels_per_class=config.labels_per_class):
            report.say(f"note: {note}")
    extract = features.make_extract(model)

    def features_of(variables, of):
        batches = features.batches_of(config, of)
        found = features.raw_pixels(batches) if variables is None else extract(variables, batches)
        found = probes.labelled(found)
        if not len(found.labels):
            raise _unlabelled(of)
        return found

    def few_labels(train, held_out):
        drawn = probes.few_label_accuracies(train, held_out, labels_per_class=config.labels_per_class)
        return np.array([np.mean(drawn), np.std(drawn)])

    def measure(variables, only_knn=False):
        if variables is not None:
            variables = {name: variables[name] for name in ("params", "batch_stats")}
        found = [features_of(variables, of) for of in sources]
        scores = {"knn_accuracy": probes.knn_accuracy}
        if not only_knn:
            scores |= {"linear_accuracy": probes.linear_accuracy, "few_labels": few_labels}
        if len(found) == 1:
            return {name: probes.cross_validated(score, *found) for name, score in scores.items()}
        return {name: score(*found) for name, score in scores.items()}

    return measure


def _labelled(source):
    from simclr_jax.data import datasets

    found = datasets.labelled(source)
    if not found.num_examples:
        raise _unlabelled(source)
    return found


def _unlabelled(source):
    return UserError(
        f"{source.name} has classes, but none of its images has a label: set --config.dataset.probe_split "
        "and --config.dataset.eval_split to labelled splits"
    )
