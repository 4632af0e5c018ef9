"""Data augmentation of SimCLR (arXiv 2002.05709, appendix A) as pure functions for `tf.data`.

Images are [h, w, c], float32 in [0, 1] or uint8; results are float32. Where c is not 3 there is no colour:
brightness and contrast change each channel by itself, hue and saturation nothing, and no view becomes grey. A
seed is an int32 [2] and decides
every random draw: the same seed gives the same pixels in any process and at any parallelism. Derive it from
(experiment seed, epoch, example index).

Views are made as in the official code: crop and bicubic resize, flip, colour jitter, grayscale, Gaussian
blur; `views/recipe.py` has the numbers. One thing differs: the official code draws one blur sigma for a
batch, the paper and this file draw one for every image. A crop is cut out of the uint8 image, before it
becomes float. All that follows the resize runs as one XLA program of fixed shape, on planes [3, h, w], since
XLA vectorises planes and does not vectorise channels-last images.
"""

import functools

import numpy as np
import tensorflow as tf

from simclr_jax.views.recipe import DEFAULT, DRAWS, LUMA, OPERATIONS, ORDERS, Recipe, blur_radius

_EVAL_PROPORTION = 0.875  # share of the image's side, as in the official code: 256 -> 224
_CACHED_PIXELS = 900 * 900  # pixels of a crop up to which its floats stay in the cache and resize faster
_BLOCK = 32  # rows or columns that are blurred at a time


def two_views(
    image: tf.Tensor, seed: tf.Tensor, size: int, recipe: Recipe = DEFAULT, **options
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a positive pair: two independent views of `simclr_view`, which takes the same arguments."""
    return tuple(simclr_view(image, part, size, recipe, **options) for part in _split(seed))


def simclr_view(
    image: tf.Tensor,
    seed: tf.Tensor,
    size: int,
    recipe: Recipe = DEFAULT,
    *,
    dtype: str = "float32",
    **settings,
) -> tf.Tensor:
    """Returns one random view for pretraining (appendix A).

    Args:
      image: [h, w, c], float32 in [0, 1] or uint8 (faster).
      seed: int32 [2].
      size: side of the view in pixels.
      recipe: how the view is made.
      dtype: 'float32', or 'uint8' for the nearest levels, which are cheapest to round to here.
      settings: fields of the recipe that replace its own, as in `color_jitter_strength=0.5, blur=False`.

    Returns:
      [size, size, c], float32 in [0, 1] or uint8.
    """
    recipe = recipe._replace(**settings)
    _check_strength(recipe.color_jitter_strength)
    crop, draws = _crop_and_draws(image, seed, size, recipe)
    return _distort(crop, _scale_to_unit(image), draws, recipe, dtype)


def two_crops(
    image: tf.Tensor, seed: tf.Tensor, size: int, recipe: Recipe = DEFAULT, *, dtype: str = "float32"
) -> tuple[tuple[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Returns two (crop, draws), from which `distort.distort` makes on the devices what `two_views` returns.

    Each crop is [size, size, c] of `dtype`, float16 or float32, in levels from 0 to 255 with bicubic's
    overshoot; its draws are float32 [Recipe.num_draws(c)].
    """
    pairs = [_crop_and_draws(image, part, size, recipe) for part in _split(seed)]
    levels = [crop if image.dtype == tf.uint8 else 255 * crop for crop, _ in pairs]
    return tuple((tf.cast(crop, dtype), draws) for crop, (_, draws) in zip(levels, pairs))


def crop_and_flip(image: tf.Tensor, seed: tf.Tensor, size: int, recipe: Recipe = DEFAULT) -> tf.Tensor:
    """Returns the training view of fine-tuning, linear evaluation and distillation.

    It is [size, size, c], float32 in [0, 1].
    """
    crop_seed, flip_seed = _split(seed)
    crop = random_resized_crop(image, crop_seed, size, min_area=recipe.min_area)
    if recipe.flip:
        crop = tf.image.stateless_random_flip_left_right(crop, flip_seed)
    vertical_seed, turn_seed = _split(flip_seed)
    if recipe.vertical_flip:
        crop = tf.image.stateless_random_flip_up_down(crop, vertical_seed)
    if recipe.rotate:
        crop = tf.image.rot90(crop, tf.random.stateless_uniform([], turn_seed, 0, 4, tf.int32))
    return _clip(crop)


def eval_view(image: tf.Tensor, size: int, *, proportion: float | None = None) -> tf.Tensor:
    """Returns the deterministic view for evaluation, [size, size, c], float32 in [0, 1].

    It shows the centre square, `proportion` of the shorter side: by default 0.875 above 32 pixels, as in the
    official code, and all of smaller images. A square image that already has the size comes back as it is.
    """
    proportion = proportion or (_EVAL_PROPORTION if size > 32 else 1.0)
    return _clip(center_crop(image, size, proportion))


def random_resized_crop(
    image: tf.Tensor, seed: tf.Tensor, size: int | tuple[int, int], *, min_area: float = 0.08
) -> tf.Tensor:
    """Cuts out a random box of aspect ratio 3/4 to 4/3 and resizes it (bicubic).

    `size` is a side or (height, width), `min_area` the box's smallest share of the image. The official code
    asks for 0.08, but its `min_object_covered` of 0.1, kept here, wins: smaller values change nothing.
    Bicubic overshoots: the result is not clipped to [0, 1], since the official code feeds the overshoot to
    the colour operations.
    """
    return _random_crop(image, seed, size, min_area) * _scale_to_unit(image)


def _random_crop(image, seed, size, min_area):
    """Returns a random crop, resized, in the image's own range."""
    height, width = _pair(size)
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        bounding_boxes=[[[0.0, 0.0, 1.0, 1.0]]],
        seed=seed,
        min_object_covered=0.1,
        aspect_ratio_range=(3 / 4 * width / height, 4 / 3 * width / height),
        area_range=(min_area, 1.0),
        max_attempts=100,
    )
    return _resize(_cut(image, begin, extent), (height, width))


