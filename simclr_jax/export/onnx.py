"""ONNX, for ONNX Runtime and others."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from simclr_jax.export import compare, outputs

PACKAGES = ("jax2onnx", "onnx", "onnxruntime")  # Packages that requirements.txt does not have.
OUTPUTS = ("final_avg_pool", "proj_head_output", "logits_sup")  # The outputs among `export.outputs`.
_PROTOBUF_LIMIT = 2**31 - 2**24  # Bytes of weights that fit into one file of ONNX with their graph.


def write(model, variables, folder, *, image_size: int, classes: dict) -> float:
    """Writes `folder`/model.onnx, and its weights beside it where they are large.

    The values of `classes`, from `export.classes_of`, become metadata, as JSON.

    Returns:
      The difference of its outputs from JAX's, see `export.compare`.
    """
    import onnx
    import onnxruntime
    from jax2onnx import to_onnx  # the command checks that these three are installed

    shape = (1, image_size, image_size, model.channels)
    shapes = jax.eval_shape(partial(outputs, model), variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    names = [name for name in OUTPUTS if name in shapes]

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
    del graph.graph.value_info[:]  # some are wrong, and ONNX Runtime would warn of them
    onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in classes.items()})
    onnx.save(graph, path)
    if fits:
        Path(f"{path}.data").unlink(missing_ok=True)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images):
        return dict(zip(names, session.run(names, {"inputs": images})))

    return max(compare(model, variables, image_size, batch, run) for batch in (1, 3))
