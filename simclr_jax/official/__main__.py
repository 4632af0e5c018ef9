"""Converts checkpoints of google-research/simclr: `python -m simclr_jax.official PATH --output DIR`"""

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simclr_jax import checkpoint, official
from simclr_jax.models import describe, make_model
from simclr_jax.process import errors, files
from simclr_jax.workdir import records, report


def main(argv: list[str]) -> None:
    parser = errors.command_parser(official.__doc__)
    parser.add_argument("path", help="folder, prefix or file of a TF1 or TF2 checkpoint, or a SavedModel")
    parser.add_argument("--output", required=True, help="workdir to make")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    help_of_layer = "projection layer that the classifier reads: 1 for v2's networks fine-tuned from there"
    parser.add_argument("--supervised_layer", type=int, default=0, help=help_of_layer)
    args = parser.parse_args(argv)
    output = epath.Path(args.output)
    files.check_new(output)
    variables, meta = official.read(args.path, ema=args.ema)
    model = ConfigDict(meta["config"]["model"])
    model.supervised_layer = meta["config"]["model"]["supervised_layer"] = args.supervised_layer
    make_model(model, meta["num_classes"])  # refuses a layer that does not exist
    with checkpoint.open_manager(output, keep=1) as manager:
        checkpoint.save(manager, 0, variables, meta)
    records.save_config(output, meta["config"])
    params = variables["params"]
    kernels = [value for path, value in flatten_dict(params["encoder"]).items() if path[-1] == "kernel"]
    sizes = {part: sum(value.size for value in jax.tree.leaves(tree)) for part, tree in params.items()}
    norm = np.mean([np.linalg.norm(kernel) for kernel in kernels])
    report.print_table(
        {
            "network": f"{describe(model)}, {model.stem} stem",
            "parameters": ", ".join(f"{size:,} {part.replace('_', ' ')}" for part, size in sizes.items()),
            "classes": str(meta["num_classes"] or "no classifier"),
            "kernels": f"norm {norm:.3g} on average; {official.WEIGHT_SCALE_NOTE}",
            "written to": str(output),
        }
    )


if __name__ == "__main__":
    errors.run(main)
