"""The model card beside an exported network: a description, how to load it, its origin and its results."""

import json
import re
from pathlib import Path
from string import Template

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simclr_jax.export import classes_of
from simclr_jax.models import describe

_SEVERAL = """\
`logits` are the classifier's, a number for each class, whose sigmoid is how probable it is: an image may have
several classes, or none."""

_CALIBRATED = """ Divide them by {:.4g} first, the temperature
that calibrates them: then the probabilities are right as often as they say."""

_NORMALISE = """
images = ((images - np.array({}, "f")) / np.array({}, "f")).astype("float32")  # as these weights want them"""
_VALUES = """

Its images have {} channels. The values that are 0 and 1 for the network were {} and {} in its files, each a
number or one for each channel; values beyond are cut off. `load_image` reads RGB of 8 bits alone."""
_AS_THEY_ARE = "RGB in [0, 1], without torchvision's usual normalisation"

_TAGS = "simclr, self-supervised-learning, image-feature-extraction"
_KIND = "An image encoder of SimCLR ([v1](https://arxiv.org/abs/2002.05709), [v2](https://arxiv.org/abs/2006.10029))"


def model_card(form: str, model, variables, meta, *, outputs, summary, licence) -> str:
    """Returns the text of a model card.

    Args:
      form: 'savedmodel', 'onnx' or 'safetensors'.
      model, variables, meta: the network, from `export.load`.
      outputs: name -> shape for one image.
      summary: the scores of these weights, None if there are none.
      licence: name or sentence for the licence of the weights; None if nobody has stated one.
    """
    config, image_size = meta["config"], meta["config"]["image_size"]
    network, stem = describe(ConfigDict(config["model"])), getattr(model.encoder, "stem", None)
    params = variables["params"]
    if form == "safetensors":
        exported = {"encoder", "supervised_head"} if "logits_sup" in outputs else {"encoder"}
        params = {name: part for name, part in params.items() if name in exported}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    proportion = meta.get("proportion") or (0.875 if image_size > 32 else 1.0)  # as `augment.eval_view`
    mean_and_std = model.input_mean and (model.input_mean, model.input_std)
    load = Template(
        _text("images.md") + _text(f"{form}.md").replace("$load_image\n", _text("load_image.txt"))
    )
    load = load.substitute(
        size=image_size,
        proportion=proportion,
        share=f"{proportion:g} of" if proportion < 1 else "of",
        results=_result_lines(form, outputs),
        normalise=_NORMALISE.format(*mean_and_std) if mean_and_std else "",
        below=" than below" if form == "safetensors" and mean_and_std else "",
        normalised="normalised as above" if mean_and_std else _AS_THEY_ARE,
        sizes=" and image size" if stem else " of images of this size",
        channels=model.channels,
        torch=_torch_lines(model, config["model"], meta["num_classes"], image_size) if stem else "",
    ).rstrip()
    if form == "safetensors" and stem == "imagenet" and model.encoder.max_pool == "tensorflow":
        load += "\n\n" + _text("pool.md").rstrip()
    if model.channels != 3 or meta.get("value_range"):
        load += _VALUES.format(model.channels, *(meta.get("value_range") or (0, 255)))
    load += _classes(form, classes_of(meta)) if "logits_sup" in outputs else ""
    rows = [
        f"| {name} | {value:.4g} |"
        for name, value in flatten_dict(summary or {}, sep=".").items()
        if isinstance(value, int | float) and not name.startswith("per_class.")
    ]
    results = "\n".join(["As this run measured them:", "", "| | |", "| --- | --- |", *rows])
    shapes = [f"| `{name}` | batch, {', '.join(map(str, shape[1:]))} |" for name, shape in outputs.items()]
    note, source = "", meta.get("source")
    title, tags, kind = f"SimCLR, {network}", _TAGS, _KIND
    if "dataset" in config:
        start = f", given `pretrained={config['pretrained']}`" if config["pretrained"] else ""
        start += f", weights of {_origin(source)}" if source else ""
        origin = f"with simclr-jax, task `{config['task']}`{start}"
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
            note = Template(_text("layer.md")).substitute(layer=config["model"]["supervised_layer"])
        data = "The checkpoint does not tell."
        unlicensed = (
            "The code that trained these weights is under the Apache License 2.0; the checkpoint states none."
        )
    is_short = licence and re.fullmatch(r"[\w.-]+", licence)  # model hubs know licences by short names
    return Template(_text("card.md")).substitute(
        license=licence.lower() if is_short else "other",
        tags=tags,
        title=title,
        kind=kind,
        origin=origin,
        load=load,
        network=f"{network}, {stem} stem" if stem else network,
        size=image_size,
        parameters=", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items()),
        shapes="\n".join(shapes),
        note=note,
        data=data,
        results=results if rows else "Nothing was measured.",
        licence=licence or unlicensed,
        config=json.dumps(config, indent=2),
    )


