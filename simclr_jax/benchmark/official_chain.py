"""The views of google-research/simclr as its host makes them, without blur, for `benchmark input`."""

from collections.abc import Iterator

import numpy as np


def batches(records: np.ndarray, *, image_size: int, strength: float, batch_size: int) -> Iterator[dict]:
    """Yields batches of view pairs of JPEG files, float32 [b, s, s, 6], without end, as the official code.

    See `tf2/data.py` and `tf2/data_util.py` there. For each view the whole image becomes floats; a bicubic
    crop, a flip and the colour ops in random order, with clipping after each, follow. Branches that are
    always taken and checks of the box are kept, since they cost the official code 4 %.
    """
    from simclr_jax.data import CORES, tf

    def colour(image, op):
        contrast, hue = 0.8 * strength, 0.2 * strength
        image = tf.cond(
            op < 2,
            lambda: tf.cond(
                op < 1,
                lambda: image * tf.random.uniform([], tf.maximum(1.0 - contrast, 0), 1 + contrast),
                lambda: tf.image.random_contrast(image, 1 - contrast, 1 + contrast),
            ),
            lambda: tf.cond(
                op < 3,
                lambda: tf.image.random_saturation(image, 1 - contrast, 1 + contrast),
                lambda: tf.image.random_hue(image, hue),
            ),
        )
        return tf.clip_by_value(image, 0.0, 1.0)

    def jitter(image):
        order = tf.random.shuffle(tf.range(4))
        for place in range(4):
            image = colour(image, order[place])
        return image

    def sometimes(function, probability, image):
        return tf.cond(tf.random.uniform([]) < probability, lambda: function(image), lambda: image)

    def crop(image):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=100,
        )
        (top, left, _), (height, width, _) = tf.unstack(begin), tf.unstack(size)
        image = tf.image.crop_to_bounding_box(image, top, left, height, width)
        return tf.image.resize(image, [image_size, image_size], "bicubic")

    def distort(image):
        image = sometimes(jitter, 0.8, image)
        return sometimes(lambda image: tf.tile(tf.image.rgb_to_grayscale(image), [1, 1, 3]), 0.2, image)

    def view(pixels):
        image = tf.image.convert_image_dtype(pixels, tf.float32)
        image = tf.image.random_flip_left_right(sometimes(crop, 1.0, image))
        image = sometimes(distort, 1.0, image)
        return tf.clip_by_value(tf.reshape(image, [image_size, image_size, 3]), 0.0, 1.0)

    def views(record):
        pixels = tf.io.decode_jpeg(record, 3)
        return tf.concat([view(pixels), view(pixels)], -1)

    options = tf.data.Options()
    options.threading.private_threadpool_size = CORES
    options.threading.max_intra_op_parallelism = 1
    examples = tf.data.Dataset.from_tensor_slices(records).repeat().map(views, tf.data.AUTOTUNE)
    return examples.batch(batch_size).prefetch(2).with_options(options).as_numpy_iterator()
