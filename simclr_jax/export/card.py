"""The model card that lies beside an exported network: what it is, how to load it, what it comes from."""

import json
import re
from string import Template

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simclr_jax.export import classes_of
from simclr_jax.models import describe

_IMAGES = """The model takes images as float32, RGB, in [0, 1]: divide 8-bit pixels by 255, without
which its outputs are worth nothing, and normalise no further$below. simclr-jax evaluates it on the
centre square of a photo, $share its shorter side, resized to $size x $size pixels by bicubic interpolation.
`load_image` does all of that.

In the folder of this file:

"""
_LOAD_IMAGE = """import numpy as np
from PIL import Image, ImageOps


def load_image(path, size=$size):
    photo = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), np.float32)
    side = round($proportion * min(photo.shape[:2]))
    top, left = ((length - side + 1) // 2 for length in photo.shape[:2])
    photo = photo[top : top + side, left : left + side]
    # Bicubic as in TensorFlow: of 4 x 4 pixels, however far it shrinks.
    far = np.abs((np.arange(size)[:, None] + 0.5) * side / size - 0.5 - np.arange(side))
    weights = np.where(far < 1, (1.5 * far - 2.5) * far**2 + 1, ((2.5 - 0.5 * far) * far - 4) * far + 2)
    weights = np.where(far < 2, weights, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    photo = np.einsum("ih,hwc,jw->ijc", weights, photo, weights, optimize=True)
    return (photo / 255).clip(0, 1).astype(np.float32)  # [size, size, 3]


"""
_EXAMPLE = """images = np.random.rand(2, $size, $size, 3).astype("float32")
# images = np.stack([load_image("photo.jpg")])"""
_LOAD = {
    "savedmodel": f"""```python
{_LOAD_IMAGE}import tensorflow as tf

model = tf.saved_model.load(".")
{_EXAMPLE}
outputs = model(images, trainable=False)
$results
```

It takes any batch$sizes, and is for inference: `trainable=True`, which the official modules know, is
refused. `model.signatures` has the same as `serving_default` and `default`, to be called with `inputs=`.""",
    "onnx": f"""```python
{_LOAD_IMAGE}import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
{_EXAMPLE}
$results
```

It takes any batch, of images of this size.""",
    "safetensors": f"""```python
{_LOAD_IMAGE}import safetensors.torch, torch, torchvision

$torch
{_EXAMPLE}$normalise
with torch.no_grad():
    $results
```

`model` takes images as [b, 3, h, w], $normalised.$pool""",
}
_CLASSIFIER = """

`logits` are the classifier's, a number for each class: the index of the largest is the class that it
predicts, and their softmax is how probable each of them is."""
_CALIBRATED = """ Divide them by {:.4g} first, the temperature
that calibrates them: then the probabilities are right as often as they say."""
_HELD = {
    "savedmodel": "`model.class_names()` has them, too",
    "onnx": "The metadata of the file has them, too",
    "safetensors": "The metadata of the file has them, too",
}

_POOL = """

TensorFlow's max pooling pads even sizes at the bottom and on the right only, torchvision's on all sides,
which gives other features. It sees half the image size, rounded up. Where that is even, as for multiples of
4, `maxpool` must be `torch.nn.MaxPool2d(3, 2, ceil_mode=True)`; else torchvision's own is right."""


_NORMALISE = """
images = ((images - np.array({}, "f")) / np.array({}, "f")).astype("float32")  # as these weights want them"""
_AS_THEY_ARE = "RGB in [0, 1], without torchvision's usual normalisation"

_TAGS = "simclr, self-supervised-learning, image-feature-extraction"
_KIND = "An image encoder of SimCLR ([v1](https://arxiv.org/abs/2002.05709), [v2](https://arxiv.org/abs/2006.10029))"

_NOTE = """
`logits_sup` is right if the classifier was trained on layer {} of the projection head (0: the features),
which the checkpoint does not tell. Else convert it first, by `simclr_jax.official` with `--supervised_layer`.
"""


