"""Which images to label first: `python -m simclr_jax.evaluation.suggest RUN --count=50 --output=labels.csv`

RUN is the workdir of a pretraining run, or of any that trains a network. The file has a row an image: `name`,
`label`, `split` and `index`, in the order in which labels are worth most; the first ten of fifty are those of
ten. Fill in the column `label`, in a spreadsheet say, and go on with `--config.dataset.labels=labels.csv`.
With `--labelled=labels.csv` later, what has a label there stays on top, and further images are chosen.

Methods:

    typical   images that many are similar to, each of others (MaxHerding, arXiv 2407.12212): the default
    coverage  always the image that is farthest from those before (k-centre, arXiv 1708.00489)
    random    drawn by lot, to compare with
"""

import argparse
import csv
import io

import numpy as np
from etils import epath

from simclr_jax.evaluation import embedded
from simclr_jax.process import errors, files
from simclr_jax.process.console import escape
from simclr_jax.process.errors import UserError

_SAMPLE = 10_000  # images that `typical` looks at
_WIDTH = 0.45  # of the similarity exp((cosine - 1) / width); 0.35 to 0.45 did equally well on three datasets


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="workdir of a run")
    parser.add_argument("--count", type=int, default=50, help="how many images to suggest (50)")
    parser.add_argument("--output", default="labels.csv", help="file to write (labels.csv)")
    parser.add_argument("--labelled", help="CSV file of labels that there are already")
    parser.add_argument("--method", default="typical", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--seed", type=int, default=0, help="of samples and lots (0)")
    args = parser.parse_args(argv)
    if args.method not in METHODS:
        raise UserError(f"--method={args.method} is unknown: choose one of {', '.join(METHODS)}")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed={args.seed}: expected a whole number from 0, as in --seed=1")
    output = epath.Path(args.output)
    if files.exists(output):
        raise UserError(
            f"--output={escape(output)} exists already: choose another file; --labelled={escape(output)} "
            "goes on from its labels"
        )
    found = embedded.load(args.run)
    rows = candidates(found)
    labels = _labels(args.labelled, found) if args.labelled else {}
    known = np.isin(rows, list(labels))
    if not 1 <= args.count <= (~known).sum():
        raise UserError(f"--count={args.count}: expected 1 to {(~known).sum():,}, the images without a label")
    print(f"choosing {args.count} of {(~known).sum():,} images: {args.method}", flush=True)
    chosen = METHODS[args.method](found.features[rows], args.count, np.flatnonzero(known), args.seed)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", "label", "split", "index"])
    for row in [*labels, *rows[chosen]]:
        table.writerow([found.names[row], labels.get(row, ""), found.split[row], found.index[row]])
    files.write_text(output, text.getvalue())
    print(f"{escape(output)}: {args.count} images to label, in the column label", flush=True)


def candidates(found: embedded.Embedded) -> np.ndarray:
    """Rows of what may be labelled: not of held-out images, which are to stay unseen."""
    if "all" in found.split:
        return np.arange(len(found.names))
    return np.flatnonzero(np.array(found.split) == "train")


def typical(features: np.ndarray, count: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Rows of images to label: always the one that brings most images near to one with a label.

    MaxHerding (arXiv 2407.12212): greedy for the mean over all images of the largest similarity
    to an image with a label. Of more than 10,000 images a sample is looked at; what `count` takes beyond it
    is drawn by lot.

    Args:
      features: float32 [n, d], rows of length 1.
      count: how many; more begin with the fewer.
      labelled: rows that have a label already.
      seed: of the sample.
    """
    unknown = np.setdiff1d(np.arange(len(features)), labelled)
    lot = np.random.default_rng(seed).permutation(unknown)
    sample = np.sort(lot[:_SAMPLE])
    points = _balanced(features[np.concatenate([sample, labelled])])
    points, known = points[: len(sample)], points[len(sample) :]
    similarity = np.exp((points @ points.T - 1) / _WIDTH)
    near = np.zeros(len(sample), np.float32)  # of every image, how similar to it the nearest label is
    for point in known:
        near = np.maximum(near, np.exp((points @ point - 1) / _WIDTH))
    # What an image brings only falls as others are chosen: it is computed again where it could be the most.
    gains = np.full(len(sample), np.inf, np.float32)
    chosen = []
    while len(chosen) < min(count, len(sample)):
        best = int(gains.argmax())
        gain = np.maximum(similarity[best] - near, 0).sum()
        if gain < gains[best]:
            gains[best] = gain
        else:
            chosen.append(best)
            near, gains[best] = np.maximum(near, similarity[best]), -1
    return np.concatenate([sample[chosen], lot[_SAMPLE:][: count - len(chosen)]])


def _balanced(features):
    """Directions [n, d] -> [n, c], about their mean, where a few strong components do not rule the others.

    Each principal component is divided by the root of its deviation: half of what whitening does.
    """
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # of images that are the same
        found = PCA(min(embedded.DIMENSIONS, *features.shape), random_state=0).fit(features)
    deviation = np.sqrt(found.explained_variance_)
    scale = np.sqrt(np.maximum(deviation, 1e-3 * deviation[0] + 1e-9))
    return embedded.directions(found.transform(features) / scale)


def coverage(features: np.ndarray, count: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Rows of images to label: always the one farthest from all before, the first nearest to the mean."""
    chosen = []
    if len(labelled):
        nearest = np.max([features @ features[row] for row in labelled], axis=0)
    else:
        chosen = [int((features @ features.mean(axis=0)).argmax())]
        nearest = features @ features[chosen[0]]
    while len(chosen) < count:
        nearest[labelled], nearest[chosen] = np.inf, np.inf
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, features @ features[chosen[-1]])
    return np.array(chosen)


def random(features: np.ndarray, count: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Rows of images to label, by lot."""
    rows = np.setdiff1d(np.arange(len(features)), labelled)
    return np.random.default_rng(seed).permutation(rows)[:count]


METHODS = {"typical": typical, "coverage": coverage, "random": random}


def _labels(path, found):
    """{row: label} of a CSV file."""
    from simclr_jax.data import labels

    where = found.config.dataset.path or found.config.dataset.name
    read = labels.read(path, found.names, where, classes=1)
    rows = {name: row for row, name in enumerate(found.names)}
    return {rows[name]: label for name, label in read.items()}


if __name__ == "__main__":
    errors.run(main)
