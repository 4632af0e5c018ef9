"""Trained networks for other frameworks: `python -m simclr_jax.export RUN --format=FORMAT`

RUN is the workdir of any run that trains a network, one checkpoint of it, or a checkpoint of
google-research/simclr; `--output` says where to write, RUN/export/FORMAT by default. All formats compute in
float32, in evaluation mode, and take RGB images in [0, 1], without any further normalisation:

    savedmodel   TensorFlow, with the names and outputs of the official hub modules; any batch and image size
    onnx         ONNX Runtime and others; any batch, the image size of the training
    safetensors  the weights under the names of torchvision's ResNet, for PyTorch

Each is read back and compared with the original before it appears under its name, and a model card,
README.md, lies beside it.
"""

import argparse
import importlib.util
import re
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from simclr_jax import checkpoint, errors, files, official, pretrained
from simclr_jax.console import shown
from simclr_jax.errors import UserError, reason_of
from simclr_jax.model_card import model_card

TOLERANCE = 1e-4  # relative to an output's largest value
_VECTORS = ("final_avg_pool", "proj_head_output", "logits_sup")  # what ONNX gives of `outputs`
_PROTOBUF_LIMIT = 2**31 - 2**24  # bytes of weights that fit into one file of ONNX, with their graph


def load(path):
    """A network as it is exported: in float32, with the stem of its training.

    Returns:
      model, variables and meta, as `pretrained.load_model` has them.
    """
    model, variables, meta = pretrained.load_model(path)
    stem = model.encoder.stem
    if stem == "auto":  # depends on the image size, which may be another one now
        stem = "cifar" if meta["config"]["image_size"] <= 32 else "imagenet"
    encoder = model.encoder.clone(stem=stem, dtype=jnp.float32)
    head = model.projection_head.clone(dtype=jnp.float32)
    return model.clone(encoder=encoder, projection_head=head), variables, meta


def outputs(model, variables, images) -> dict[str, jax.Array]:
    """What the official hub modules give for images [b, h, w, 3], float32 in [0, 1], by their names.

    `final_avg_pool` and `proj_head_input` [b, w] are the features, `initial_conv`, `initial_max_pool` and
    `block_group1`, ... [b, h', w', c] the stages before; `proj_head_output` [b, projection_dim] where the
    whole projection head is there, `logits_sup` [b, classes] where a classifier is.
    """
    results = model.apply(variables, images)
    named = {name: value for name, value in results.items() if name.startswith(("initial_", "block_group"))}
    named |= {"final_avg_pool": results["features"], "proj_head_input": results["features"]}
    head = model.projection_head
    if head.num_layers and head.kept_layers in (None, head.num_layers):
        named["proj_head_output"] = results["projection"]
    if "logits" in results:
        named["logits_sup"] = results["logits"]
    return named


def savedmodel(model, variables, folder, *, image_size: int) -> float:
    """Writes a SavedModel, called as the official ones; returns how far its outputs are from JAX's."""
    from simclr_jax.data import tf  # keeps TensorFlow quiet, so it comes first

    # isort: split
    from orbax.export import JaxModule, constants

    network = JaxModule(
        variables,
        partial(outputs, model),
        trainable=False,
        input_polymorphic_shape="b, h, w, 3",
        jax2tf_kwargs={"native_serialization_platforms": ("cpu", "cuda", "tpu")},
    ).export_module()
    call = network.methods[constants.DEFAULT_METHOD_KEY]
    images = tf.TensorSpec([None, None, None, 3], tf.float32, name="inputs")
    module = tf.Module()
    module.network = network
    # Called as the official ones are; traced for `trainable=False` alone, so that True is refused.
    module.__call__ = tf.function(lambda inputs, trainable=False: call(inputs))
    module.__call__.get_concrete_function(images, trainable=False)
    signature = tf.function(lambda inputs: call(inputs), input_signature=[images])
    tf.saved_model.save(module, str(folder), signatures={"serving_default": signature, "default": signature})
    loaded = tf.saved_model.load(str(folder))
    serve = loaded.signatures["default"]
    return max(
        compare(model, variables, image_size, 2, lambda images: loaded(images, trainable=False)),
        compare(model, variables, image_size + 5, 1, lambda images: serve(inputs=images)),
    )


