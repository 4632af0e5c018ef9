"""Residual networks as SimCLR trains them (He et al. 2015; stride on the 3x3 convolution).

They equal those of google-research/simclr layer for layer, so that its checkpoints and published figures
carry over: every group opens with a projection shortcut, strided convolutions pad symmetrically whatever the
input size, the max pool pads as TensorFlow's SAME does, and the scale of the last batch norm in a residual
branch starts at zero (Goyal et al. 2017), so that each block starts as its shortcut.

`max_pool`, `project_first` and `bottleneck_width` serve networks from PyTorch, which differ: their max pool
pads on all sides, the first group of torchvision's ResNet-18 and 34 opens with the identity, and its wide
ResNets are wide inside their bottlenecks only.

`sk_ratio` > 0 gives SimCLR v2's networks (Chen et al. 2020b, section 3): selective kernels (Li et al. 2019)
with the ResNet-D stem and shortcut (He et al. 2018).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from simclr_jax import parallel
from simclr_jax.models import on_cpu

_initial = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _conv_init(key, shape, dtype=jnp.float32):
    """Draws the numbers of `_initial` as a matrix: XLA on CPUs compiles four axes ten times as long."""
    return _initial(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def conv(features: int, kernel: int, stride: int = 1, *, use_bias: bool = False, **kwargs) -> nn.Conv:
    """Builds a `kernel` x `kernel` convolution padded by (kernel - 1) // 2 on all four sides.

    At stride 1 that is SAME padding; at stride 2 SAME would pad even sizes at the bottom and right only.
    """
    padding = (kernel - 1) // 2
    return nn.Conv(
        features, (kernel, kernel), stride, padding, use_bias=use_bias, kernel_init=_conv_init, **kwargs
    )


class BatchNorm(nn.Module):
    """Batch norm with float32 statistics and parameters and outputs of `dtype`: [..., c] -> [..., c].

    It equals `nn.BatchNorm`, with which a step takes a tenth to a quarter longer on CPUs: see
    `on_cpu.normalize`.
    """

    train: bool
    axis_name: str | None
    dtype: Any
    use_bias: bool = True
    scale_init: Callable[..., jax.Array] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        per_channel, axes = (x.shape[-1:], jnp.float32), range(x.ndim - 1)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, *per_channel)
        running_variance = self.variable("batch_stats", "var", jnp.ones, *per_channel)
        if self.train:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            moments = jnp.stack([wide.mean(axes), jnp.square(wide).mean(axes)])
            if self.axis_name and not self.is_initializing():
                moments = lax.pmean(moments, self.axis_name)
            mean, variance = moments[0], jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
            if not self.is_initializing():
                for running, new in (running_mean, mean), (running_variance, variance):
                    running.value = 0.9 * running.value + (1 - 0.9) * new
        else:
            mean, variance = running_mean.value, running_variance.value

        scale = self.param("scale", self.scale_init, *per_channel) * lax.rsqrt(variance + 1e-5)
        bias = self.param("bias", nn.initializers.zeros, *per_channel) if self.use_bias else 0.0
        x = on_cpu.normalize(x, mean, scale, bias) if self.train else (x - mean) * scale + bias
        return x.astype(self.dtype)


def batch_norm(*, train: bool, sync: bool, dtype: Any) -> Callable[..., BatchNorm]:
    """Returns a constructor of `BatchNorm`.

    With `sync`, training takes its statistics over the global batch: over every device of the mapped step
    that calls the model (SimCLR section 2.2). Outside such a step, the input is the global batch.
    """
    axis_name = parallel.bound_axis() if sync and train else None
    return partial(BatchNorm, train=train, axis_name=axis_name, dtype=dtype)


class SelectiveKernel(nn.Module):
    """Two convolutions mixed channel by channel with weights from their pooled sum (Li et al. 2019).

    As in SimCLR v2, both are 3x3 and halves of one convolution.
    [b, h, w, c] -> [b, h/stride, w/stride, filters].
    """

    filters: int
    stride: int
    ratio: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(2 * self.filters, 3, self.stride, name="conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        first, second = jnp.split(x, 2, axis=-1)

        pooled = jnp.mean(first + second, axis=(1, 2), keepdims=True)
        pooled = self.conv(max(int(self.filters * self.ratio), 32), 1, name="conv2")(pooled)
        pooled = nn.relu(self.norm(name="bn2")(pooled))
        mixing = self.conv(2 * self.filters, 1, name="conv3")(pooled)
        weights = nn.softmax(jnp.stack(jnp.split(mixing, 2, axis=-1)), axis=0)
        return weights[0] * first + weights[1] * second


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from all pooled channels (Hu et al. 2017). Keeps the shape."""

    reduced: int
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = nn.relu(self.conv(self.reduced, 1, use_bias=True, name="conv1")(gate))
        return x * nn.sigmoid(self.conv(x.shape[-1], 1, use_bias=True, name="conv2")(gate))


