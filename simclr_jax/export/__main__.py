"""Exports trained networks to other frameworks: `python -m simclr_jax.export RUN --format=FORMAT`

RUN is the workdir of any run that trains a network, one checkpoint of it, a checkpoint of
google-research/simclr, or a file of a ResNet under torchvision's names; `--output` says where to write,
RUN/export/FORMAT by default. All formats compute in float32, in evaluation mode, and take RGB images in
[0, 1], without any further normalisation but that on the card of safetensors:

    savedmodel   TensorFlow, with the names and outputs of the official hub modules; any batch and image size
    onnx         ONNX Runtime and others; any batch, the image size of the training
    safetensors  the weights under the names of torchvision's ResNet, for PyTorch

Each is read back and compared with the original before it appears under its name, and a model card,
README.md, lies beside it.
"""

import importlib.util
import re
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath

from simclr_jax import checkpoint, export, pretrained
from simclr_jax.export import onnx, safetensors, savedmodel
from simclr_jax.export.card import model_card
from simclr_jax.process import UserError, errors, escape, files

FORMATS = {"savedmodel": savedmodel, "onnx": onnx, "safetensors": safetensors}


def main(argv: list[str]) -> None:
    parser = errors.command_parser(__doc__)
    parser.add_argument("run", help="workdir of a run, one checkpoint, or an official checkpoint")
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--output", help="local folder to make; default: RUN/export/FORMAT")
    parser.add_argument("--use_average", action="store_true", help="take the moving average of the weights")
    parser.add_argument("--licence", help="of the weights, for the model card")
    args = parser.parse_args(argv)
    if args.format not in FORMATS:
        raise UserError(f"--format={args.format} is unknown: choose one of {', '.join(FORMATS)}")
    packages = onnx.PACKAGES if args.format == "onnx" else ()
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--format={args.format} needs {', '.join(missing)}: pip install {' '.join(missing)}, or "
            f"in a clone .venv/bin/pip install -r launch/requirements-{args.format}.txt"
        )
    run = epath.Path(args.run)
    workdir, _ = checkpoint.split(run)
    if not args.output and pretrained.third_party_reader(run):
        raise UserError(f"{run} is no run of ours: give the --output folder to make")
    output = str(args.output or workdir / "export" / args.format)
    if "://" in output:
        raise UserError(f"--output={output} is not on this machine: give a local folder")
    output = Path(output)
    files.check_new(output)
    model, variables, meta = export.load(args.run, use_average=args.use_average)
    size = meta["config"]["image_size"]
    image = jax.ShapeDtypeStruct((1, size, size, model.channels), jnp.float32)
    shapes = jax.eval_shape(partial(export.outputs, model), variables, image)
    has_fc = "logits_sup" in shapes and model.supervised_layer == 0
    names = {"onnx": onnx.OUTPUTS, "safetensors": ("logits_sup" if has_fc else "final_avg_pool",)}
    names = [name for name in names.get(args.format, shapes) if name in shapes]
    card = model_card(
        args.format,
        model,
        variables,
        meta,
        outputs={name: shapes[name].shape for name in names},
        summary=None if args.use_average else _summary(run),
        licence=args.licence,
    )
    with files.storage(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    # Written to a folder beside the output, since not every library takes the name of the output.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=files.portable_path(output.parent)) as unfinished:
        folder = Path(unfinished, "export")
        folder.mkdir()
        difference = FORMATS[args.format].write(
            model, variables, folder, image_size=size, classes=export.classes_of(meta)
        )
        (folder / "README.md").write_text(card)
        for file in folder.glob("model.*"):  # safetensors and ONNX let only the owner read theirs
            file.chmod((folder / "README.md").stat().st_mode)
        folder.replace(output)
    accuracy = f"outputs within {difference:.1e} of JAX's, relative to the largest"
    print(f"{escape(output)}: written and read back, {accuracy if difference else 'same bits'}")


def _summary(run) -> dict | None:
    """Returns the scores of the weights in a workdir; None where none are known, as of a single checkpoint.

    A run with several draws of labels reports means, which belong to no draw, and the scores of each draw,
    which has a folder of its own.
    """
    file, draw = run / "summary.json", None
    if not file.exists() and (draw := re.fullmatch(r"(draw|scratch)(\d+)", run.name)):
        file = run.parent / "summary.json"
    if not file.exists():
        return None
    summary = pretrained.read_summary(file)
    draws = summary.pop("draws", [])
    if not draw and not draws:
        return summary
    kind, index = (draw[1], int(draw[2])) if draw else ("draw", 0)
    if index >= len(draws):
        return None
    prefix = "from_scratch_"
    scores = {
        name.removeprefix(prefix): value
        for name, value in draws[index].items()
        if name.startswith(prefix) == (kind == "scratch")
    }
    run_scores = {name: value for name, value in summary.items() if name not in draws[index]}
    return scores | run_scores | {"draw": index}


if __name__ == "__main__":
    errors.run(main)
