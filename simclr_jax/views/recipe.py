"""The recipe of SimCLR's views: every number that decides how they look (arXiv 2002.05709, appendix A).

`data/augment.py` follows it on the host and `views/distort.py` on the devices. The same draws give the same
pixels on both, within float rounding.
"""

import itertools
from typing import NamedTuple

import numpy as np

# Names of a view's random numbers besides those of its crop, each from U(0, 1), in the order of the array.
DRAWS = (
    "flip",
    "jitter",
    "grayscale",
    "blur",
    "sigma",
    "order",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "solarize",
)
# The operations of the colour jitter, and all 24 orders of them.
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
ORDERS = np.array(list(itertools.permutations(range(len(OPERATIONS)))), np.int32)
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)


class Recipe(NamedTuple):
    """How a view is made of an image, with the paper's numbers for ImageNet as defaults.

    Attributes:
      min_area: smallest share of the image that a crop covers.
      flip: whether views are mirrored; False where mirroring changes the class, as for digits.
      color_jitter_strength: scales the colour jitter, from 0 to 1.25; 0.5 for CIFAR-10. It does not scale
        grayscale.
      blur: whether views are blurred; False in the paper's CIFAR-10 runs.
      solarize: probability of each view to be solarised (BYOL, arXiv 2006.07733, appendix B).
      flip_probability, jitter_probability, grayscale_probability, blur_probability: for each view.
      factor_range: at strength 1, the factors of brightness, contrast and saturation lie within 1 +- this.
      hue_range: at strength 1, the hue turns by at most this share of the circle, in either direction.
      blur_sigma: smallest and largest standard deviation of the Gaussian, in pixels.
    """

    min_area: float = 0.08
    flip: bool = True
    color_jitter_strength: float = 1.0
    blur: bool = True
    solarize: float = 0.0
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    factor_range: float = 0.8
    hue_range: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)


DEFAULT = Recipe()


def make_recipe(augment) -> Recipe:
    """Returns the recipe of `config.augment`; fields that are no keys of it have their defaults."""
    return Recipe(**{name: augment[name] for name in Recipe._fields if name in augment})


def blur_radius(size: int) -> int:
    """Returns the radius, in pixels, of the blur kernel, which is a tenth of the view wide."""
    return size // 10 // 2
