"""SimCLR's model: an encoder, a projection head and, where there are classes, a linear classifier."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from simclr_jax.models import heads, resnet
from simclr_jax.process import UserError

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What `config.model.encoder` may be. Each is called as (config.model, dtype=..., remat=...) and returns a
# Flax module: (images [b, h, w, 3] in [0, 1], train) -> features [b, w]. Yours goes in before a config
# names it.
ENCODERS: dict[str, Callable[..., nn.Module]] = {"resnet": resnet.make}

# What the networks are that were saved before `config.model` had these keys.
_BEFORE = {
    "encoder": "resnet",
    "max_pool": "tensorflow",
    "project_first": True,
    "bottleneck_width": 1.0,
    "input_mean": None,
    "input_std": None,
}


class SimCLR(nn.Module):
    """Encoder f, projection head g (SimCLR section 2.1), and a classifier on one of g's layers.

    Attributes:
      encoder, projection_head, supervised_head: the parts; no supervised head where there are no classes.
      supervised_layer: what the supervised head reads, an index into `projection_hiddens`: 0 the features,
        1 the projection head's first layer (SimCLR v2 section 3.1), ...
      input_mean, input_std: of red, green and blue in [0, 1], which encoders of others want subtracted and
        divided by; None: pixels stay as they are, as SimCLR has them.
    """

    encoder: nn.Module
    projection_head: nn.Module
    supervised_head: nn.Module | None = None
    supervised_layer: int = 0
    input_mean: tuple[float, ...] | None = None
    input_std: tuple[float, ...] | None = None

    def __call__(
        self, images: jax.Array, train: bool = False, detach_logits: bool = False, after_block: int = -1
    ) -> dict[str, Any]:
        """Applies all parts.

        Args:
          images: [b, h, w, 3], in [0, 1], or uint8 as the input pipeline leaves them. h and w as at
            initialisation where the stem is 'auto'.
          train: batch norm uses the batch's statistics; make `batch_stats` mutable to keep their average.
          detach_logits: no gradient flows from the logits into the encoder or the projection head, which
            makes the supervised head a linear probe of a network that is being pretrained.
          after_block: `train` holds behind this block group only; see `resnet.ResNet`, which alone knows it.

        Returns:
          `features` [b, w], `projection` [b, projection_dim], `projection_hiddens` (list: the features, then
          each projection layer's output), `logits` [b, classes] if there are classes, all float32; and of a
          ResNet `initial_conv`, `initial_max_pool`, `block_group1`, ... [b, h', w', c] in the compute dtype.
        """
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        if self.input_mean is not None:  # before any padding, whose zeros stay zeros
            images = (images - jnp.array(self.input_mean)) / jnp.array(self.input_std)
        encoded = self.encoder(images, train, *(() if after_block < 0 else (after_block,)))
        features, stages = encoded if isinstance(encoded, tuple) else (encoded, {})
        features = features.astype(jnp.float32)
        hiddens = self.projection_head(features, train)
        outputs = {"features": features, "projection": hiddens[-1], "projection_hiddens": hiddens, **stages}
        if self.supervised_head is not None:
            hidden = hiddens[self.supervised_layer]
            hidden = jax.lax.stop_gradient(hidden) if detach_logits else hidden
            outputs["logits"] = self.supervised_head(hidden)
        return outputs


def make_model(config, num_classes: int, *, whole_projection: bool = True, remat: bool = False) -> SimCLR:
    """Builds the model that `config.model` describes.

    Args:
      config: has the attributes encoder, one of `ENCODERS`, depth, width, sk_ratio, se_ratio, stem, max_pool,
        project_first, bottleneck_width, sync_batch_norm (see `resnet.ResNet`), input_mean and input_std (see
        `SimCLR`), projection_layers, projection_dim (see `heads.ProjectionHead`),
        supervised_layer (see `SimCLR`), zero_init_logits, and dtype: 'float32', 'bfloat16', or 'auto', which
        is bfloat16 on TPU and GPU and float32 on CPU. Parameters and statistics are float32 throughout.
      num_classes: width of the supervised head; 0 for none.
      whole_projection: whether to build the projection head as pretraining needs it, or only the layers that
        lead to `supervised_layer`: after pretraining the rest is thrown away.
      remat: see `resnet.ResNet`.

    Raises:
      UserError: a value is out of range.
    """
    config = _complete(config)
    _validate(config)
    dtype = _compute_dtype(config.dtype)
    return SimCLR(
        encoder=ENCODERS[config.encoder](config, dtype=dtype, remat=remat),
        projection_head=heads.ProjectionHead(
            config.projection_layers,
            config.projection_dim,
            None if whole_projection else config.supervised_layer,
            config.sync_batch_norm,
            dtype,
        ),
        supervised_head=(
            heads.supervised_head(num_classes, zero_init=config.zero_init_logits) if num_classes else None
        ),
        supervised_layer=config.supervised_layer,
        input_mean=config.input_mean and tuple(config.input_mean),
        input_std=config.input_std and tuple(config.input_std),
    )


def describe(config) -> str:
    """A network in words, as in 'ResNet-50 1x with selective kernels'."""
    config = _complete(config)
    if config.encoder != "resnet":
        return f"{config.encoder}, depth {config.depth}, width {config.width:g}x"
    parts = [f"ResNet-{config.depth} {config.width:g}x"]
    parts += [f"bottlenecks {config.bottleneck_width:g}x as wide"] if config.bottleneck_width != 1 else []
    parts += ["selective kernels"] if config.sk_ratio else []
    parts += ["squeeze and excitation"] if config.se_ratio else []
    return " with ".join([parts[0], " and ".join(parts[1:])]) if parts[1:] else parts[0]


def _compute_dtype(name: str):
    if name == "auto":
        name = "bfloat16" if jax.default_backend() in ("tpu", "gpu") else "float32"
    return _DTYPES[name]


def _complete(config) -> ConfigDict:
    """`config.model` with the keys that it may have been saved without."""
    return ConfigDict(_BEFORE | (config.to_dict() if isinstance(config, ConfigDict) else vars(config)))


def check_encoder(config) -> None:
    """Raises a UserError unless there is the encoder that `config.model` names."""
    if config.encoder not in ENCODERS:
        raise UserError(
            f"model.encoder={config.encoder!r}: known here are {', '.join(map(repr, ENCODERS))}; one of your "
            "own is added to simclr_jax.models.ENCODERS by a module that is imported before"
        )


def _validate(config) -> None:
    check_encoder(config)
    layers = config.projection_layers
    known = config.encoder != "resnet" or config.depth in resnet.RESNETS
    checks = (
        ("depth", known, f"one of {', '.join(map(str, resnet.RESNETS))}", 50),
        ("width", config.width * 64 >= 2, "a multiplier of 64 filters that leaves at least 2", 1),
        ("sk_ratio", 0 <= config.sk_ratio <= 1, "a ratio from 0 (no selective kernels) to 1", 0.0625),
        ("se_ratio", 0 <= config.se_ratio <= 1, "a ratio from 0 (no squeeze and excitation) to 1", 0.0),
        ("stem", config.stem in ("auto", "cifar", "imagenet"), "auto, cifar or imagenet", "auto"),
        ("max_pool", config.max_pool in ("tensorflow", "torch"), "tensorflow or torch", "torch"),
        ("bottleneck_width", config.bottleneck_width > 0, "a multiplier above 0", 2),
        ("projection_layers", layers >= 0, "0 (none), 1 (linear) or more", 3),
        ("projection_dim", config.projection_dim >= 1, "at least 1", 128),
        ("supervised_layer", 0 <= config.supervised_layer <= layers,
         f"0 (the features) to {layers} (the last of the projection_layers)", 0),
        ("dtype", config.dtype in ("auto", *_DTYPES), f"auto, {' or '.join(_DTYPES)}", "auto"),
    )  # fmt: skip
    for key, valid, expected, example in checks:
        if not valid:
            raise UserError(
                f"model.{key} is {getattr(config, key)!r}, expected {expected}: "
                f"pass for instance --config.model.{key}={example}"
            )
