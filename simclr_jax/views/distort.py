"""Mirroring, colour and blur of views inside the train step, in JAX; `data/augment.py` does them on the host.

The input pipeline then hands over crops and the draws of every view (`augment.two_crops`), which takes half
the time of finished views. The same draws give the same pixels, within float rounding.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.views.recipe import DRAWS, LUMA, OPERATIONS, ORDERS, Recipe, blur_radius

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(len(OPERATIONS))
_NONE = len(OPERATIONS)  # leaves a view as it is
_NO_BLUR = 1e-3  # standard deviation, in pixels, at which all weights but the middle one are 0


def distort(crops: jax.Array, draws: jax.Array, recipe: Recipe) -> jax.Array:
    """Finishes a batch of views: mirroring, colour jitter, grayscale and blur of `augment.simclr_view`.

    Args:
      crops: float [b, s, s, c], in levels from 0 to 255, with bicubic's overshoot.
      draws: float32 [b, recipe.num_draws(c)], in [0, 1].
      recipe: how the views are made.

    Returns:
      The views, `recipe.dtype` [b, s, s, c], as the input pipeline makes them but for the noise's own
      numbers.
    """
    draw = dict(zip(DRAWS, draws.T))
    if (channels := crops.shape[-1]) != 3:
        draw |= zip(("brightness", "contrast"), jnp.split(draws[:, len(DRAWS) :], 2, axis=1))
    mirrored = _per_image(draw["flip"] < recipe.flip_probability)[..., None]
    crops = jnp.where(mirrored, crops[:, :, ::-1], crops).astype(jnp.float32) * (1 / 255)
    if recipe.vertical_flip:
        mirrored = _per_image(draw["vertical_flip"] < recipe.flip_probability)[..., None]
        crops = jnp.where(mirrored, crops[:, ::-1], crops)
    if recipe.rotate:
        turned, turns = jnp.swapaxes(crops, 1, 2), (4 * draw["rotate"]).astype(jnp.int32)
        choices = (crops, turned[:, ::-1], crops[:, ::-1, ::-1], turned[:, :, ::-1])
        crops = jnp.select([_per_image(turns == turn)[..., None] for turn in range(4)], choices)
    planes = tuple(jnp.moveaxis(crops, -1, 0))  # Each is [b, s, s], since TPUs pad short last axes.
    planes = _jitter(planes, draw, recipe)
    if channels == 3:
        luma = sum(weight * plane for weight, plane in zip(LUMA, planes))
        grey = _per_image(draw["grayscale"] < recipe.grayscale)
        planes = [jnp.where(grey, luma, plane) for plane in planes]
    views = jnp.stack([_clip(plane) for plane in planes], axis=1)
    if recipe.drop_channel:
        dropped = (draw["drop"] / recipe.drop_channel * channels).astype(jnp.int32)
        views = jnp.where(jnp.arange(channels)[:, None, None] == _per_image(dropped)[..., None], 0, views)
    if recipe.blur:
        low, high = recipe.blur_sigma
        sigma = low + (high - low) * draw["sigma"]
        sigma = jnp.where(draw["blur"] < recipe.blur_probability, sigma, _NO_BLUR)
        views = _clip(_blur(views, sigma, blur_radius(views.shape[-1])))
    if recipe.solarize:
        solarized = _per_image(draw["solarize"] < recipe.solarize)[..., None]
        views = jnp.where(solarized & (views >= 0.5), 1 - views, views)
    if recipe.noise:
        views = jax.vmap(partial(_noise, recipe=recipe))(views, draw["noise"])
    views = jnp.moveaxis(jnp.round(views * 255) if recipe.dtype == "uint8" else views, 1, -1)
    return views.astype(recipe.dtype)


def _jitter(planes, draw, recipe):
    """Applies the colour operations in each view's own order.

    Contrast needs the mean of a whole plane, so it is applied once, between the operations before it and
    those after it.
    """
    jittered = draw["jitter"] < recipe.jitter_probability
    order = jnp.asarray(ORDERS)[(draw["order"] * len(ORDERS)).astype(jnp.int32)]
    changes = [recipe.ranges[name] * (2 * draw[name] - 1) for name in OPERATIONS]
    turn = _per_image(changes[_HUE])
    factors = [1 + change for change in changes[:_HUE]]  # [b], or [b, c] where channels have their own
    brightness, contrast = (
        [_per_image(factor) for factor in jnp.broadcast_to(factors[place].T, (len(planes), len(order)))]
        for place in (_BRIGHTNESS, _CONTRAST)
    )
    saturation = _per_image(factors[_SATURATION])
    contrast_place = jnp.argmax(order == _CONTRAST, axis=1)

    def adjust(planes, operation):
        operation = _per_image(operation)
        hues = saturations = planes
        if len(planes) == 3:
            value, least = _extremes(planes)
            hues = _hue(planes, value, value - least, turn)
            saturations = _saturation(planes, value, value - least, saturation)
        adjusted = []
        for plane, hue, saturated, factor in zip(planes, hues, saturations, brightness):
            new = jnp.where(operation == _SATURATION, saturated, hue)
            new = _clip(jnp.where(operation == _BRIGHTNESS, plane * factor, new))
            adjusted.append(jnp.where(operation == _NONE, plane, new))
        return adjusted

    for place in range(3):
        before = jittered & (place < contrast_place)
        planes = adjust(planes, jnp.where(before, order[:, place], _NONE))
    means = [plane.mean((1, 2), keepdims=True) for plane in planes]
    contrasted = [
        _clip(mean + factor * (plane - mean)) for plane, mean, factor in zip(planes, means, contrast)
    ]
    planes = [jnp.where(_per_image(jittered), new, plane) for plane, new in zip(planes, contrasted)]
    for place in range(1, 4):
        after = jittered & (place > contrast_place)
        planes = adjust(planes, jnp.where(after, order[:, place], _NONE))
    return planes


def _extremes(planes):
    red, green, blue = planes
    return jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)


def _saturation(planes, value, chroma, factor):
    new_chroma = jnp.minimum(factor * chroma, jnp.maximum(value, 0))
    scale = new_chroma / jnp.maximum(chroma, 1e-12)
    return [value - scale * (value - plane) for plane in planes]


def _hue(planes, value, chroma, turn):
    red, green, blue = planes
    scale = 1 / jnp.maximum(chroma, 1e-12)
    hue = jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = jnp.where(value == red, (green - blue) * scale, hue)
    turned = []
    for corner in (5, 3, 1):
        angle = hue + 6 * turn + corner
        angle -= 6 * jnp.floor(angle * (1 / 6))
        turned.append(value - chroma * _clip(jnp.minimum(angle, 4 - angle)))
    return turned


def _blur(views, sigma, radius):
    """Multiplies every view [b, c, s, s] with a band matrix from both sides; outside the image is black."""
    offset = np.subtract.outer(*[np.arange(views.shape[-1], dtype=np.float32)] * 2)
    variance = 2 * sigma[:, None, None] ** 2
    taps = jnp.exp(-(np.arange(-radius, radius + 1, dtype=np.float32) ** 2) / variance)
    band = jnp.exp(-(offset**2) / variance) * (np.abs(offset) <= radius) / taps.sum(-1, keepdims=True)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    views = jnp.einsum("bij,bcjw->bciw", band, views, **exact)
    return jnp.einsum("bchj,bij->bchi", views, band, **exact)


def _noise(view, draw, recipe):
    normal = jax.random.normal(jax.random.key(jax.lax.bitcast_convert_type(draw, jnp.uint32)), view.shape)
    variance = view * (1 - recipe.read_noise) + recipe.read_noise
    return _clip(view + recipe.noise * draw * jnp.sqrt(variance) * normal)


def _per_image(values):
    """Reshapes [b] to [b, 1, 1], which broadcasts over planes."""
    return values[:, None, None]


def _clip(x):
    return jnp.clip(x, 0, 1)
