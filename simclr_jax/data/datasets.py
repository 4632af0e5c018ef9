"""Opens a split of a dataset by name; `SOURCES` has the datasets outside TensorFlow Datasets."""

from collections.abc import Callable

from simclr_jax.config import ranges
from simclr_jax.data.source import (  # noqa: F401
    Source,
    balanced,
    check_size,
    class_counts,
    few_labels,
    fingerprint,
    labelled,
    lost_rows,
    readable_groups,
    sample,
    span,
    subset,
)
from simclr_jax.data.sources import arrays, digits, folder, tfds
from simclr_jax.process import UserError

# Loaders by `config.dataset.name`: (config.dataset, split, *, seed, workdir) -> Source of all examples of the
# split. Add your own before a run names it. Other names are those of TensorFlow Datasets.
SOURCES: dict[str, Callable[..., Source]] = {
    "digits": lambda config, split, **_: digits.load(split),
    "arrays": lambda config, split, **_: arrays.load(split),
    "folder": folder.load,
}


def load(config, split: str, *, seed: int, workdir=None) -> Source:
    """Opens one split; downloads nothing.

    Args:
      config: `config.dataset`, see configs/base.py.
      split: 'train', 'eval', 'validation', 'probe' (the labelled examples to judge features on) or, of a
        folder, 'all' (the images of every split and of none).
      seed: chooses the held-out images of a folder that has none of its own, and the `config.num_examples`
        training examples (TFDS: the first ones).
      workdir: where a folder's list of good images is kept, so that indices survive a restart.

    Returns:
      A source with random access, or a stream for a TFDS dataset with `in_memory=False`; a
      stream of ArrayRecord files has random access, but does not know its labels.

    Raises:
      UserError: unknown or unprepared dataset, unknown split, empty or changed folder.
    """
    if split not in ("train", "eval", "probe", "validation") and (split, config.name) != ("all", "folder"):
        raise UserError(f"split {split!r}: expected 'train', 'eval', 'probe' or 'validation'")
    num_examples = config.num_examples if split == "train" else None
    if num_examples is not None:
        ranges.check("dataset.num_examples", num_examples)
    if split == "validation" and config.name in SOURCES:
        raise UserError(f"dataset.validation_split: {config.name} has no such split; unset it")
    source = SOURCES.get(config.name, tfds.load)(config, split, seed=seed, workdir=workdir)
    if num_examples is None:
        return source
    check_size(num_examples, source.num_examples, source.name)
    return sample(source, num_examples, seed=seed)
