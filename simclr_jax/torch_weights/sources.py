"""The sources of published networks, recognised by names in a file, and how they normalise images."""

import re
from typing import NamedTuple

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision.models documents them


class Source(NamedTuple):
    """A method or library, recognised by `pattern` in a name of its files.

    All of them give their networks RGB in [0, 1], minus `mean`, divided by `std`, and pad max pools as
    PyTorch does; none uses BGR or [0, 255].
    """

    name: str
    pattern: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    classifier: bool = False  # whether `fc` is a classifier, not the end of a projection head


# The first source whose pattern matches is taken. The comments state where its preprocessing is defined.
SOURCES = (
    # github.com/facebookresearch/swav, src/multicropdataset.py: 0.228
    Source("SwAV", r"(^|\.)prototypes\.", std=(0.228, 0.224, 0.225)),
    Source("MoCo v1 or v2", r"(^|\.)encoder_[qk]\."),  # github.com/facebookresearch/moco, main_moco.py
    # github.com/facebookresearch/moco-v3, main_moco.py
    Source("MoCo v3", r"(^|\.)(base|momentum)_encoder\."),
    Source("DINO", r"(^|\.)(student|teacher)\."),  # github.com/facebookresearch/dino, main_dino.py
    # github.com/facebookresearch/vicreg, augmentations.py; .../barlowtwins, main.py; solo-learn has it, too
    Source("VICReg, Barlow Twins or solo-learn", r"(^|\.)(projector|momentum_backbone)\."),
    # docs.lightly.ai, IMAGENET_NORMALIZE
    Source("lightly", r"(^|\.)backbone\.\d|(^|\.)(projection|prediction)_head\."),
    Source("an encoder of another method", r"(^|\.)(backbone|encoder)\."),
    # docs.pytorch.org/vision/stable/models.html; huggingface.co/docs/timm. DINO, VICReg and Barlow Twins also
    # publish encoders alone, which have these names.
    Source("torchvision, timm or others who name it as they do", r"", classifier=True),
)

ANTIALIASED = "a ResNet with antialiasing (BlurPool)"
# timm's antialiased ResNets have the same tensors as plain ones, but other names of files and architectures.
ANTIALIASED_NAMES = r"resnet(aa|blur)\d"

# Networks other than these ResNets, with a pattern of a name in their files.
_UNSUPPORTED = {
    "a Swin Transformer": r"(^|\.)layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$",
    "a network with attention, such as a Vision Transformer": (
        r"(^|\.)(cls_token|pos_embed|patch_embed\.|class_token|conv_proj\.)"
    ),
    "a ConvNeXt": r"(^|\.)stages\.\d+\.(blocks\.)?\d+\.(gamma|dwconv|conv_dw)|\.layer_scale$",
    "an EfficientNet or MobileNet": r"(^|\.)(conv_stem\.|features\.\d+\.(\d+\.)?(block|conv)\.)",
    "a DenseNet": r"denseblock\d",
    "a RegNet": r"(^|\.)(trunk_output|s1\.b1)\.",
    "a ResNet of Hugging Face's transformers, whose names are others: take timm's file of it": (
        r"(^|\.)embedder\.embedder\."
    ),
    ANTIALIASED: r"\.filt$|(^|\.)layer\d\.\d+\.aa\.",
    "a ResNet-D (three convolutions in its stem), as timm's resnet50d": r"(^|\.)conv1\.\d\.weight$",
    "a ResNet with squeeze and excitation": r"(^|\.)layer\d\.\d+\.(se|se_module)\.",
    "a VGG or AlexNet": r"(^|\.)features\.\d+\.weight$",
}


def source_of(names) -> Source:
    """Returns the source of a file with these names."""
    return next(source for source in SOURCES if any(re.search(source.pattern, name) for name in names))


def other_network(names) -> str | None:
    """Returns the kind of network that a file with these names holds, None if none of `_UNSUPPORTED`."""
    kinds = (
        kind for kind, pattern in _UNSUPPORTED.items() if any(re.search(pattern, name) for name in names)
    )
    return next(kinds, None)
