"""What TensorBoard shows of pretraining beside curves: its config, views of some images, a map at the end."""

import json
from collections.abc import Callable

import numpy as np

from simclr_jax.process.errors import reason_of
from simclr_jax.workdir import report

HELD_OUT = 2000  # images at most that the map shows
FEW = 40  # with fewer held-out images, training images are shown beside them


def begin(config, workdir, views) -> None:
    """Writes the config, and some training images with two views of each, as step 0."""
    text = json.dumps(config.to_dict(), indent=2).replace("\n", "\n    ")
    _attempt("config", lambda: report.show(workdir, 0, texts={"config": f"    {text}"}))

    def draw_views():
        from simclr_jax.plots import figures  # matplotlib takes a second

        return figures.views(views())

    _attempt("views", lambda: _show(workdir, 0, "views", draw_views()))


def end(config, workdir, step: int) -> None:
    """Writes a map of held-out images by the features that the run has learnt."""

    def embedding_map():
        from simclr_jax.evaluation import embedded
        from simclr_jax.plots import figures, gallery

        images, features, labels, names = held_out(config, workdir)
        places = gallery.places_of(embedded.directions(features))
        return figures.embedding_map(images, places, labels, names)

    report.say("\n  drawing a map of held-out images for TensorBoard")
    _attempt("map", lambda: _show(workdir, step, "map", embedding_map()))


def _attempt(name, function: Callable[[], None]) -> None:
    """No picture stops a run."""
    try:
        function()
    except Exception as error:
        report.say(f"note: TensorBoard has no {name}: {reason_of(error)}")


def _show(workdir, step, name, figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    report.show(workdir, step, pictures={name: np.asarray(canvas.buffer_rgba())[..., :3]})


def held_out(config, run):
    """Images, features, labels and class names of held-out images: of some if there are many, and of training
    images too if there are few. The features come from one device of this process."""
    from simclr_jax import encoder
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
    images, labels = [], []
    for source in sources:
        if source.num_examples:
            for batch in pipeline.eval_batches(source, image_size=config.image_size, batch_size=64):
                images.append(batch["image"][batch["mask"]])
                labels.append(batch["label"][batch["mask"]])
    images, labels = np.concatenate(images), np.concatenate(labels)
    if not all(source.num_classes for source in sources if source.num_examples):
        labels = np.full_like(labels, -1)
    return images, encoder.load(run)(images), labels, sources[0].class_names
