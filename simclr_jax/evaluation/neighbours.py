"""The images nearest to new ones, and near-duplicates in a folder, by the features of a run:

    python -m simclr_jax.evaluation.neighbours RUN IMAGE [IMAGE ...] [--count=5]
    python -m simclr_jax.evaluation.neighbours RUN --duplicates [--output=duplicates.csv]

The first prints names and cosine similarities, the highest first. The second writes groups of images, each
of which is very near to another one of its group: `group`, `name`, `similarity` to its nearest image. Two
images are very near when their distance is within `--share` of the median distance between an image and its
nearest neighbour. Look at them: keep one of true duplicates, since the loss takes each for a negative of the
other, and a held-out image with a copy in training makes scores look better than they are.
"""

import os

from etils import epath

from simclr_jax import encoder, runs
from simclr_jax.evaluation import parts
from simclr_jax.evaluation.features import unit_rows
from simclr_jax.evaluation.similarity import SHARE, duplicates, nearest
from simclr_jax.images import to_array
from simclr_jax.process import UserError, errors, escape, files
from simclr_jax.workdir import records


def main(argv: list[str]) -> None:
    parser = errors.command_parser(__doc__)
    parser.add_argument("run", help="workdir of a run")
    parser.add_argument("--path", help="the folder of its images, where they have moved")
    parser.add_argument("images", nargs="*", help="files of images whose neighbours to print")
    parser.add_argument("--count", type=int, default=5, help="how many neighbours each (5)")
    parser.add_argument("--duplicates", action="store_true", help="write groups of near-duplicates")
    parser.add_argument("--output", default="duplicates.csv", help="file to write (duplicates.csv)")
    parser.add_argument("--share", type=float, default=SHARE, help=f"see above ({SHARE})")
    args = parser.parse_args(argv)
    if bool(args.images) == args.duplicates:
        raise UserError("expected image files, or --duplicates: see --help")
    if args.count < 1 or not 0 < args.share <= 1:
        raise UserError(f"--count={args.count}, --share={args.share}: expected 1 or more, and above 0 to 1")
    if args.duplicates and files.exists(args.output):
        raise UserError(f"--output={escape(args.output)} exists already: choose another file, or remove it")
    if missing := [path for path in args.images if not os.path.isfile(path)]:
        raise UserError(f"{escape(missing[0])} is no file: give image files")
    stored = runs.load_features(args.run, args.path)
    if args.duplicates:
        _write_duplicates(stored, args.share, epath.Path(args.output))
    else:
        _print_neighbours(stored, args.images, args.count)


def _print_neighbours(stored, paths, count):
    features = encoder.load(stored.run)(_decode(stored, paths))
    neighbours = nearest(stored.features, count, unit_rows(features, stored.basis))
    for path, rows, similarities in zip(paths, *neighbours):
        print(escape(path))
        for row, value in zip(rows, similarities):
            label = stored.labels[row]
            class_name = f"  {escape(stored.class_names[label])}" if label >= 0 and stored.class_names else ""
            print(f"  {value:.3f}  {escape(stored.names[row])}{class_name}", flush=True)


def _decode(stored, paths):
    config = stored.config
    options = {"max_pixels": config.dataset.max_pixels}
    if config.dataset.name == "folder":  # It knows which values of 16 bits are black and white.
        records.find_images(config)
        source = parts.load(config, stored.folder, stored.split[0])
        options |= {key: getattr(source, key) for key in ("value_range", "channels", "dtype")}
    return [to_array(path, path, **options) for path in paths]


def _write_duplicates(stored, share, output):
    groups, similar, threshold = duplicates(stored.features, share)
    lines = [
        (groups[row] + 1, files.csv_name(stored.names[row]), f"{similar[row]:.5f}")
        for row in groups.argsort(kind="stable")
        if groups[row] >= 0
    ]
    files.write_csv(output, [("group", "name", "similarity"), *lines])
    count = int(groups.max()) + 1
    print(
        f"{escape(output)}: {len(lines):,} of {len(groups):,} images in {count:,} group{'s' * (count != 1)}; "
        f"their similarity is {threshold:.4f} or more",
        flush=True,
    )


if __name__ == "__main__":
    errors.run(main)
