"""The recipe of SimCLR's views: every number that decides how they look (arXiv 2002.05709, appendix A).

`data/augment.py` follows it on the host and `views/distort.py` on the devices. The same draws give the same
pixels on both, within float rounding.
"""

import itertools
from typing import NamedTuple

import numpy as np

# The operations of the colour jitter, and all 24 orders of them.
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
ORDERS = np.array(list(itertools.permutations(range(len(OPERATIONS)))), np.int32)
# Names of a view's random numbers besides those of its crop, each from U(0, 1), in the order of the array.
DRAWS = ("flip", "jitter", "grayscale", "blur", "sigma", "order", *OPERATIONS)
DRAWS += ("solarize", "vertical_flip", "rotate", "drop", "noise")
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)


class Recipe(NamedTuple):
    """How a view is made of an image, with the paper's numbers for ImageNet as defaults.

    Attributes:
      min_area: smallest share of the image that a crop covers.
      flip: whether views are mirrored; False where mirroring changes the class, as for digits.
      color_jitter_strength: scales the colour jitter, from 0 to 1.25; 0.5 for CIFAR-10. It does not scale
        grayscale.
      brightness, contrast, saturation: their factors lie within 1 +- this; None: 0.8 times the strength.
      hue: turns by at most this share of the circle; None: 0.2 times the strength.
      grayscale: probability of each view to become grey.
      blur: whether views are blurred; False in the paper's CIFAR-10 runs.
      solarize: probability of each view to be solarised (BYOL, arXiv 2006.07733, appendix B).
      vertical_flip: whether views are mirrored from top to bottom, too.
      rotate: whether views are turned by 0 to 3 quarters of the circle.
      drop_channel: probability of each view to lose one of its channels, which becomes black.
      noise: largest deviation of a sensor's noise, at white (Foi et al. 2008, Poisson and Gaussian); that of
        a view lies between 0 and this.
      dtype: type of the views, 'uint8', or 'float16' of images of more than 8 bits.
      flip_probability, jitter_probability, blur_probability: for each view.
      factor_range: at strength 1, the factors of brightness, contrast and saturation lie within 1 +- this.
      hue_range: at strength 1, the hue turns by at most this share of the circle, in either direction.
      blur_sigma: smallest and largest standard deviation of the Gaussian, in pixels.
      read_noise: share of the noise's variance at white that black has, too.
    """

    min_area: float = 0.08
    flip: bool = True
    color_jitter_strength: float = 1.0
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    grayscale: float = 0.2
    blur: bool = True
    solarize: float = 0.0
    vertical_flip: bool = False
    rotate: bool = False
    drop_channel: float = 0.0
    noise: float = 0.0
    dtype: str = "uint8"
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    blur_probability: float = 0.5
    factor_range: float = 0.8
    hue_range: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    read_noise: float = 0.1

    @property
    def ranges(self) -> dict[str, float]:
        """How far each of `OPERATIONS` goes: factors lie within 1 +- this, the hue's turn within +- this."""
        factor, turn = (reach * self.color_jitter_strength for reach in (self.factor_range, self.hue_range))
        own = (self.brightness, self.contrast, self.saturation, self.hue)
        defaults = zip(own, (factor, factor, factor, turn))
        return dict(zip(OPERATIONS, (default if value is None else value for value, default in defaults)))

    @staticmethod
    def num_draws(channels: int) -> int:
        """Returns the number of a view's draws: where there is no colour, channels have their own ones.

        Behind those of `DRAWS` stand each channel's brightness, then each channel's contrast.
        """
        return len(DRAWS) + (0 if channels == 3 else 2 * channels)


DEFAULT = Recipe()


def make_recipe(augment) -> Recipe:
    """Returns the recipe of `config.augment`; fields that are no keys of it have their defaults."""
    return Recipe(**{name: augment[name] for name in Recipe._fields if name in augment})


def blur_radius(size: int) -> int:
    """Returns the radius, in pixels, of the blur kernel, which is a tenth of the view wide."""
    return size // 10 // 2
