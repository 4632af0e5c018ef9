"""scikit-learn's handwritten digits, 8 x 8 pixels: four fifths to train on, one fifth held out.

    python -m simclr_jax.data.sources.digits FOLDER

writes them as PNG files without labels, to try out the tasks for folders: FOLDER/photos has the digits to
train on, FOLDER/new the held-out ones. Only a file's name shows its digit, as 7 in photos/0042-7.png.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf

from simclr_jax.data.source import Source
from simclr_jax.process import UserError, errors, escape, files


def load(split: str) -> Source:
    """Returns the examples of 'train' or 'eval'."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    # The random state is a constant, so that every run and task holds out the same digits.
    train, held_out = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0
    )
    rows = {"train": train, "eval": held_out}[split]
    labels = digits.target[rows].astype(np.int32)
    names = tuple("0123456789")
    return Source(f"digits ({split})", len(rows), 10, tf.identity, images[rows], labels, class_names=names)


def main(argv: list[str]) -> None:
    from PIL import Image

    parser = errors.command_parser("Writes scikit-learn's handwritten digits as PNG files.")
    parser.add_argument("folder", type=Path, help="where to write photos/ and new/")
    folder = parser.parse_args(argv).folder
    for split, name in (("train", "photos"), ("eval", "new")):
        if (folder / name).exists():
            raise UserError(f"{escape(folder / name)} exists already: choose another folder, or remove it")
        with files.storage(folder):
            (folder / name).mkdir(parents=True)
        source = load(split)
        for row, (image, label) in enumerate(zip(source.records, source.labels)):
            Image.fromarray(image).save(folder / name / f"{row:04d}-{label}.png")
        print(f"{escape(folder / name)}: {source.num_examples} images", flush=True)


if __name__ == "__main__":
    errors.run(main)
