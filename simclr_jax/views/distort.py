"""Mirroring, colour and blur of views inside the train step, in JAX: `data/augment.py` does so on the host.

The input pipeline then hands over crops and the draws of every view (`augment.two_crops`), and saves
half of its time. The same draws give the same pixels, within float rounding.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 10  # of a view
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _NOTHING = range(5)
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)
_SIGMA = (0.1, 2.0)  # of the blur, in pixels (arXiv 2002.05709, appendix A)
_NO_BLUR = 1e-3  # pixels: all weights but the middle one are 0


def distort(crops: jax.Array, draws: jax.Array, *, color_jitter_strength: float, blur: bool) -> jax.Array:
    """Mirroring, colour jitter, grayscale and blur of `augment.simclr_view`, of a batch.

    Args:
      crops: float [b, s, s, 3], of levels 0 to 255 and bicubic's overshoot.
      draws: float32 [b, 10] in [0, 1]: whether to mirror, to jitter, to turn grey, to blur; the blur's sigma;
        the order of the colour operations; the factors of brightness, contrast and saturation, and the turn
        of the hue.
      color_jitter_strength, blur: as of `augment.simclr_view`.

    Returns:
      uint8 [b, s, s, 3], as the pipeline hands over whole views.
    """
    mirrors, jitters, greys, blurs, sigma = draws[:, :5].T
    crops = jnp.where((mirrors < 0.5)[:, None, None, None], crops[:, :, ::-1], crops)
    crops = crops.astype(jnp.float32) * (1 / 255)
    planes = tuple(jnp.moveaxis(crops, -1, 0))  # each [b, s, s]: TPUs pad short last axes
    planes = _jitter(planes, jitters < 0.8, draws[:, 5:], color_jitter_strength)
    luma = 0.2989 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]
    planes = [_clip(jnp.where(_each(greys < 0.2), luma, plane)) for plane in planes]
    views = jnp.stack(planes, axis=1)
    if blur:
        sigma = _SIGMA[0] + (_SIGMA[1] - _SIGMA[0]) * sigma
        views = _clip(_blur(views, jnp.where(blurs < 0.5, sigma, _NO_BLUR), views.shape[-1] // 10 // 2))
    return jnp.moveaxis(jnp.round(views * 255), 1, -1).astype(jnp.uint8)


def _jitter(planes, chosen, draws, strength):
    """The operations in each view's own order, in two passes: contrast needs the mean of a whole plane."""
    order = jnp.asarray(_ORDERS)[(draws[:, 0] * len(_ORDERS)).astype(jnp.int32)]
    factors = [_each(1 + 0.8 * strength * (2 * draw - 1)) for draw in draws[:, 1:4].T]
    turn = _each(0.2 * strength * (2 * draws[:, 4] - 1))
    place = jnp.argmax(order == _CONTRAST, axis=1)

    def adjust(planes, operation):
        operation = _each(operation)
        value, least = _extremes(planes)
        hues = _hue(planes, value, value - least, turn)
        saturations = _saturation(planes, value, value - least, factors[_SATURATION])
        adjusted = []
        for plane, hue, saturation in zip(planes, hues, saturations):
            brightness = plane * factors[_BRIGHTNESS]
            new = jnp.where(operation == _SATURATION, saturation, hue)
            new = _clip(jnp.where(operation == _BRIGHTNESS, brightness, new))
            adjusted.append(jnp.where(operation == _NOTHING, plane, new))
        return adjusted

    for turn_of in range(3):
        before = chosen & (turn_of < place)
        planes = adjust(planes, jnp.where(before, order[:, turn_of], _NOTHING))
    means = [plane.mean((1, 2), keepdims=True) for plane in planes]
    contrasted = [_clip(mean + factors[_CONTRAST] * (plane - mean)) for plane, mean in zip(planes, means)]
    planes = [jnp.where(_each(chosen), new, plane) for plane, new in zip(planes, contrasted)]
    for turn_of in range(1, 4):
        behind = chosen & (turn_of > place)
        planes = adjust(planes, jnp.where(behind, order[:, turn_of], _NOTHING))
    return planes


def _extremes(planes):
    red, green, blue = planes
    return jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)


def _saturation(planes, value, chroma, factor):
    new_chroma = jnp.minimum(factor * chroma, jnp.maximum(value, 0))
    scale = new_chroma / jnp.maximum(chroma, 1e-12)
    return [value - scale * (value - plane) for plane in planes]


def _hue(planes, value, chroma, factor):
    red, green, blue = planes
    scale = 1 / jnp.maximum(chroma, 1e-12)
    hue = jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = jnp.where(value == red, (green - blue) * scale, hue)
    turned = []
    for corner in (5, 3, 1):
        turn = hue + 6 * factor + corner
        turn -= 6 * jnp.floor(turn * (1 / 6))
        turned.append(value - chroma * _clip(jnp.minimum(turn, 4 - turn)))
    return turned


def _blur(views, sigma, radius):
    """Products with a band matrix of every view [b, 3, s, s]; outside the image is black."""
    offset = np.subtract.outer(*[np.arange(views.shape[-1], dtype=np.float32)] * 2)
    variance = 2 * sigma[:, None, None] ** 2
    taps = jnp.exp(-(np.arange(-radius, radius + 1, dtype=np.float32) ** 2) / variance)
    band = jnp.exp(-(offset**2) / variance) * (np.abs(offset) <= radius) / taps.sum(-1, keepdims=True)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    views = jnp.einsum("bij,bcjw->bciw", band, views, **exact)
    return jnp.einsum("bchj,bij->bchi", views, band, **exact)


def _each(values):
    """[b] -> [b, 1, 1], beside planes."""
    return values[:, None, None]


def _clip(x):
    return jnp.clip(x, 0, 1)
