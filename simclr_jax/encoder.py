"""A trained network as a function of images: `simclr_jax.load(RUN)(images)`."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from simclr_jax import pretrained
from simclr_jax.images import as_sequence, to_array
from simclr_jax.models import describe
from simclr_jax.process import UserError, errors, escape, files, machine


@errors.naming_python_keys()
def load(path, use_average: bool = False) -> "Encoder":
    """See `simclr_jax.load`."""
    path = os.path.expanduser(path)
    with errors.outside_errors_as_run_errors():
        files.check_reachable(path)
        machine.note_unused_accelerator()
        return Encoder(path, *pretrained.load_model(path, use_average=use_average))


class Encoder:
    """A trained network, applied in eval mode on one device.

    `images` of its methods is uint8 or float [n, h, w, c], floats in [0, 1], c the network's channels, for 3
    also 1, which is grey; after training on more than 8 bits, also whole numbers as in those files; or a
    sequence of images of any sizes: such arrays, tensors of PyTorch, paths of files or images of Pillow, see
    `images.to_array`. An image of the training size goes in as it is; others go through the evaluation view,
    see `augment.eval_view`, which needs TensorFlow.

    Attributes:
      config: config of the run, a ConfigDict; an official checkpoint has some of its keys.
      model: the Flax module.
      variables: {'params', 'batch_stats'}.
      class_names: in the order of `predict`'s columns; empty where unknown.
    """

    def __init__(self, path, model, variables: dict, meta: dict):
        self.config = ConfigDict(meta["config"])
        self._meta = meta
        self.model = model
        self.variables = jax.device_put(variables)
        self.class_names = tuple(meta.get("class_names", ()))
        self._path, self._size = path, self.config.image_size
        self._proportion, self._dtype = meta.get("proportion"), meta.get("dtype", "uint8")
        self._apply = jax.jit(model.apply)

    def __repr__(self) -> str:
        classes = self.model.supervised_head.features if self.model.supervised_head else 0
        return (
            f"<Encoder of {self._path}: {describe(self.config.model)}, images of {self._size} pixels, "
            f"{f'{classes} classes' if classes else 'no classifier'}>"
        )

    def __reduce__(self):  # Compiled functions cannot be pickled.
        return _unpickle, (self._path, jax.device_get(self.variables), self._meta)

    def __call__(self, images, batch_size: int = 256) -> np.ndarray:
        """Returns the encoder's features, float32 [n, d].

        Raises:
          UserError: the images have another shape, dtype or range.
        """
        return self._outputs(images, "features", batch_size)

    def projection(self, images, batch_size: int = 256) -> np.ndarray:
        """Returns the output of the whole projection head, float32 [n, projection_dim].

        Raises:
          UserError: the images have another shape, dtype or range; the checkpoint has no projection head.
        """
        if not self.model.projection_head.projects:
            raise UserError(f"{escape(self._path)} has no projection head: give a pretraining run")
        return self._outputs(images, "projection", batch_size)

    def predict(self, images, batch_size: int = 256) -> np.ndarray:
        """Returns probabilities of the classes, float32 [n, classes], calibrated as in the task predict.

        Raises:
          UserError: the images have another shape, dtype or range; no classifier was trained.
        """
        if self.model.supervised_head is None:
            raise UserError(
                f"{escape(self._path)} has no classifier: give a linear_eval, finetune, transfer or distill "
                "run"
            )
        return np.asarray(pretrained.probabilities(self._meta, self._outputs(images, "logits", batch_size)))

    def _outputs(self, images, name, batch_size):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: expected at least 1, as in batch_size=256")
        images = as_sequence(images)
        # Powers of two, of which few are compiled.
        rows = max(1, min(batch_size, 1 << (len(images) - 1).bit_length()))
        outputs = []
        for start in range(0, max(1, len(images)), rows):
            batch = self._views(images[start : start + rows], start)
            padding = [(0, rows - len(batch))] + [(0, 0)] * 3
            with errors.outside_errors_as_run_errors():
                output = self._apply(self.variables, np.pad(batch, padding))[name]
                outputs.append(np.asarray(output[: len(batch)], np.float32))
        return np.concatenate(outputs)

    def _views(self, images: Sequence[np.ndarray], start: int) -> np.ndarray:
        """The images as inputs of the network, uint8 or float32 [n, size, size, c]."""
        dataset = self.config.get("dataset", {})
        options = {
            "value_range": self._meta.get("value_range"),
            "max_pixels": dataset.get("max_pixels", None),
            "channels": self.model.channels,
            "dtype": self._dtype,
        }
        checked = [to_array(image, f"images[{start + row}]", **options) for row, image in enumerate(images)]
        if not checked:
            return np.zeros((0, self._size, self._size, self.model.channels), np.uint8)
        if any(image.shape[:2] != (self._size, self._size) for image in checked):
            dtype = "uint8" if self._dtype == "uint8" else "float32"
            checked = _resize(checked, self._size, self._proportion, dtype)
        if len({image.dtype for image in checked}) > 1:
            checked = [image / np.float32(255) if image.dtype == np.uint8 else image for image in checked]
        return np.stack(checked)


def _resize(images, size, proportion, dtype) -> list[np.ndarray]:
    """Makes the evaluation views of images; an image of that size stays as it is."""
    try:
        from simclr_jax.data import eager_execution, pipeline
    except ImportError:
        sizes = sorted({image.shape[:2] for image in images} - {(size, size)})
        raise UserError(
            f"an image of {sizes[0][0]} x {sizes[0][1]} pixels has to be scaled to {size} x {size}, which "
            "needs TensorFlow: pip install tensorflow, or give images of that size"
        ) from None
    with eager_execution():
        return [
            image if image.shape[:2] == (size, size) else pipeline.eval_view(image, size, proportion, dtype)
            for image in images
        ]


def _unpickle(path, variables, meta) -> Encoder:
    return Encoder(path, pretrained.model_of(meta), variables, meta)
