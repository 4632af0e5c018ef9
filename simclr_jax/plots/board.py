"""TensorBoard's pictures of pretraining beside its curves: the config, views of images, a map at the end."""

import json
from collections.abc import Callable

import jax
import numpy as np

from simclr_jax import pretrained
from simclr_jax.evaluation import parts
from simclr_jax.evaluation.features import unit_rows
from simclr_jax.plots.tsne import places_of
from simclr_jax.process import reason_of
from simclr_jax.workdir import report

HELD_OUT = 2000  # Largest number of images on the map.
MIN_IMAGES = 40  # With fewer held-out images, the map shows training images beside them.


def begin(config, workdir, views: Callable[[], dict]) -> None:
    """Writes the config, and some training images with two views of each, as step 0.

    Args:
      config, workdir: config and folder of the run.
      views: makes the batch of `figures.views`.
    """
    text = json.dumps(config.to_dict(), indent=2).replace("\n", "\n    ")
    _attempt("config", lambda: report.show(workdir, 0, texts={"config": f"    {text}"}))
    _attempt("views", lambda: _show(workdir, 0, "views", lambda figures: figures.views(views())))


def end(config, workdir, step: int) -> None:
    """Writes a map of held-out images by the features that the run has learnt."""

    def draw(figures):
        images, features, labels, class_names = held_out(config, workdir)
        places = places_of(unit_rows(features))
        return figures.embedding_map(images, places, labels, class_names)

    report.say("\n  drawing a map of held-out images for TensorBoard")
    _attempt("map", lambda: _show(workdir, step, "map", draw))


def _attempt(name, show: Callable[[], None]) -> None:
    """Shows something; what fails does not stop the run."""
    try:
        show()
    except Exception as error:
        report.say(f"note: TensorBoard has no {name}: {reason_of(error)}")


def _show(workdir, step, name, draw):
    """Shows the figure that `draw(figures)` makes by the module `figures`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from simclr_jax.plots import figures  # Importing matplotlib takes a second.

    canvas = FigureCanvasAgg(draw(figures))
    canvas.draw()
    report.show(workdir, step, pictures={name: np.asarray(canvas.buffer_rgba())[..., :3]})


def held_out(config, run):
    """Loads `HELD_OUT` held-out images at most, with training images beside them where they are few.

    Returns:
      Images, [n, h, w, c], the run's features of them, float32 [n, w], by one device of this process,
      labels, int [n], -1 where there are none, and class names.
    """
    from simclr_jax.data import datasets, pipeline

    sources = [datasets.sample(parts.load(config, run, "eval"), HELD_OUT, seed=config.seed)]
    if (missing := MIN_IMAGES - sources[0].num_examples) > 0:
        beside = datasets.sample(parts.load(config, run, "train"), missing, seed=config.seed)
        report.say(
            f"{sources[0].num_examples} images are held out: the map shows {beside.num_examples} training "
            "images beside them"
        )
        sources.append(beside)
    model, variables, _ = pretrained.load_model(run)
    variables, apply = jax.device_put(variables), jax.jit(model.apply)
    batches, class_names = [], sources[0].class_names
    sources = [source for source in sources if source.num_examples]
    for source in sources:
        for batch in pipeline.eval_batches(source, image_size=config.image_size, batch_size=64):
            output = np.asarray(apply(variables, batch["image"])["features"], np.float32)
            batches.append([rows[batch["mask"]] for rows in (batch["image"], output, batch["label"])])
    images, features, labels = map(np.concatenate, zip(*batches))
    if not all(source.num_classes for source in sources):
        labels = np.full_like(labels, -1)
    return images, features, labels, class_names