def onnx(model, variables, folder, *, image_size: int) -> float:
    """Writes `folder`/model.onnx, and its weights beside it where they are large. Returns likewise."""
    import onnx
    import onnxruntime
    from jax2onnx import to_onnx  # these three may be missing, which `main` tells before

    shape = (1, image_size, image_size, 3)
    every = jax.eval_shape(partial(outputs, model), variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    names = [name for name in _VECTORS if name in every]

    def call(images):
        results = outputs(model, variables, images)
        return tuple(results[name] for name in names)

    path = str(folder / "model.onnx")
    to_onnx(
        call,
        [("batch", *shape[1:])],
        model_name="simclr",
        opset=18,  # the oldest that jax2onnx writes
        return_mode="file",
        output_path=path,
        input_names=["inputs"],
        output_names=names,
    )
    fits = sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) < _PROTOBUF_LIMIT
    graph = onnx.load(path, load_external_data=fits)
    del graph.graph.value_info[:]  # some are wrong, of which ONNX Runtime would warn
    onnx.save(graph, path)
    if fits:
        Path(f"{path}.data").unlink(missing_ok=True)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images):
        return dict(zip(names, session.run(names, {"inputs": images})))

    return max(compare(model, variables, image_size, batch, run) for batch in (1, 3))


def safetensors(model, variables, folder, *, image_size: int) -> float:
    """Writes `folder`/model.safetensors, the weights alone; returns 0, since it reads back as the same bits.

    Raises:
      UserError: torchvision has no layers for what this network has.
    """
    from safetensors.numpy import load_file, save_file

    tensors = torch_tensors(model, variables)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    read = load_file(folder / "model.safetensors")
    bits = [{key: (x.dtype, x.shape, x.tobytes()) for key, x in of.items()} for of in (tensors, read)]
    if bits[0] != bits[1]:
        raise UserError(f"{folder} reads otherwise than it was written: choose an --output on another disk")
    return 0.0


