"""The pretraining step in plain PyTorch, for `benchmark step --peer=torch`: the same network, loss and batch.

It uses the means of PyTorch's users: `torch.nn`, channels last, on GPUs compiled and in bfloat16 by autocast,
GradCache (arXiv 2101.06983) where there are microbatches. Its optimiser is SGD with momentum, since PyTorch
has no LARS; SGD passes over the parameters a few times less.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from simclr_jax.models import resnet
from simclr_jax.process import UserError


def measure(config, step, steps: int, devices: str) -> dict[str, Any]:
    """Returns the median 'seconds' of `steps` calls of `step`, after two that are not timed, and 'views'."""
    times = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    seconds = float(np.median(times[2:]))
    return {"seconds": seconds, "views": 2 * config.batch_size / seconds, "devices": devices}


def check_torch(config) -> None:
    """Raises a UserError unless PyTorch is installed and has the network of a config of pretraining.

    It has ResNets of every depth and width with both stems, without selective kernels.
    """
    if not importlib.util.find_spec("torch"):
        raise UserError("--peer=torch needs PyTorch: pip install torch")
    model = config.model
    plain = model.encoder == "resnet" and not model.sk_ratio and not model.se_ratio
    plain = plain and config.loss == "nt_xent" and not config.memory.size
    if not (plain and model.projection_layers and not config.remat):
        raise UserError(
            "--peer=torch has ResNets with a projection head and NT-Xent, without selective kernels, squeeze "
            "and excitation, memory or remat: choose --config=configs/imagenet.py"
        )


def torch_step_rate(config, num_classes: int, steps: int = 10) -> dict[str, float]:
    """Runs the pretraining step in PyTorch on random images, on one device.

    Args:
      config: a config of pretraining.
      num_classes: classes of the linear probe that learns beside it; 0 for none.
      steps: timed, after two that are not.

    Returns:
      'seconds' of a step, the median; 'views' per second; 'devices', in words; on a GPU peak 'memory' in
      bytes.

    Raises:
      UserError: see `check_torch`.
    """
    take_step, device = make_step(config, num_classes)
    import torch

    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report = measure(config, take_step, steps, f"1 x {device_name}")
    if device.type == "cuda":
        report["memory"] = torch.cuda.max_memory_allocated()
    return report


def make_step(config, num_classes: int) -> tuple[Callable[[], None], Any]:
    """Builds a function that takes one step in PyTorch, and its torch.device; see `torch_step_rate`."""
    check_torch(config)
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # for the loss, as ours has it
    torch.backends.cudnn.benchmark = True
    network = make_network(config, num_classes).to(device, memory_format=torch.channels_last)
    encode = torch.compile(network) if on_gpu else network  # compiling takes minutes on CPUs
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def autocast():
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()

    def loss_of(projections, logits, labels):
        loss = _nt_xent(torch, *projections.float().chunk(2), config.temperature)
        if logits is not None:
            loss = loss + torch.nn.functional.cross_entropy(logits.float(), labels.repeat(2))
        return loss

    def whole(view1, view2, labels):
        with autocast():
            projections, logits = encode(torch.cat([view1, view2]))
        loss_of(projections, logits, labels).backward()

    def in_parts(view1, view2, labels):
        parts = list(zip(*(rows.chunk(config.microbatches) for rows in (view1, view2, labels))))
        with torch.no_grad(), autocast():
            projections = [encode(torch.cat(part[:2]))[0].float().chunk(2) for part in parts]
        projections = torch.cat([torch.cat(view) for view in zip(*projections)]).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(projections, None, None), projections)
        gradients = (view.chunk(config.microbatches) for view in gradient.chunk(2))
        for part, gradient1, gradient2 in zip(parts, *gradients):
            with autocast():
                projection, logits = encode(torch.cat(part[:2]))
            surrogate = (projection.float() * torch.cat([gradient1, gradient2])).sum()
            if logits is not None:
                probe = torch.nn.functional.cross_entropy(logits.float(), part[2].repeat(2))
                surrogate = surrogate + probe / config.microbatches
            surrogate.backward()

    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    views = [torch.from_numpy(rng.integers(0, 256, shape, np.uint8)).to(device) for _ in range(2)]
    labels = torch.zeros(config.batch_size, dtype=torch.long, device=device)

    def take_step():
        optimizer.zero_grad(set_to_none=True)
        (in_parts if config.microbatches > 1 else whole)(*views, labels)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()  # waits for the step

    return take_step, device


def make_network(config, num_classes: int):
    """Builds encoder, projection head and linear probe: uint8 [b, h, w, 3] -> projections, logits or None."""
    from torch import nn

    model = config.model
    network = resnet.make(model, dtype=None)
    filters, expansion = int(64 * model.width), network.block.expansion
    small_stem = model.stem == "cifar" or (model.stem == "auto" and config.image_size <= 32)

    def normed(*sizes, stride=1):
        """Builds convolution and batch norm of (channels, filters, kernel)."""
        conv = nn.Conv2d(*sizes, stride, sizes[-1] // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(sizes[1]))

    class Block(nn.Module):
        def __init__(self, channels, filters, stride, project):
            super().__init__()
            outputs, inner = expansion * filters, int(filters * model.bottleneck_width)
            if expansion == 1:
                layers = [normed(channels, filters, 3, stride=stride), normed(filters, filters, 3)]
            else:
                layers = [normed(channels, inner, 1), normed(inner, inner, 3, stride=stride)]
                layers.append(normed(inner, outputs, 1))
            nn.init.zeros_(layers[-1][1].weight)
            self.branch = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU(True))))[:-1]
            self.shortcut = normed(channels, outputs, 1, stride=stride) if project else nn.Identity()

        def forward(self, x):
            return (self.branch(x) + self.shortcut(x)).relu_()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            stem = [normed(3, filters, 3)] if small_stem else [normed(3, filters, 7, stride=2)]
            stem += [nn.ReLU(True)] if small_stem else [nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
            width, blocks = filters, []
            for group, size in enumerate(network.stage_sizes):
                for index in range(size):
                    outputs, stride = filters * 2**group, 2 if group and not index else 1
                    project = not index and (group > 0 or expansion > 1 or model.project_first)
                    blocks.append(Block(width, outputs, stride, project))
                    width = expansion * outputs
            pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            self.encoder, layers = nn.Sequential(*stem, *blocks, *pool), []
            for layer in range(model.projection_layers):
                last = layer == model.projection_layers - 1
                outputs = model.projection_dim if last else width
                layers += [nn.Linear(width, outputs, bias=False), nn.BatchNorm1d(outputs)]
                layers += [] if last else [nn.ReLU()]
            layers[-1].bias.requires_grad_(False)  # 0, since ours has none
            self.head = nn.Sequential(*layers)
            self.probe = nn.Linear(width, num_classes) if num_classes else None

        def forward(self, images):
            features = self.encoder(images.permute(0, 3, 1, 2).float() / 255)
            logits = self.probe(features.detach()) if self.probe else None
            return self.head(features), logits

    return Network()


def _nt_xent(torch, view1, view2, temperature):
    """Computes the loss of `losses.nt_xent`, with all similarities at once."""
    functional = torch.nn.functional
    view1, view2 = functional.normalize(view1, dim=1), functional.normalize(view2, dim=1)
    diagonal = torch.eye(len(view1), dtype=torch.bool, device=view1.device)
    labels = torch.arange(len(view1), device=view1.device)
    across = view1 @ view2.T / temperature
    within = [(view @ view.T / temperature).masked_fill(diagonal, float("-inf")) for view in (view1, view2)]
    loss = functional.cross_entropy(torch.cat([across, within[0]], dim=1), labels)
    return loss + functional.cross_entropy(torch.cat([across.T, within[1]], dim=1), labels)
