"""Two views of an image by albumentations and by lightly, for `benchmark input`, with a process per core.

albumentations   with OpenCV, and with blur
lightly          its SimCLRTransform, with blur: torchvision on Pillow's images
"""

import functools
import importlib.util
import io
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

_NEEDS = {"albumentations": ("albumentations", "cv2"), "lightly": ("lightly", "torchvision")}


def installed() -> list[str]:
    """Returns which of albumentations and lightly are installed."""
    return [name for name, needs in _NEEDS.items() if all(map(importlib.util.find_spec, needs))]


def albumentations(image_size: int, strength: float) -> Callable[[bytes], list[np.ndarray]]:
    """Builds a function of a JPEG file that returns two views, uint8 [s, s, 3]."""
    import albumentations as library
    import cv2

    cv2.setNumThreads(1)
    strengths = dict.fromkeys(("brightness", "contrast", "saturation"), 0.8 * strength)
    kernel = max(3, image_size // 10 // 2 * 2 + 1)
    transform = library.Compose(
        [
            library.RandomResizedCrop(
                size=(image_size, image_size), scale=(0.08, 1.0), interpolation=cv2.INTER_CUBIC
            ),
            library.HorizontalFlip(p=0.5),
            library.ColorJitter(**strengths, hue=0.2 * strength, p=0.8),
            library.ToGray(p=0.2),
            library.GaussianBlur(blur_limit=(kernel, kernel), sigma_limit=(0.1, 2.0), p=0.5),
        ]
    )

    def views(record):
        image = cv2.imdecode(np.frombuffer(record, np.uint8), cv2.IMREAD_COLOR)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return [transform(image=image)["image"] for _ in range(2)]

    return views


def lightly(image_size: int, strength: float) -> Callable[[bytes], list]:
    """Builds a function of a JPEG file that returns two views, float32 [3, s, s], normalised."""
    import torch
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    torch.set_num_threads(1)
    transform = SimCLRTransform(input_size=image_size, cj_strength=strength)
    return lambda record: transform(Image.open(io.BytesIO(record)).convert("RGB"))


def rate(pool: Executor, cores: int, name: str, records: list[bytes], seconds: float, **options) -> float:
    """Measures the images/s per core of a library's views, with all `cores` processes of a pool busy.

    Args:
      pool, cores: processes, and their number.
      name: the library.
      records: JPEG files.
      seconds: how long to measure.
      options: `image_size` and `strength` of the views.
    """
    futures = [pool.submit(_work, name, records, seconds, **options) for _ in range(cores)]
    return float(np.mean([future.result() for future in futures]))


@functools.cache
def _make(name, **options):
    return {"albumentations": albumentations, "lightly": lightly}[name](**options)


def _work(name, records, seconds, **options):
    views = _make(name, **options)
    views(records[0])
    begun = time.perf_counter()
    for count, record in enumerate(itertools.cycle(records), start=1):
        views(record)
        if (elapsed := time.perf_counter() - begun) >= seconds:
            return count / elapsed
