"""SimCLR v1 and v2 in JAX and Flax, from one laptop to a TPU pod.

    config = simclr_jax.get_config("digits", {"num_epochs": 10.0})
    summary = simclr_jax.run(config, "runs/digits")
    features = simclr_jax.load("runs/digits")(images)

Importing this brings neither jax nor TensorFlow; calling it does.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simclr_jax.process.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from simclr_jax.encoder import Encoder

__all__ = ["UserError", "get_config", "load", "run"]


def get_config(name: str | os.PathLike, overrides: dict[str, Any] | None = None) -> "ConfigDict":
    """The config of one of the shipped datasets and a task, as `--config=configs/NAME.py:TASK` has it.

    Args:
      name: 'digits', 'folder', 'imagenet', ..., which pretrains, or 'digits:linear_eval' and the like; a path
        such as 'own.py:knn' is a file of your own.
      overrides: values of keys by their dotted names, as {'optimizer.learning_rate': 0.1}.

    Returns:
      An ml_collections.ConfigDict. It is locked: keys can be set, and unknown ones are an AttributeError.

    Raises:
      UserError: there is no such config, key or value.
    """
    from simclr_jax import api

    return api.get_config(name, overrides or {})


def run(
    config: "ConfigDict",
    workdir: str | os.PathLike,
    on_report: Callable[[int, dict[str, float]], Any] | None = None,
    *,
    train: Any = None,
    held_out: Any = None,
    view: Callable[..., Any] | None = None,
) -> dict[str, Any] | None:
    """Runs any task, or goes on with it where an earlier call or command was stopped.

    Ctrl-C, or the stop button of a notebook, loses nothing: the run saves, and the same call goes on.

    Args:
      config: from `get_config`.
      workdir: local or gs:// folder that keeps everything of this run.
      on_report: called as `on_report(step, metrics)` with {name: float}, after every `log_every_steps` steps;
        pretraining also reports step 0, whose `loss` is NaN.
      train: instead of the config's dataset, images uint8 [n, h, w, c], c 3 or 1, or (images, labels) with
        int labels [n], -1 where there is none.
      held_out: likewise, with labels, to judge features on.
      view: makes the views of pretraining in the place of `config.augment`: (image uint8 [h, w, 3], seed
        int32 [2]) -> [image_size, image_size, 3], uint8 or float32 in [0, 1], in TensorFlow, by stateless
        operations. The summary names it, and a run goes on with the same one only.

    Returns:
      The summary, as in WORKDIR/summary.json; None of a run that was stopped.

    Raises:
      UserError: something is wrong with config, data or workdir, in one line.
    """
    from simclr_jax import api

    return api.run(config, workdir, on_report, train, held_out, view)


def load(path: str | os.PathLike, *, use_average: bool = False) -> "Encoder":
    """The network of a run or checkpoint, ours or google-research/simclr's, as a function of images.

    Args:
      path: whatever `config.pretrained` takes: a workdir, WORKDIR/checkpoints/STEP, an official checkpoint,
        or a .safetensors or .pth file of a ResNet under torchvision's names.
      use_average: take the moving average of the weights that pretraining with a memory keeps, and some
        official checkpoints hold.

    Returns:
      A `simclr_jax.encoder.Encoder`: `encoder(images)` are the features.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    from simclr_jax import encoder

    return encoder.load(path, use_average)