class Block(nn.Module):
    """Base of both residual blocks: relu(shortcut(x) + branch(x)).

    [b, h, w, c] -> [b, h/stride, w/stride, expansion * filters]. `project` puts a convolution on the
    shortcut; without it c must be the output's. `inner` is the width inside a bottleneck; None: `filters`.
    """

    filters: int
    stride: int
    project: bool
    sk_ratio: float
    se_ratio: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    inner: int | None = None

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = self.shortcut(x) if self.project else x
        x = self.branch(x)
        if self.se_ratio > 0:
            x = SqueezeExcite(max(1, int(self.filters * self.se_ratio)), self.conv, name="se")(x)
        return nn.relu(x + shortcut)

    def shortcut(self, x):
        stride = self.stride
        if self.sk_ratio > 0:  # ResNet-D: pool, then a convolution that drops no pixel
            if stride > 1:  # zeros beyond the edge count
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
            window = {"window_shape": (2, 2), "strides": (stride, stride)}  # by name, as jax2onnx wants them
            padding = "SAME" if stride == 1 else "VALID"
            x = nn.avg_pool(x, **window, padding=padding, count_include_pad=False)
            stride = 1
        x = self.conv(self.expansion * self.filters, 1, stride, name="conv_shortcut")(x)
        return self.norm(name="bn_shortcut")(x)