def _text(file: str) -> str:
    return (Path(__file__).parent / "card_texts" / file).read_text()


def _classes(form, classes):
    text = "\n\n" + (_SEVERAL if "several_labels" in classes else _text("classifier.md").rstrip())
    if "calibration_temperature" in classes:
        text += _CALIBRATED.format(classes["calibration_temperature"])
    if names := classes.get("class_names"):
        place = "`model.class_names()`" if form == "savedmodel" else "The metadata of the file"
        text += f"\n\nThe classes, in the order of the logits, as JSON. {place} has them, too.\n\n"
        text += f"```json\n{json.dumps(names, ensure_ascii=False)}\n```"
    return text


def _origin(source) -> str:
    """Names who published the weights, and in which file."""
    return f"{source['by']}, as in {source['file']} (SHA-256 {source['sha256']})"


def _result_lines(form: str, outputs) -> str:
    """Returns the lines of code that compute the features and, if there is a classifier, its logits."""
    names = {"features": "final_avg_pool", "logits": "logits_sup"}
    names = {variable: name for variable, name in names.items() if name in outputs}
    if form == "savedmodel":
        return "\n".join(f'{variable} = outputs["{name}"]' for variable, name in names.items())
    if form == "onnx":
        outputs = ", ".join(f'"{name}"' for name in names.values())
        return f'[{", ".join(names)}] = session.run([{outputs}], {{"inputs": images}})'
    variable = "logits" if "logits" in names else "features"
    return f"{variable} = model(torch.from_numpy(images).permute(0, 3, 1, 2))"


def _torch_lines(model, network, num_classes: int, image_size: int) -> str:
    """Returns the lines of code that adapt torchvision's ResNet to this network and load the weights."""
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
    if depth < 50 and encoder.project_first:  # SimCLR's groups all begin with a projection
        lines += ["shortcut = torch.nn.Conv2d(64, 64, 1, bias=False), torch.nn.BatchNorm2d(64)"]
        lines += ["model.layer1[0].downsample = torch.nn.Sequential(*shortcut)"]
    if encoder.stem == "cifar" or model.channels != 3:
        kernel = "3, padding=1" if encoder.stem == "cifar" else "7, stride=2, padding=3"
        lines += [f"model.conv1 = torch.nn.Conv2d({model.channels}, 64, {kernel}, bias=False)"]
    if encoder.stem == "cifar":
        lines += ["model.maxpool = torch.nn.Identity()"]
    # TensorFlow pads odd sizes on all sides, as torchvision does.
    elif encoder.max_pool == "tensorflow" and (image_size + 1) // 2 % 2 == 0:
        lines += ["model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)"]
    lines += ['model.load_state_dict(safetensors.torch.load_file("model.safetensors"))', "model.eval()"]
    return "\n".join(line if width == 1 else line.replace("64", str(int(64 * width))) for line in lines)
