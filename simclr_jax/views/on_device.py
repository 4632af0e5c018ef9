"""Views of images that lie on the devices: boxes are drawn and resized in JAX, then `distort` finishes.

They have the distribution of the host's views (`data/augment.py`), by other random numbers. The same box
gives the same pixels, within float rounding.
"""

import jax
import jax.numpy as jnp

from simclr_jax.views.distort import distort
from simclr_jax.views.recipe import Recipe

_ATTEMPTS = 100  # to draw a box, after which it is the whole image, as in the official code
_LEAST_AREA = 0.1  # `min_object_covered` of the official code
_PLACES = 1024  # TensorFlow tabulates the bicubic kernel at so many places between two pixels.
_CURVATURE = -0.5  # of Keys' cubic kernel


def two_views(
    images: jax.Array, example: jax.Array, epoch: jax.Array, *, shape, seed: int, size: int, recipe: Recipe
) -> dict[str, jax.Array]:
    """Makes two views of some images. The random numbers depend on (seed, epoch, example, view) only.

    Args:
      images: uint8, or float16 in [0, 1], [n, c * h * w], all images, as planes; flat, since TPUs pad short
        axes, and would copy all images in each step.
      example: int32 [b], the images to take.
      epoch: int32 [b].
      shape: (h, w).
      seed: of the run.
      size: side of the views in pixels, s.
      recipe: how the views are made.

    Returns:
      `view1` and `view2`, `recipe.dtype` [b, s, s, c].
    """

    def crop_and_draws(example, epoch, view):
        key = jax.random.key(seed)
        for number in (epoch, example, view):
            key = jax.random.fold_in(key, number)
        box_key, draws_key = jax.random.split(key)
        planes = images[example].reshape(-1, *shape)
        box = draw_box(box_key, *shape, recipe.min_area)
        return crop(planes, box, size), jax.random.uniform(draws_key, recipe.num_draws(len(planes)))

    rows = [jnp.tile(example, 2), jnp.tile(epoch, 2), jnp.repeat(jnp.arange(2), len(example))]
    crops, draws = jax.vmap(crop_and_draws)(*rows)
    recipe = recipe if recipe.flip else recipe._replace(flip_probability=0.0)
    return dict(zip(("view1", "view2"), jnp.split(distort(crops, draws, recipe), 2)))


def draw_box(key: jax.Array, height: int, width: int, min_area: float) -> jax.Array:
    """Draws a box as `tf.image.sample_distorted_bounding_box` does for `augment.random_resized_crop`.

    Returns:
      Top, left, height and width in pixels, int32 [4], of the first attempt that fits.
    """
    ratio, extent, top, left = jax.random.uniform(key, (4, _ATTEMPTS))
    ratio, area = 3 / 4 + (4 / 3 - 3 / 4) * ratio, height * width
    highest = jnp.round(jnp.sqrt(area / ratio))
    is_too_wide = jnp.round(highest * ratio) > width
    highest = jnp.minimum(jnp.where(is_too_wide, jnp.floor((width + 0.5) / ratio), highest), height)
    lowest = jnp.minimum(jnp.round(jnp.sqrt(min_area * area / ratio)), highest)
    box_height = lowest + jnp.floor(extent * (highest - lowest + 1))
    covered = box_height * jnp.round(box_height * ratio)
    box_height += jnp.where(covered < min_area * area, 1, jnp.where(covered > area, -1, 0))
    box_width = jnp.round(box_height * ratio)
    covered = box_height * box_width
    fits = (covered >= max(min_area, _LEAST_AREA) * area) & (covered <= area)
    fits &= (box_height <= height) & (box_width <= width)
    first = jnp.argmax(fits)
    box_height = jnp.where(fits.any(), box_height[first], height)
    box_width = jnp.where(fits.any(), box_width[first], width)
    begin = jnp.floor(top[first] * (height - box_height)), jnp.floor(left[first] * (width - box_width))
    return jnp.stack([*begin, box_height, box_width]).astype(jnp.int32)


def crop(planes: jax.Array, box: jax.Array, size: int) -> jax.Array:
    """Cuts a box out of an image and resizes it (bicubic) by two products, as `tf.image.resize` does.

    Args:
      planes: uint8, or float16 in [0, 1], [c, h, w].
      box: int32 [4], see `draw_box`.
      size: side of the result.

    Returns:
      float32 [size, size, c], in levels from 0 to 255, with bicubic's overshoot.
    """
    rows, columns = (_weights(box[i], box[i + 2], planes.shape[1 + i], size) for i in (0, 1))
    exact = {"precision": jax.lax.Precision.HIGHEST}
    levels = planes.astype(jnp.float32) * (1 if planes.dtype == jnp.uint8 else 255)
    return jnp.einsum("yh,chw,xw->yxc", rows, levels, columns, **exact)


def _weights(begin, extent, side, size):
    """Returns how much each of `side` pixels weighs in each of the `size` pixels of a resized box."""
    centre = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (extent.astype(jnp.float32) / size) - 0.5
    centre = jnp.round(centre * _PLACES) / _PLACES
    place = jnp.arange(side) - begin  # in the box
    distance = jnp.abs(centre[:, None] - place)
    a = _CURVATURE
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    weights = jnp.where(distance <= 1, near, jnp.where(distance < 2, far, 0))
    weights = jnp.where((place >= 0) & (place < extent), weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)
