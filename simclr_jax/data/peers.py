"""Other programs' two views of an image, for `benchmark input`: on the same files, cores and sizes.

official         what google-research/simclr does on the host, in TensorFlow: all but its blur
albumentations   with OpenCV and with blur, a process a core, as PyTorch's users have it
lightly          lightly's SimCLRTransform, with blur: torchvision on Pillow's images, a process a core
"""

import functools
import importlib.util
import io
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import tensorflow as tf

from simclr_jax.data import CORES

WITH_PROCESSES = {"albumentations": ("albumentations", "cv2"), "lightly": ("lightly", "torchvision")}


def installed() -> list[str]:
    """Those of albumentations and lightly that are here."""
    return [name for name, needs in WITH_PROCESSES.items() if all(map(importlib.util.find_spec, needs))]


def official(records: np.ndarray, *, image_size: int, strength: float, batch_size: int) -> Iterator[dict]:
    """Batches of view pairs of JPEG files, float32 [b, s, s, 6], without end, as official code makes them.

    See `tf2/data.py` and `tf2/data_util.py` there: the whole image to floats for each view, a crop, bicubic,
    a flip, the colour ops in an order of each view, clipped after each.
    """

    def colour(image, op):
        contrast, hue = 0.8 * strength, 0.2 * strength
        ops = [
            lambda: image * tf.random.uniform([], max(1 - contrast, 0), 1 + contrast),
            lambda: tf.image.random_contrast(image, 1 - contrast, 1 + contrast),
            lambda: tf.image.random_saturation(image, 1 - contrast, 1 + contrast),
            lambda: tf.image.random_hue(image, hue),
        ]
        return tf.clip_by_value(tf.switch_case(op, ops), 0.0, 1.0)

    def jitter(image):
        order = tf.random.shuffle(tf.range(4))
        for place in range(4):
            image = colour(image, order[place])
        return image

    def sometimes(function, probability, image):
        return tf.cond(tf.random.uniform([]) < probability, lambda: function(image), lambda: image)

    def view(pixels):
        image = tf.image.convert_image_dtype(pixels, tf.float32)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=100,
        )
        image = tf.image.resize(tf.slice(image, begin, size), [image_size, image_size], "bicubic")
        image = tf.image.random_flip_left_right(image)
        image = sometimes(jitter, 0.8, image)
        image = sometimes(lambda image: tf.tile(tf.image.rgb_to_grayscale(image), [1, 1, 3]), 0.2, image)
        return tf.clip_by_value(tf.reshape(image, [image_size, image_size, 3]), 0.0, 1.0)

    def views(record):
        pixels = tf.io.decode_jpeg(record, 3)
        return tf.concat([view(pixels), view(pixels)], -1)

    options = tf.data.Options()
    options.threading.private_threadpool_size = CORES
    options.threading.max_intra_op_parallelism = 1
    examples = tf.data.Dataset.from_tensor_slices(records).repeat().map(views, tf.data.AUTOTUNE)
    return examples.batch(batch_size).prefetch(2).with_options(options).as_numpy_iterator()


def albumentations(image_size: int, strength: float) -> Callable[[bytes], list[np.ndarray]]:
    """JPEG file -> two views, uint8 [s, s, 3]."""
    import albumentations as library
    import cv2

    cv2.setNumThreads(1)
    kernel = max(3, image_size // 10 // 2 * 2 + 1)
    transform = library.Compose(
        [
            library.RandomResizedCrop(
                size=(image_size, image_size), scale=(0.08, 1.0), interpolation=cv2.INTER_CUBIC
            ),
            library.HorizontalFlip(p=0.5),
            library.ColorJitter(
                brightness=0.8 * strength,
                contrast=0.8 * strength,
                saturation=0.8 * strength,
                hue=0.2 * strength,
                p=0.8,
            ),
            library.ToGray(p=0.2),
            library.GaussianBlur(blur_limit=(kernel, kernel), sigma_limit=(0.1, 2.0), p=0.5),
        ]
    )

    def views(record):
        image = cv2.cvtColor(
            cv2.imdecode(np.frombuffer(record, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )
        return [transform(image=image)["image"] for _ in range(2)]

    return views


def lightly(image_size: int, strength: float) -> Callable[[bytes], list]:
    """JPEG file -> two views, float32 [3, s, s], normalised."""
    import torch
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    torch.set_num_threads(1)
    transform = SimCLRTransform(input_size=image_size, cj_strength=strength)
    return lambda record: transform(Image.open(io.BytesIO(record)).convert("RGB"))


def rate_of_batches(batches: Iterator, rows: int, seconds: float) -> float:
    """Images/s a core that an open pipeline gives, whose first batch, made before, does not count."""
    next(batches)
    begun, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        next(batches)
        steps += 1
    return steps * rows / passed / CORES


class Workers:
    """A process a core that makes views with `albumentations` or `lightly`."""

    def __init__(self, name: str, records: np.ndarray, *, image_size: int, strength: float):
        self._pool = ProcessPoolExecutor(CORES, mp_context=get_context("spawn"))
        self._arguments = (name, records.tolist(), image_size, strength)

    def rate(self, seconds: float) -> float:
        """Images/s a core, all at work."""
        return float(np.mean([done.result() for done in self._submit(seconds)]))

    def _submit(self, seconds):
        return [self._pool.submit(_work, *self._arguments, seconds) for _ in range(CORES)]

    def close(self):
        self._pool.shutdown()


@functools.cache
def _make(name, image_size, strength):
    return {"albumentations": albumentations, "lightly": lightly}[name](image_size, strength)


def _work(name, records, image_size, strength, seconds):
    views = _make(name, image_size, strength)
    views(records[0])
    begun = time.perf_counter()
    for count, record in enumerate(itertools.cycle(records), start=1):
        views(record)
        if (passed := time.perf_counter() - begun) >= seconds:
            return count / passed