class BasicBlock(Block):
    """Two 3x3 convolutions. `sk_ratio` acts on the shortcut only, as in the official TF2 code."""

    def branch(self, x):
        x = self.conv(self.filters, 3, self.stride, name="conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        x = self.conv(self.filters, 3, name="conv2")(x)
        return self.norm(name="bn2", scale_init=nn.initializers.zeros)(x)


class BottleneckBlock(Block):
    """1x1, 3x3 (or selective kernel), 1x1 to four times the filters."""

    expansion = 4

    def branch(self, x):
        inner = self.inner or self.filters
        x = self.conv(inner, 1, name="conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        if self.sk_ratio > 0:
            x = SelectiveKernel(inner, self.stride, self.sk_ratio, self.conv, self.norm, name="sk")(x)
        else:
            x = self.conv(inner, 3, self.stride, name="conv2")(x)
            x = nn.relu(self.norm(name="bn2")(x))
        x = self.conv(4 * self.filters, 1, name="conv3")(x)
        return self.norm(name="bn3", scale_init=nn.initializers.zeros)(x)


class ResNet(nn.Module):
    """The encoder f of SimCLR (section 2.1).

    Attributes:
      block: `BasicBlock` or `BottleneckBlock`.
      stage_sizes: blocks in each group; filters double from one group to the next.
      width: multiplies the 64 filters of the first group.
      sk_ratio, se_ratio: selective kernels, squeeze and excitation; 0 for neither.
      stem: 'imagenet' (strided convolution and pooling), 'cifar' (one 3x3 at full resolution), or
        'auto': 'cifar' up to 32 pixels. Parameters depend on the stem, so initialise at the training size.
      max_pool: 'tensorflow' pads even sizes at the bottom and right only, 'torch' all sizes on all sides.
      project_first: whether the first group opens with a convolution on its shortcut, needed or not.
      bottleneck_width: multiplies the filters inside bottlenecks, on top of `width`.
      sync_batch_norm: see `batch_norm`.
      dtype: type of activations; parameters and statistics are always float32.
      remat: stores the activations between residual blocks only; backpropagation computes the others again.
    """

    block: type[Block]
    stage_sizes: tuple[int, ...]
    width: float = 1
    sk_ratio: float = 0.0
    se_ratio: float = 0.0
    stem: str = "auto"
    max_pool: str = "tensorflow"
    project_first: bool = True
    bottleneck_width: float = 1.0
    sync_batch_norm: bool = True
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, after_block: int = -1
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          images: [b, h, w, c], in [0, 1].
          train: normalise with the batch's statistics and update the moving ones.
          after_block: `train` applies to the block groups behind this one only: 0 leaves the stem in eval
            mode, 1 the first group too, and so on; -1: it applies everywhere.

        Returns:
          Features [b, w] float32, and the activations of every stage [b, h', w', c] in `dtype` under the
          official end point names.
        """
        conv_ = partial(conv, dtype=self.dtype, conv_general_dilated=on_cpu.convolve if train else None)
        norm = batch_norm(train=train and after_block < 0, sync=self.sync_batch_norm, dtype=self.dtype)
        filters = int(64 * self.width)
        stem = self.stem if self.stem != "auto" else "cifar" if max(images.shape[1:3]) <= 32 else "imagenet"
        block = nn.remat(self.block) if self.remat else self.block
        stages = {}

        x = images.astype(self.dtype)
        for index, layer in enumerate(_stem_layers(stem, filters, self.sk_ratio), start=1):
            if index > 1:
                x = nn.relu(norm(name=f"bn{index - 1}")(x))
            x = conv_(*layer, name=f"conv{index}")(x)
        stages["initial_conv"] = x
        x = nn.relu(norm(name=f"bn{index}")(x))
        if stem == "imagenet":
            padding = "SAME" if self.max_pool == "tensorflow" else ((1, 1), (1, 1))
            if train:
                x = on_cpu.max_pool(x, padding)
            else:  # jax2onnx takes these arguments by their names only
                x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=padding)
        stages["initial_max_pool"] = x

        for group, size in enumerate(self.stage_sizes):
            in_training = train and group + 1 > after_block
            norm = batch_norm(train=in_training, sync=self.sync_batch_norm, dtype=self.dtype)
            for index in range(size):
                first = index == 0
                reshapes = group > 0 or self.block.expansion > 1
                x = block(
                    filters=filters * 2**group,
                    stride=2 if first and group > 0 else 1,
                    project=first and (reshapes or self.project_first),
                    sk_ratio=self.sk_ratio,
                    se_ratio=self.se_ratio,
                    conv=conv_,
                    norm=norm,
                    inner=int(filters * 2**group * self.bottleneck_width),
                    name=f"block_group{group + 1}_{index}",
                )(x)
            stages[f"block_group{group + 1}"] = x
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), stages


def _stem_layers(stem: str, filters: int, sk_ratio: float) -> list[tuple[int, int, int]]:
    """Returns (filters, kernel, stride) of each of the stem's convolutions."""
    if stem == "cifar":
        return [(filters, 3, 1)]
    if sk_ratio > 0:  # ResNet-D
        return [(filters // 2, 3, 2), (filters // 2, 3, 1), (filters, 3, 1)]
    return [(filters, 7, 2)]


def make(config, *, dtype, remat: bool = False) -> ResNet:
    """Builds the residual network that `config.model` describes."""
    return RESNETS[config.depth](**{key: config[key] for key in _KEYS}, dtype=dtype, remat=remat)


# Keys of `config.model` that are attributes of `ResNet`.
_KEYS = ("width", "sk_ratio", "se_ratio", "stem", "max_pool")
_KEYS += ("project_first", "bottleneck_width", "sync_batch_norm")


# Networks by depth; 8 is the smallest CIFAR network of He et al. 2015, section 4.2 (6n + 2 layers, n = 1).
RESNETS = {
    8: partial(ResNet, BasicBlock, (1, 1, 1)),
    10: partial(ResNet, BasicBlock, (1, 1, 1, 1)),
    18: partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    34: partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    50: partial(ResNet, BottleneckBlock, (3, 4, 6, 3)),
    101: partial(ResNet, BottleneckBlock, (3, 4, 23, 3)),
    152: partial(ResNet, BottleneckBlock, (3, 8, 36, 3)),
    200: partial(ResNet, BottleneckBlock, (3, 24, 36, 3)),
}
