"""The images nearest to new ones, and near-duplicates in a folder, by the features of a run:

    python -m simclr_jax.evaluation.neighbours RUN IMAGE [IMAGE ...] [--count=5]
    python -m simclr_jax.evaluation.neighbours RUN --duplicates [--output=duplicates.csv]

The first prints names and cosine similarities, the highest first. The second writes groups of images of which
each is very near to another one of its group: `group`, `name`, `similarity` to its nearest image. Very near
is what lies within `--share` of the usual distance between an image and its nearest neighbour. Look at them:
of true duplicates keep one, since the loss takes each for a negative of the other, and a held-out image that
is trained on, too, makes scores look better than they are.
"""

import argparse
import csv
import io
import os

import numpy as np
from etils import epath

from simclr_jax.evaluation import embedded
from simclr_jax.process import errors, files
from simclr_jax.process.console import escape
from simclr_jax.process.errors import UserError, reason_of

SHARE = 0.3  # of the usual distance to the nearest neighbour
_SAMPLE = 2_000  # images that tell that distance
_BLOCK = 2**26  # similarities that are held at a time


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="workdir of a run")
    parser.add_argument("images", nargs="*", help="files of images whose neighbours to print")
    parser.add_argument("--count", type=int, default=5, help="how many neighbours each (5)")
    parser.add_argument("--duplicates", action="store_true", help="write groups of near-duplicates")
    parser.add_argument("--output", default="duplicates.csv", help="file to write (duplicates.csv)")
    parser.add_argument("--share", type=float, default=SHARE, help=f"see above ({SHARE})")
    args = parser.parse_args(argv)
    if bool(args.images) == args.duplicates:
        raise UserError("expected image files, or --duplicates: see --help")
    if args.count < 1 or not 0 < args.share <= 1:
        raise UserError(
            f"--count={args.count}, --share={args.share}: expected at least 1, and a number above 0 up to 1"
        )
    if args.duplicates and files.exists(args.output):
        raise UserError(f"--output={escape(args.output)} exists already: choose another file, or remove it")
    if missing := [path for path in args.images if not os.path.isfile(path)]:
        raise UserError(f"{escape(missing[0])} is no file: give image files")
    found = embedded.load(args.run)
    if args.duplicates:
        _write_duplicates(found, args.share, epath.Path(args.output))
    else:
        _print_neighbours(found, args.images, args.count)


def nearest(found: embedded.Embedded, features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the `count` images nearest to each of `features`, [m, w], and similarities, both [m, count]."""
    similar = embedded.directions(features, found.basis) @ found.features.T
    rows = np.argsort(-similar, axis=1, kind="stable")[:, :count]
    return rows, np.take_along_axis(similar, rows, axis=1)


def duplicates(features: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Groups of near-duplicates among features, float32 [n, d], rows of length 1.

    Returns:
      The number of every image's group, int [n], -1 where it is in none; the similarity to its nearest
      neighbour, [n]; and the similarity from which on two images are in one group.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(features)
    best, pairs = np.full(count, -1.0, np.float32), []
    rows = max(1, min(_BLOCK // count, count))
    some = np.random.default_rng(0).permutation(count)[:_SAMPLE]
    usual = np.concatenate(
        [to_others(features, some[start : start + rows]).max(axis=1) for start in range(0, len(some), rows)]
    )
    distance = share * np.median(np.sqrt(np.maximum(2 - 2 * usual, 0)))
    threshold = 1 - max(distance, 1e-3) ** 2 / 2  # identical images differ by what 32 bits round
    for start in range(0, count, rows):
        similar = to_others(features, np.arange(start, min(start + rows, count)))
        best[start : start + rows] = similar.max(axis=1)
        one, other = np.nonzero(similar >= threshold)
        pairs.append(np.stack([one + start, other]))
    one, other = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(count, count))
    _, groups = connected_components(graph, directed=False)
    alone = np.bincount(groups)[groups] == 1
    _, numbers = np.unique(groups[~alone], return_inverse=True)
    groups = np.full(count, -1)
    groups[~alone] = numbers
    return groups, best, float(threshold)


def to_others(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Similarities of some images to all, [m, n], and -2 to themselves, below any."""
    similar = features[rows] @ features.T
    similar[np.arange(len(rows)), rows] = -2
    return similar


def _print_neighbours(found, paths, count):
    from simclr_jax import encoder

    rows, similar = nearest(found, encoder.load(found.run)(_decoded(found, paths)), count)
    for path, names, values in zip(paths, rows, similar):
        print(escape(path))
        for row, value in zip(names, values):
            label = found.labels[row]
            told = f"  {escape(found.class_names[label])}" if label >= 0 and found.class_names else ""
            print(f"  {value:.3f}  {escape(found.names[row])}{told}", flush=True)


def _decoded(found, paths):
    from simclr_jax.data import datasets, decode

    config = found.config
    options = {"max_pixels": config.dataset.max_pixels}
    if config.dataset.name == "folder":  # which tells what is white of 16 bits
        source = datasets.load(config.dataset, found.split[0], seed=config.seed, workdir=found.files)
        options |= {"value_range": source.value_range} if source.value_range else {}
    images = []
    for path in paths:
        try:
            images.append(decode.decode(os.fsencode(path), **options).numpy())
        except Exception as error:  # TensorFlow's and Pillow's
            raise UserError(f"{escape(path)} cannot be decoded ({reason_of(error, 80)})") from None
    return images


def _write_duplicates(found, share, output):
    groups, best, threshold = duplicates(found.features, share)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["group", "name", "similarity"])
    for row in np.argsort(groups, kind="stable"):
        if groups[row] >= 0:
            table.writerow([groups[row] + 1, found.names[row], f"{best[row]:.5f}"])
    files.write_text(output, text.getvalue())
    print(
        f"{escape(output)}: {(groups >= 0).sum():,} of {len(groups):,} images in {groups.max() + 1:,} "
        f"groups; their similarity is {threshold:.4f} or more",
        flush=True,
    )


if __name__ == "__main__":
    errors.run(main)