def center_crop(
    image: tf.Tensor, size: int | tuple[int, int], proportion: float = _EVAL_PROPORTION
) -> tf.Tensor:
    """Cuts out the centre box of `size`'s aspect ratio and resizes it (bicubic).

    `size` is a side or (height, width), `proportion` the box's share of the largest such box's sides. The
    result is not clipped to [0, 1]; see `random_resized_crop`.
    """
    height, width = _pair(size)
    image_size = tf.shape(image)[:2]
    h, w = tf.unstack(tf.cast(image_size, tf.float32))
    largest = tf.stack([tf.minimum(h, w * height / width), tf.minimum(w, h * width / height)])
    extent = tf.cast(tf.math.rint(proportion * largest), tf.int32)
    begin = (image_size - extent + 1) // 2
    crop = _cut(image, tf.concat([begin, [0]], 0), tf.concat([extent, [-1]], 0))
    return _resize(crop, (height, width)) * _scale_to_unit(image)


def color_jitter(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue in random order, clipping to [0, 1] after each.

    The first three factors are uniform in 1 +- 0.8 strength, hue's turn in +- 0.2 strength (appendix A).
    The strength is at most 1.25, where factors reach 0. Every image is jittered; `simclr_view` jitters with
    a probability of 0.8.
    """
    _check_strength(strength)
    draws = tf.random.stateless_uniform([5], seed, alg="philox")
    draw = dict(zip(("order", *OPERATIONS), tf.unstack(draws)))
    return _to_image(_jitter(_to_planes(image), draw, Recipe(color_jitter_strength=strength)))


def adjust_brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Multiplies by `factor`, as SimCLR v2 does; v1 added it. No `adjust_` function clips its result."""
    return _to_image(_brightness(_to_planes(image), factor))


def adjust_contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Scales the distance to each channel's mean by `factor`."""
    return _to_image(_contrast(_to_planes(image), factor))


def adjust_saturation(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Multiplies the saturation of HSV by `factor` and clips it to [0, 1]; keeps hue and value."""
    return _to_image(_saturation(_to_planes(image), factor))


def adjust_hue(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Rotates the hue by `factor` full turns, in [-1, 1]; keeps value and chroma."""
    return _to_image(_hue(_to_planes(image), factor))


def to_grayscale(image: tf.Tensor) -> tf.Tensor:
    """Returns the luma (ITU-R BT.601) of an image in three equal channels, [h, w, 3]."""
    return _to_image(_grayscale(_to_planes(image)))


def gaussian_blur(image: tf.Tensor, kernel_size: int, sigma: tf.Tensor) -> tf.Tensor:
    """Blurs with a Gaussian of `sigma` pixels, truncated to `kernel_size` (odd), whose weights sum to 1.

    Outside the image is black, as in the official code: borders darken.
    """
    return _to_image(_blur(_to_planes(image), kernel_size, sigma))


@tf.function(jit_compile=True, autograph=False)
def _distort(crop, unit, draws, recipe, dtype):
    """Mirrors, colours and blurs a crop [h, w, c] times `unit`; compiled once for each shape and recipe."""
    draw = dict(zip(DRAWS, tf.unstack(draws)))
    channels = crop.shape[-1]
    if channels != 3:
        own = draws[len(DRAWS) :, None, None]
        draw |= {"brightness": own[:channels], "contrast": own[channels:]}
    x = _to_planes(crop)
    x = tf.cond(draw["flip"] < recipe.flip_probability, lambda: x[..., ::-1] * unit, lambda: x * unit)
    if recipe.vertical_flip:
        x = tf.cond(draw["vertical_flip"] < recipe.flip_probability, lambda: x[:, ::-1], lambda: x)
    if recipe.rotate:
        x = _rotate(x, draw["rotate"])
    x = tf.cond(draw["jitter"] < recipe.jitter_probability, lambda: _jitter(x, draw, recipe), lambda: x)
    if channels == 3:
        x = tf.cond(draw["grayscale"] < recipe.grayscale, lambda: _grayscale(x), lambda: x)
    x = _clip(x)
    if recipe.drop_channel:
        dropped = tf.cast(draw["drop"] / recipe.drop_channel * channels, tf.int32)
        x = tf.where(tf.range(channels)[:, None, None] == dropped, 0.0, x)
    if recipe.blur:
        low, high = recipe.blur_sigma
        sigma, kernel_size = low + (high - low) * draw["sigma"], 2 * blur_radius(crop.shape[0]) + 1
        x = tf.cond(draw["blur"] < recipe.blur_probability, lambda: _blur(x, kernel_size, sigma), lambda: x)
        x = _clip(x)
    if recipe.solarize:  # It inverts the values from 0.5 on (arXiv 2006.07733, appendix B).
        x = tf.cond(draw["solarize"] < recipe.solarize, lambda: tf.where(x < 0.5, x, 1 - x), lambda: x)
    if recipe.noise:
        x = _noise(x, draw["noise"], recipe)
    x = _to_image(x)
    return tf.cast(tf.round(x * 255), tf.uint8) if dtype == "uint8" else x


def _jitter(planes, draw, recipe):
    # XLA would take an index in brackets for a constant and compile anew for every image: hence `gather`.
    # A loop makes a smaller program than four switches in a row.
    order = tf.gather(ORDERS, tf.cast(draw["order"] * len(ORDERS), tf.int32))
    # Inside the loop they would be computed four times.
    changes = {name: recipe.ranges[name] * (2 * draw[name] - 1) for name in OPERATIONS}
    factors = {name: 1 + changes[name] for name in OPERATIONS[:3]}
    is_colour = planes.shape[0] == 3

    def adjust(i, x):
        branches = {
            "brightness": lambda: _brightness(x, factors["brightness"]),
            "contrast": lambda: _contrast(x, factors["contrast"]),
            "saturation": lambda: _saturation(x, factors["saturation"]) if is_colour else x,
            "hue": lambda: _hue(x, changes["hue"]) if is_colour else x,
        }
        operation = tf.gather(order, i)
        return i + 1, _clip(tf.switch_case(operation, [branches[name] for name in OPERATIONS]))

    return tf.while_loop(lambda i, x: i < 4, adjust, (0, planes), maximum_iterations=4)[1]


def _rotate(planes, draw):
    """Turns square planes by quarters of the circle."""
    turned = tf.transpose(planes, [0, 2, 1])
    branches = [
        lambda: planes,
        lambda: turned[:, ::-1],
        lambda: planes[:, ::-1, ::-1],
        lambda: turned[..., ::-1],
    ]
    return tf.switch_case(tf.cast(4 * draw, tf.int32), branches)


def _noise(planes, draw, recipe):
    normal = tf.random.stateless_normal(planes.shape, tf.stack([tf.bitcast(draw, tf.int32), 0]), alg="philox")
    variance = planes * (1 - recipe.read_noise) + recipe.read_noise
    return _clip(planes + recipe.noise * draw * tf.sqrt(variance) * normal)


def _brightness(planes, factor):
    return planes * factor


def _contrast(planes, factor):
    mean = tf.reduce_mean(planes, axis=(1, 2), keepdims=True)
    return mean + factor * (planes - mean)


def _saturation(planes, factor):
    # In HSV, saturation is chroma / value and at most 1, and value - x of every channel x scales with chroma.
    value, chroma = _value_and_chroma(planes)
    new_chroma = tf.minimum(factor * chroma, tf.maximum(value, 0))
    return value - new_chroma * ((value - planes) / tf.maximum(chroma, 1e-12))


def _hue(planes, factor):
    # Each channel is a trapezoid of the hue; here in sixths of the circle.
    value, chroma = _value_and_chroma(planes)
    red, green, blue = tf.unstack(planes)
    scale = 1 / tf.maximum(chroma, 1e-12)
    hue = tf.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = tf.where(value == red, (green - blue) * scale, hue)
    turn = hue + 6 * factor + tf.constant([5.0, 3.0, 1.0])[:, None, None]
    turn -= 6 * tf.floor(turn * (1 / 6))  # `floormod` is ten times slower here.
    return value - chroma * _clip(tf.minimum(turn, 4 - turn))


def _value_and_chroma(planes):
    value = tf.reduce_max(planes, axis=0)
    return value, value - tf.reduce_min(planes, axis=0)


def _grayscale(planes):
    luma = tf.tensordot(tf.constant(LUMA), planes, 1)
    return tf.broadcast_to(luma, planes.shape)


def _blur(planes, kernel_size, sigma):
    # These are products with a band matrix, a block of rows or columns and its neighbours at a time: XLA has
    # no fast convolution of one channel on CPUs (at 224 pixels: 0.4 ms; shifted sums 1.1, depthwise 0.9).
    radius = kernel_size // 2
    offset = (np.arange(-radius, _BLOCK + radius) - np.arange(_BLOCK)[:, None]).astype(np.float32)
    taps = tf.exp(-(tf.range(-radius, radius + 1, dtype=tf.float32) ** 2) / (2 * sigma**2))
    weights = tf.exp(-(offset**2) / (2 * sigma**2)) / tf.reduce_sum(taps) * (np.abs(offset) <= radius)

    def blocks(side):
        """Returns, for each block of rows or columns, which ones it is made of, and with which weights."""
        pairs = []
        for i in range(0, side, _BLOCK):
            first, last = max(i - radius, 0), min(i + _BLOCK + radius, side)
            pairs.append((slice(first, last), weights[: side - i, first - i + radius : last - i + radius]))
        return pairs

    height, width = planes.shape[1:]
    planes = tf.concat([band @ planes[:, near] for near, band in blocks(height)], axis=1)
    return tf.concat([planes[..., near] @ tf.transpose(band) for near, band in blocks(width)], axis=2)


def _crop_and_draws(image, seed, size, recipe):
    """Returns a view's crop, in the image's own range, and its draws, [Recipe.num_draws(c)].

    The draws are made outside of the compiled program, since XLA uses another generator. To name TensorFlow's
    generator by `alg` would add 45 operations to the graph.
    """
    crop_seed, color_seed = _split(seed)
    crop_seed, flip_seed = _split(crop_seed)
    flip = tf.random.stateless_uniform([1], flip_seed) if recipe.flip else tf.ones([1])
    draws = tf.concat(
        [flip, tf.random.stateless_uniform([recipe.num_draws(image.shape[-1]) - 1], color_seed)], 0
    )
    return _random_crop(image, crop_seed, size, recipe.min_area), draws


def _cut(image, begin, extent):
    return tf.ensure_shape(tf.slice(image, begin, extent), [None, None, image.shape[-1]])


def _resize(crop, size):
    """Resizes a crop (bicubic) to float32, in the crop's own range."""
    resize = functools.partial(tf.image.resize, size=size, method="bicubic")
    if crop.dtype == tf.uint8:
        # Floats resize a tenth faster than bytes while they stay in the cache.
        small = tf.size(crop) <= 3 * _CACHED_PIXELS
        resized = tf.cond(small, lambda: resize(tf.cast(crop, tf.float32)), lambda: resize(crop))
    else:
        resized = resize(crop)
    return tf.ensure_shape(resized, [*size, crop.shape[-1]])


def _scale_to_unit(image):
    """Returns the factor that scales an image's range to [0, 1]."""
    return 1 / 255 if image.dtype == tf.uint8 else 1.0


def _to_planes(image):
    return tf.transpose(tf.image.convert_image_dtype(image, tf.float32), [2, 0, 1])


def _to_image(planes):
    return tf.transpose(planes, [1, 2, 0])


def _clip(x):
    return tf.clip_by_value(x, 0.0, 1.0)


def _split(seed):
    return tf.unstack(tf.random.experimental.stateless_split(seed, 2))


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def _check_strength(strength):
    if not 0 <= strength <= 1.25:
        raise ValueError(f"color jitter strength is {strength}, must be in [0, 1.25]; 1 for ImageNet")
