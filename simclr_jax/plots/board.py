"""TensorBoard's pictures of pretraining beside its curves: the config, views of images, a map at the end."""

import json
from collections.abc import Callable

import jax
import numpy as np

from simclr_jax import pretrained
from simclr_jax.evaluation.features import unit_rows
from simclr_jax.plots.tsne import places_of
from simclr_jax.process import reason_of
from simclr_jax.workdir import report

HELD_OUT = 2000  # Largest number of images on the map.
FEW = 40  # With fewer held-out images, the map shows training images beside them.


def begin(config, workdir, views: Callable[[], dict]) -> None:
    """Writes the config, and some training images with two views of each, as step 0.

    Args:
      config, workdir: of the run.
      views: makes the batch of `figures.views`.
    """

    def draw():
        from simclr_jax.plots import figures  # Importing matplotlib takes a second.

        _show(workdir, 0, "views", figures.views(views()))

    text = json.dumps(config.to_dict(), indent=2).replace("\n", "\n    ")
    _attempt("config", lambda: report.show(workdir, 0, texts={"config": f"    {text}"}))
    _attempt("views", draw)


def end(config, workdir, step: int) -> None:
    """Writes a map of held-out images by the features that the run has learnt."""

    def draw():
        from simclr_jax.plots import figures

        images, features, labels, class_names = held_out(config, workdir)
        places = places_of(unit_rows(features))
        _show(workdir, step, "map", figures.embedding_map(images, places, labels, class_names))

    report.say("\n  drawing a map of held-out images for TensorBoard")
    _attempt("map", draw)


def _attempt(name, draw: Callable[[], None]) -> None:
    """Draws a picture; a picture that fails does not stop the run."""
    try:
        draw()
    except Exception as error:
        report.say(f"note: TensorBoard has no {name}: {reason_of(error)}")


def _show(workdir, step, name, figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    report.show(workdir, step, pictures={name: np.asarray(canvas.buffer_rgba())[..., :3]})


def held_out(config, run):
    """Loads `HELD_OUT` held-out images at most, with training images beside them where they are few.

    Returns:
      Images, uint8 [n, h, w, 3], the run's features of them, float32 [n, w], by one device of this process,
      labels, int [n], -1 where there are none, and class names.
    """
    from simclr_jax.data import datasets, pipeline

    def load(split):
        return datasets.load(config.dataset, split, seed=config.seed, workdir=run)

    sources = [datasets.sample(load("eval"), HELD_OUT, seed=config.seed)]
    if sources[0].num_examples < FEW:
        beside = datasets.sample(load("train"), FEW - sources[0].num_examples, seed=config.seed)
        report.say(
            f"{sources[0].num_examples} images are held out: the map shows {beside.num_examples} training "
            "images beside them"
        )
        sources.append(beside)
    model, variables, _ = pretrained.load_model(run)
    variables, apply = jax.device_put(variables), jax.jit(model.apply)
    images, features, labels = [], [], []
    for source in sources:
        if source.num_examples:
            for batch in pipeline.eval_batches(source, image_size=config.image_size, batch_size=64):
                images.append(batch["image"][batch["mask"]])
                output = apply(variables, batch["image"])["features"]
                features.append(np.asarray(output, np.float32)[batch["mask"]])
                labels.append(batch["label"][batch["mask"]])
    images, features, labels = map(np.concatenate, (images, features, labels))
    if not all(source.num_classes for source in sources if source.num_examples):
        labels = np.full_like(labels, -1)
    return images, features, labels, sources[0].class_names
