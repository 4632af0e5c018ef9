"""Which images to label first: `python -m simclr_jax.evaluation.suggest RUN --count=50 --output=labels.csv`

RUN is the workdir of a pretraining run, or of any that trains a network. The file has a row an image: `name`,
`label`, `split` and `index`, in the order in which labels are worth most; the first ten of fifty are those of
ten. Fill in the column `label`, in a spreadsheet say, and go on with `--config.dataset.labels=labels.csv`.
With `--labelled=labels.csv` later, what has a label there stays on top, and further images are chosen.

Methods:

    typical   typical images of many clusters (TypiClust, arXiv 2202.02794): the best for few labels
    coverage  always the image that is farthest from those before (k-centre, arXiv 1708.00489)
    random    drawn by lot, to compare with
"""

import argparse
import csv
import io
import warnings

import numpy as np
from etils import epath

from simclr_jax import errors, files
from simclr_jax.console import shown
from simclr_jax.errors import UserError
from simclr_jax.evaluation import embedded

NEIGHBOURS = 20  # whose distance tells how typical an image is, as in the paper
_EXACT = 20_000  # images up to which k-means goes through all of them at every step
_MEMBERS = 4_000  # images of a cluster among which the most typical one is looked for


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="workdir of a run")
    parser.add_argument("--count", type=int, default=50, help="how many images to suggest (50)")
    parser.add_argument("--output", default="labels.csv", help="file to write (labels.csv)")
    parser.add_argument("--labelled", help="CSV file of labels that there are already")
    parser.add_argument("--method", default="typical", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--seed", type=int, default=0, help="of clusters and lots (0)")
    args = parser.parse_args(argv)
    if args.method not in METHODS:
        raise UserError(f"--method={args.method} is unknown: choose one of {', '.join(METHODS)}")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed={args.seed}: expected a whole number from 0, as in --seed=1")
    output = epath.Path(args.output)
    if files.exists(output):
        raise UserError(
            f"--output={shown(output)} exists already: choose another file; --labelled={shown(output)} goes "
            "on from its labels"
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
    print(f"{shown(output)}: {args.count} images to label, in the column label", flush=True)


def candidates(found: embedded.Embedded) -> np.ndarray:
    """Rows of what may be labelled: not of held-out images, which are to stay unseen."""
    if "all" in found.split:
        return np.arange(len(found.names))
    return np.flatnonzero(np.array(found.split) == "train")


def typical(features: np.ndarray, count: int, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Rows of images to label: the most typical one of each cluster without a label, largest cluster first.

    The clusters become more in steps, and what is chosen in one counts as labelled in the next, so that the
    first rows do not depend on `count`.

    Args:
      features: float32 [n, d], rows of length 1.
      count: how many.
      labelled: rows that have a label already.
      seed: of the clusters.
    """
    chosen, unknown = [], np.ones(len(features), bool)
    unknown[labelled] = False
    while len(chosen) < count:
        size = _step(len(chosen))
        found = clusters(features, min(len(labelled) + len(chosen) + size, len(features)), seed)
        covered = set(found[labelled]) | set(found[chosen])
        sizes = np.bincount(found)
        order = [cluster for cluster in np.argsort(-sizes, kind="stable") if cluster not in covered]
        for cluster in order[: min(size, count - len(chosen))]:
            members = np.flatnonzero(found == cluster)
            chosen.append(_most_typical(features, members, seed))
        if not order:  # clusters that are empty
            rest = np.setdiff1d(np.flatnonzero(unknown), chosen)
            chosen.extend(rest[: count - len(chosen)])
        if len(chosen) < count:
            print(f"  {len(chosen)} of {count}", flush=True)
    return np.array(chosen)


def _step(done):
    """How many are chosen before the images are clustered again: about half of what there is, from 10 on."""
    return max(10, done // 2)


def clusters(features, count, seed):
    """The cluster of every image, int [n], of `count` by k-means; features are float32 [n, d]."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(features) <= _EXACT:
        means = KMeans(count, n_init=5, random_state=seed)
    else:
        means = MiniBatchKMeans(count, batch_size=8192, n_init=1, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of images that are the same
        return means.fit(features).labels_


def _most_typical(features, members, seed):
    """The image of a cluster that is nearest to its neighbours there, by their mean distance."""
    from sklearn.neighbors import NearestNeighbors

    if len(members) > _MEMBERS:
        members = np.random.default_rng(seed).choice(members, _MEMBERS, replace=False)
    near = min(NEIGHBOURS, len(members) - 1)
    if near < 2:
        return members[0]
    index = NearestNeighbors(n_neighbors=near + 1, algorithm="brute").fit(features[members])
    distances, _ = index.kneighbors(features[members])
    return members[distances[:, 1:].mean(axis=1).argmin()]


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