def model_card(form: str, model, variables, meta, *, image_size, outputs, summary, licence) -> str:
    """The text of a model card.

    Args:
      form: 'savedmodel', 'onnx' or 'safetensors'.
      model, variables, meta: the network, from `export.load`.
      image_size: of its training, in pixels.
      outputs: name -> shape for one image.
      summary: what was measured of these weights, None if nothing was.
      licence: of the weights, a name or a sentence; None if nobody has stated it.
    """
    config = meta["config"]
    network, stem = describe(ConfigDict(config["model"])), getattr(model.encoder, "stem", None)
    params = variables["params"]
    if form == "safetensors":
        held = {"encoder", "supervised_head"} if "logits_sup" in outputs else {"encoder"}
        params = {name: part for name, part in params.items() if name in held}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    proportion = meta.get("proportion") or (0.875 if image_size > 32 else 1.0)  # as `augment.eval_view`
    mean_and_std = model.input_mean and (model.input_mean, model.input_std)
    load = Template(_IMAGES + _LOAD[form]).substitute(
        size=image_size,
        proportion=proportion,
        share=f"{proportion:g} of" if proportion < 1 else "of",
        results=_result_lines(form, outputs),
        normalise=_NORMALISE.format(*mean_and_std) if mean_and_std else "",
        below=" than below" if form == "safetensors" and mean_and_std else "",
        normalised="normalised as above" if mean_and_std else _AS_THEY_ARE,
        sizes=" and image size" if stem else " of images of this size",
        torch=_torch_lines(model, config["model"], meta["num_classes"], image_size) if stem else "",
        pool=_POOL if stem == "imagenet" and model.encoder.max_pool == "tensorflow" else "",
    )
    load += _classes(form, classes_of(meta)) if "logits_sup" in outputs else ""
    numbers = {
        name: value
        for name, value in flatten_dict(summary or {}, sep=".").items()
        if isinstance(value, int | float)
    }
    results = [f"| {name} | {value:.4g} |" for name, value in numbers.items()]
    shapes = [f"| `{name}` | batch, {', '.join(map(str, shape[1:]))} |" for name, shape in outputs.items()]
    note, source = "", meta.get("source")
    title, tags, kind = f"SimCLR, {network}", _TAGS, _KIND
    if "dataset" in config:
        given = f", given `pretrained={config['pretrained']}`" if config["pretrained"] else ""
        given += f", weights of {_origin(source)}" if source else ""
        origin = f"with simclr-jax, task `{config['task']}`{given}"
        data = "`{name}`, split `{train_split}`".format(**config["dataset"])
        unlicensed = "Nobody has stated one for these weights. Mind that of the data, too."
    elif source:
        title, tags, kind = network, "image-feature-extraction", "An image encoder"
        origin = f"by {_origin(source)}"
        data = "The file does not tell."
        unlicensed = "The file states none; that of whoever published the weights holds."
    else:
        average = ", the moving average of its weights" if config["ema"] else ""
        origin = f"by the code of google-research/simclr, read from {config['pretrained']}{average}"
        if "logits_sup" in outputs and config["model"]["projection_layers"]:
            note = _NOTE.format(config["model"]["supervised_layer"])
        data = "The checkpoint does not tell."
        unlicensed = (
            "The code that trained these weights is under the Apache License 2.0; the checkpoint states none."
        )
    name = (
        licence.lower() if licence and re.fullmatch(r"[\w.-]+", licence) else "other"
    )  # as model hubs know them
    return f"""---
license: {name}
tags: [{tags}]
---

# {title}

{kind}, trained {origin}.

## Load

{load}

## Network

{network}{f", {stem} stem" if stem else ""}, images of {image_size} pixels.
Parameters: {", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items())}.

| output | shape |
| --- | --- |
{chr(10).join(shapes)}
{note}
## Data

{data}

## Results

{_table(results)}

## Licence

{licence or unlicensed}

## Config

```json
{json.dumps(config, indent=2)}
```
"""


def _classes(form, classes):
    text = _CLASSIFIER
    if "calibration_temperature" in classes:
        text += _CALIBRATED.format(classes["calibration_temperature"])
    if names := classes.get("class_names"):
        text += f"\n\nThe classes, in the order of the logits, as JSON. {_HELD[form]}.\n\n"
        text += f"```json\n{json.dumps(names, ensure_ascii=False)}\n```"
    return text


def _origin(source) -> str:
    """Whose weights they are, and from which file."""
    return f"{source['by']}, as in {source['file']} (SHA-256 {source['sha256']})"


def _table(rows: list[str]) -> str:
    if not rows:
        return "Nothing was measured."
    return "\n".join(["As this run measured them:", "", "| | |", "| --- | --- |", *rows])


def _result_lines(form: str, outputs) -> str:
    """What reads the features and, where there is a classifier, its output."""
    names = {"features": "final_avg_pool", "logits": "logits_sup"}
    names = {variable: name for variable, name in names.items() if name in outputs}
    if form == "savedmodel":
        return "\n".join(f'{variable} = outputs["{name}"]' for variable, name in names.items())
    if form == "onnx":
        asked = ", ".join(f'"{name}"' for name in names.values())
        return f'[{", ".join(names)}] = session.run([{asked}], {{"inputs": images}})'
    variable = "logits" if "logits" in names else "features"
    return f"{variable} = model(torch.from_numpy(images).permute(0, 3, 1, 2))"


def _torch_lines(model, network, num_classes: int, image_size: int) -> str:
    """What makes torchvision's ResNet this one and loads it."""
    depth, width = network["depth"], network["width"]
    classes = f"num_classes={num_classes}" if num_classes and model.supervised_layer == 0 else ""
    encoder = model.encoder
    if depth in (18, 34, 50, 101, 152) and width == encoder.bottleneck_width == 1:
        lines = [f"model = torchvision.models.resnet{depth}({classes})"]
    elif depth in (50, 101) and width == 1 and encoder.bottleneck_width == 2:
        lines = [f"model = torchvision.models.wide_resnet{depth}_2({classes})"]
    else:
        lines = [f"model = ...  # ResNet-{depth} {width:g}x, which torchvision lacks, under its names"]
    lines += [] if classes else ["model.fc = torch.nn.Identity()"]
    if depth < 50 and encoder.project_first:  # every group of SimCLR's opens with a projection
        lines += ["shortcut = torch.nn.Conv2d(64, 64, 1, bias=False), torch.nn.BatchNorm2d(64)"]
        lines += ["model.layer1[0].downsample = torch.nn.Sequential(*shortcut)"]
    if encoder.stem == "cifar":
        lines += ["model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)"]
        lines += ["model.maxpool = torch.nn.Identity()"]
    # Odd sizes are padded on all sides by TensorFlow, too.
    elif encoder.max_pool == "tensorflow" and (image_size + 1) // 2 % 2 == 0:
        lines += ["model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)"]
    lines += ['model.load_state_dict(safetensors.torch.load_file("model.safetensors"))', "model.eval()"]
    return "\n".join(line if width == 1 else line.replace("64", str(int(64 * width))) for line in lines)
