"""SimCLR's model: an encoder, a projection head and, where there are classes, a linear classifier."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from simclr_jax.config import ranges
from simclr_jax.config.saved import complete_model
from simclr_jax.models import heads, resnet
from simclr_jax.process import UserError

# Encoders by the names that `config.model.encoder` may have. Each is called as
# (config.model, dtype=..., remat=...) and returns a Flax module: (images [b, h, w, c] in [0, 1], train) ->
# features [b, w]. Add an encoder of your own before a config names it.
ENCODERS: dict[str, Callable[..., nn.Module]] = {"resnet": resnet.make}


class SimCLR(nn.Module):
    """Encoder f, projection head g (SimCLR section 2.1), and a classifier on one of g's layers.

    Attributes:
      encoder, projection_head, supervised_head: the parts; no supervised head where there are no classes.
      supervised_layer: index into `projection_hiddens` of the supervised head's input: 0 for the features, 1
        for the projection head's first layer (SimCLR v2 section 3.1), and so on.
      input_mean, input_std: mean and standard deviation of red, green and blue in [0, 1], for pretrained
        encoders that expect normalised pixels; None: pixels stay in [0, 1], as in SimCLR.
      channels: of the images.
    """

    encoder: nn.Module
    projection_head: nn.Module
    supervised_head: nn.Module | None = None
    supervised_layer: int = 0
    input_mean: tuple[float, ...] | None = None
    input_std: tuple[float, ...] | None = None
    channels: int = 3

    def __call__(
        self, images: jax.Array, train: bool = False, detach_logits: bool = False, after_block: int = -1
    ) -> dict[str, Any]:
        """Applies all parts.

        Args:
          images: [b, h, w, channels], floats in [0, 1], or uint8 as the input pipeline leaves them. With the
            stem 'auto', h and w are those of the initialisation.
          train: batch norm uses the batch's statistics; make `batch_stats` mutable to keep their average.
          detach_logits: no gradient flows from the logits into the encoder or the projection head, which
            makes the supervised head a linear probe of a network that is being pretrained.
          after_block: `train` applies to the block groups behind this one only; -1: it applies everywhere.
            Only `resnet.ResNet` takes it.

        Returns:
          `features` [b, w], `projection` [b, projection_dim], `projection_hiddens` (list: the features, then
          each projection layer's output), `logits` [b, classes] if there are classes, all float32; from a
          ResNet also `initial_conv`, `initial_max_pool`, `block_group1` and so on, [b, h', w', c] in the
          compute dtype.
        """
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        if self.input_mean is not None:  # Convolutions pad later, so their zeros are not normalised.
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
      config: has the keys of `model` in configs/base.py, as attributes; those that it lacks have their
        defaults. Parameters and statistics are float32, whatever its `dtype`.
      num_classes: width of the supervised head; 0 for none.
      whole_projection: whether to build all of the projection head, as pretraining needs it, or only the
        layers up to `supervised_layer`, as later tasks do.
      remat: see `resnet.ResNet`.

    Raises:
      UserError: a value is out of range.
    """
    config = complete_model(config)
    check_config(config)
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
        channels=config.channels,
    )


def make_init(model: SimCLR, image_size: int) -> Callable[[jax.Array], dict[str, Any]]:
    """Builds a compiled function that initialises a model: key -> {'params', 'batch_stats'}."""

    def init(key):
        return {"batch_stats": {}} | model.init(
            key, jnp.zeros((1, image_size, image_size, model.channels)), train=False
        )

    return jax.jit(init)


def check_config(config) -> None:
    """Raises a UserError unless a complete `config.model` describes a model that can be built."""
    ranges.check_registered("model.encoder", config.encoder, ENCODERS, "models.ENCODERS")
    for key, value in config.items():
        ranges.check(f"model.{key}", value)
    if config.encoder == "resnet":
        ranges.check_choice("model.depth", config.depth, resnet.RESNETS, "--config.model.depth=50")
    layers, layer = config.projection_layers, config.supervised_layer
    if layer > layers:
        raise UserError(
            f"model.supervised_layer={layer}, but there are {layers} projection layers: set "
            f"--config.model.supervised_layer to 0 (the features) to {layers}, or raise "
            "--config.model.projection_layers"
        )
    mean, std = config.input_mean, config.input_std
    if (mean or std) and not (len(mean or ()) == len(std or ()) == 3 and min(std) > 0):
        raise UserError(
            f"model.input_mean={mean} with model.input_std={std}: expected three numbers each, std above 0, "
            "or None for both, as in --config.model.input_mean=0.485,0.456,0.406 "
            "--config.model.input_std=0.229,0.224,0.225"
        )


def describe(config) -> str:
    """Names a network, as in 'ResNet-50 1x with selective kernels'."""
    config = complete_model(config)
    if config.encoder != "resnet":
        return f"{config.encoder}, depth {config.depth}, width {config.width:g}x"
    name = f"ResNet-{config.depth} {config.width:g}x"
    wide = f"bottlenecks {config.bottleneck_width:g}x as wide" if config.bottleneck_width != 1 else ""
    kernels = "selective kernels" if config.sk_ratio else ""
    squeeze = "squeeze and excitation" if config.se_ratio else ""
    parts = " and ".join(filter(None, (wide, kernels, squeeze)))
    return f"{name} with {parts}" if parts else name


def _compute_dtype(name: str):
    if name == "auto":
        name = "bfloat16" if jax.default_backend() in ("tpu", "gpu") else "float32"
    return getattr(jnp, name)
