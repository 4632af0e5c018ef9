"""Suggests the images to label first: `python -m simclr_jax.evaluation.suggest RUN --count=50
--output=labels.csv`

RUN is the workdir of a pretraining run, or of any that trains a network. The file has a row an image: `name`,
`label`, `split` and `index`, in the order in which labels are worth most; the first ten of fifty are those of
ten. Fill in the column `label`, in a spreadsheet say, and go on with `--config.dataset.labels=labels.csv`.
Labels so far come in by `--labelled=labels.csv`: these images stay on top, and further ones are chosen.

Methods:

    typical   images that many others are similar to, in turn (MaxHerding, arXiv 2407.12212): the default
    doubtful  the same, but of the half that a classifier of the labels doubts most: the default once two
              classes are labelled; several labels an image are a class by themselves here
    coverage  always the image that is farthest from those before (k-centre, arXiv 1708.00489)
    random    random images, to compare with
"""

from pathlib import Path

import numpy as np
from etils import epath

from simclr_jax import runs
from simclr_jax.evaluation.selection import METHODS, candidates, default
from simclr_jax.process import UserError, errors, escape, files, say
from simclr_jax.workdir import records


def main(argv: list[str]) -> None:
    parser = errors.command_parser(__doc__)
    parser.add_argument("run", help="workdir of a run")
    parser.add_argument("--path", help="the folder of its images, where they have moved")
    parser.add_argument("--count", type=int, default=50, help="how many images to suggest (50)")
    parser.add_argument("--output", default="labels.csv", help="file to write (labels.csv)")
    parser.add_argument("--labelled", help="CSV file of labels that there are already")
    parser.add_argument("--method", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--several_labels", action="store_true", help="an image may have several, as a;b")
    parser.add_argument("--seed", type=int, default=0, help="of samples and random orders (0)")
    args = parser.parse_args(argv)
    if args.method not in (None, *METHODS):
        raise UserError(f"--method={args.method} is unknown: choose one of {', '.join(METHODS)}")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed={args.seed}: expected a whole number from 0, as in --seed=1")
    output = epath.Path(args.output)
    if files.exists(output):
        raise UserError(
            f"--output={escape(output)} exists already: choose another file; --labelled={escape(output)} "
            "goes on from its labels"
        )
    stored = runs.load_features(args.run, args.path)
    rows = candidates(stored)
    labels = {}  # By row.
    if args.labelled:
        from simclr_jax.data import labels as label_files

        several = args.several_labels
        given = label_files.read(args.labelled, stored.names, stored.dataset, classes=1, several=several)
        row_of = {name: row for row, name in enumerate(stored.names)}
        labels = {row_of[name]: label for name, label in given.items()}
    elif dataset := records.newest_labels(Path(args.run)):
        several = " --several_labels" if dataset.get("several_labels") else ""
        flags = f"--labelled={escape(dataset['labels'])}{several} --output=more.csv"
        say(f"note: there are labels: {flags} chooses with them")
    names = sorted(set(labels.values()))
    numbers = np.array([names.index(labels[row]) if row in labels else -1 for row in rows])
    unlabelled = int((numbers < 0).sum())
    if not 1 <= args.count <= unlabelled:
        raise UserError(f"--count={args.count}: expected 1 to {unlabelled:,}, the images without a label")
    method = args.method or default(numbers)
    if method == "doubtful" and default(numbers) != method:
        raise UserError("--method=doubtful: expected --labelled=FILE with labels of two classes or more")
    print(f"choosing {args.count} of {unlabelled:,} images: {method}", flush=True)
    chosen = METHODS[method](stored.features[rows], args.count, numbers, args.seed)
    lines = [
        (files.csv_name(stored.names[row]), labels.get(row, ""), stored.split[row], stored.index[row])
        for row in [*labels, *rows[chosen]]
    ]
    files.write_csv(output, [("name", "label", "split", "index"), *lines])
    print(f"{escape(output)}: {args.count} images to label, in the column label", flush=True)


if __name__ == "__main__":
    errors.run(main)
