"""The batches of pretraining: two views of every image, or crops from which the devices make the views."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np

from simclr_jax import parallel
from simclr_jax.process import UserError
from simclr_jax.views.recipe import Recipe, make_recipe

# A function (image, seed) -> view in TensorFlow: [h, w, c], uint8 or for more than 8 bits float32 in [0, 1],
# int32 [2] -> [size, size, c], uint8 or float32 in [0, 1].
View = Callable


def views(config, view: View | None, image, seed) -> dict:
    """Makes two views of an image, `view1` and `view2`.

    Args:
      config: a config of pretraining.
      view: the user's own view function; None follows the recipe of `config.augment`.
      image: as `Source.decode` makes it, [h, w, c].
      seed: int32 [2].
    """
    from simclr_jax.data import augment, tf

    size = config.image_size
    if view is None:
        dtype = "uint8" if config.augment.dtype == "uint8" else "float32"  # float16 behind the pipeline
        pair = augment.two_views(image, seed, size, make_recipe(config.augment), dtype=dtype)
    else:
        view = tf.function(view)  # AutoGraph converts its conditions and loops.
        pair = [view(image, part) for part in tf.unstack(tf.random.experimental.stateless_split(seed, 2))]
        pair = [tf.ensure_shape(made, [size, size, config.model.channels]) for made in pair]
    return dict(zip(("view1", "view2"), pair))


def prepare(config, source, view: View | None) -> None:
    """Sets `model.channels` and `augment.dtype` to those of the images.

    Raises:
      UserError: the user's view function returns another dtype or shape.
    """
    from simclr_jax.data import tf

    config.model.channels, config.augment.dtype = source.channels, source.dtype
    if not view:
        return
    size, channels = config.image_size, source.channels
    made = view(tf.zeros([size + 8, size, channels], tf.uint8), tf.constant([0, 0]))
    if made.dtype not in (tf.uint8, tf.float32) or made.shape != [size, size, channels]:
        raise UserError(
            f"view() returns {made.dtype.name} of shape {made.shape}: expected uint8, or float32 in [0, 1], "
            f"of shape ({size}, {size}, {channels}), as image_size={size} says"
        )


def crops(config, image, seed) -> dict:
    """Makes the crops that the devices turn into two views, `view1` and `view2`, and their random numbers."""
    from simclr_jax.data import augment

    recipe, dtype = make_recipe(config.augment), config.augment.crop_dtype
    (view1, draws1), (view2, draws2) = augment.two_crops(image, seed, config.image_size, recipe, dtype=dtype)
    return {"view1": view1, "view2": view2, "draws1": draws1, "draws2": draws2}


def batch_shapes(config, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a batch of the train step."""
    on_device = config.augment.on_device and not config.dataset.on_device
    images = (rows, config.image_size, config.image_size, config.model.channels)
    dtype = config.augment.crop_dtype if on_device else config.augment.dtype
    shapes = {view: jax.ShapeDtypeStruct(images, dtype) for view in ("view1", "view2")}
    if on_device:
        draws = jax.ShapeDtypeStruct((rows, Recipe.num_draws(config.model.channels)), "float32")
        shapes |= {"draws1": draws, "draws2": draws}
    return shapes | {"label": jax.ShapeDtypeStruct((rows,), "int32")}


def train_batches(config, source, view: View | None, start_step: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's batches, as `batch_shapes` describes them, from `start_step` on, without end."""
    from simclr_jax.data import pipeline

    on_device = config.augment.on_device
    return pipeline.train_batches(
        source,
        partial(crops, config) if on_device else partial(views, config, view),
        dtype=config.augment.crop_dtype if on_device else None,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        **parallel.this_process(),
    )


def example_views(config, workdir, view: View | None = None, *, count: int) -> dict[str, np.ndarray]:
    """Returns `count` training images in the evaluation view, `image`, and two views of each."""
    from simclr_jax.data import augment, datasets, pipeline

    # A few images are no reason to read a large dataset as a whole.
    dataset = config.dataset.copy_and_resolve_references()
    dataset.update(in_memory=False, shuffle_buffer=16)

    def transform(image, seed):
        return {"image": augment.eval_view(image, config.image_size)} | views(config, view, image, seed)

    source = datasets.load(dataset, "train", seed=config.seed, workdir=workdir)
    batch = next(pipeline.train_batches(source, transform, batch_size=count, seed=config.seed))
    return {name: batch[name] for name in ("image", "view1", "view2")}