def torch_tensors(model, variables) -> dict[str, np.ndarray]:
    """The encoder, and the classifier where there is one of its features, under torchvision's names.

    ('params', 'encoder', 'block_group1_0', 'conv1', 'kernel') [h, w, in, out] -> 'layer1.0.conv1.weight'
    [out, in, h, w], and so on.
    """
    if model.encoder.sk_ratio or model.encoder.se_ratio:
        raise UserError(
            "torchvision's ResNet has neither selective kernels, nor ResNet-D's shortcuts, nor squeeze and "
            "excitation: choose --format=onnx or savedmodel"
        )
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean"}
    leaves["var"] = "running_var"
    tensors = {}
    for path, value in flatten_dict(variables, sep="/").items():
        _, part, *layers, leaf = path.split("/")
        if part == "encoder":
            name = re.sub(r"block_group(\d+)_(\d+)/", r"layer\1.\2.", "/".join(layers))
            name = name.replace("conv_shortcut", "downsample.0").replace("bn_shortcut", "downsample.1")
        elif part == "supervised_head" and model.supervised_layer == 0:
            name = "fc"
        else:
            continue
        value = np.asarray(value, np.float32)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
        tensors[f"{name}.{leaves[leaf]}"] = np.ascontiguousarray(value.transpose(axes) if axes else value)
        if leaf == "mean":
            tensors[f"{name}.num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


def compare(model, variables, size: int, batch: int, run) -> float:
    """The largest difference, relative to its largest value, of what `run(images)` gives by name.

    Raises:
      UserError: it is above TOLERANCE.
    """
    images = np.random.default_rng(0).random((batch, size, size, 3), np.float32)
    with jax.default_matmul_precision("highest"):  # accelerators would round
        expected = jax.device_get(jax.jit(partial(outputs, model))(variables, images))
    differences = {
        name: float(np.abs(np.asarray(value) - expected[name]).max() / (np.abs(expected[name]).max() or 1))
        for name, value in run(images).items()
    }
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # nor NaN
            raise UserError(
                f"{name} differs by {difference:.1e} of its largest value from JAX's, expected at most "
                f"{TOLERANCE:.0e}: nothing was exported, choose another --format"
            )
    return max(differences.values())


_NEEDED = {"onnx": ("jax2onnx", "onnx", "onnxruntime")}  # beside requirements.txt
FORMATS = {"savedmodel": savedmodel, "onnx": onnx, "safetensors": safetensors}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="workdir of a run, one checkpoint, or an official checkpoint")
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--output", help="local folder to make; default: RUN/export/FORMAT")
    parser.add_argument("--licence", help="of the weights, for the model card")
    args = parser.parse_args(argv)
    if args.format not in FORMATS:
        raise UserError(f"--format={args.format} is unknown: choose one of {', '.join(FORMATS)}")
    missing = [name for name in _NEEDED.get(args.format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format={args.format} needs {', '.join(missing)}: pip install 'simclr-jax[{args.format}]', or in a "
            f"clone .venv/bin/pip install -r launch/requirements-{args.format}.txt"
        )
    run = epath.Path(args.run)
    workdir, _ = checkpoint.split(run)
    if not args.output and official.find(run):
        raise UserError(f"{run} is no run of ours: give the --output folder to make")
    output = str(args.output or workdir / "export" / args.format)
    if "://" in output:
        raise UserError(f"--output={output} is not on this machine: give a local folder")
    output = Path(output)
    checkpoint.check_new(output)
    model, variables, meta = load(args.run)
    size = meta["config"]["image_size"]
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(partial(outputs, model), variables, image)
    fc = "logits_sup" in shapes and model.supervised_layer == 0
    given = {"onnx": _VECTORS, "safetensors": ("logits_sup" if fc else "final_avg_pool",)}
    given = [name for name in given.get(args.format, shapes) if name in shapes]
    card = model_card(
        args.format,
        model,
        variables,
        meta,
        image_size=size,
        outputs={name: shapes[name].shape for name in given},
        summary=_results(run),
        licence=args.licence,
    )
    with files.storage(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, whose name not every library takes.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=files.plain(output.parent)) as unfinished:
        folder = Path(unfinished, "export")
        folder.mkdir()
        difference = FORMATS[args.format](model, variables, folder, image_size=size)
        (folder / "README.md").write_text(card)
        for file in folder.glob("model.*"):  # safetensors and ONNX make theirs for the owner alone
            file.chmod((folder / "README.md").stat().st_mode)
        folder.replace(output)
    told = f"outputs within {difference:.1e} of JAX's, relative to the largest" if difference else "same bits"
    print(f"{shown(output)}: written and read back, {told}")


def _results(run) -> dict | None:
    """What was measured of the weights in a workdir; None if nothing was, as of one checkpoint of a run.

    Scores of a run with several draws of labels are their means, which no draw has: it lists each one's.
    """
    own, of_all = run / "summary.json", run.parent / "summary.json"
    draw = re.fullmatch(r"(draw|scratch)(\d+)", run.name)
    if own.exists():
        summary, scratch, index = _read_json(own), False, 0
    elif draw and of_all.exists():
        summary, scratch, index = _read_json(of_all), draw[1] == "scratch", int(draw[2])
    else:
        return None
    draws = summary.pop("draws", [])
    if not draws:
        return summary if own.exists() else None
    if index >= len(draws):
        return None
    prefix = "from_scratch_"
    scores = {
        name.removeprefix(prefix): value
        for name, value in draws[index].items()
        if name.startswith(prefix) == scratch
    }
    rest = {name: value for name, value in summary.items() if name not in draws[index]}
    return scores | rest | {"draw": index}


def _read_json(path):
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{shown(path)} is no JSON ({reason_of(error)}): remove it, or finish the run, which writes it"
        ) from None


if __name__ == "__main__":
    errors.run(main)
