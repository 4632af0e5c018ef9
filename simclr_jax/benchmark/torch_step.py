"""The pretraining step in plain PyTorch, for `benchmark step --peer=torch`: the same network, loss and batch.

It uses the means of PyTorch's users: torchvision's ResNet, channels last, on GPUs compiled and in bfloat16 by
autocast, GradCache (arXiv 2101.06983) where there are microbatches. Its optimiser is SGD with momentum,
since PyTorch has no LARS; SGD passes over the parameters a few times less.
"""

import contextlib
import importlib.util
import time

import numpy as np

from simclr_jax.process import UserError

DEPTHS = (18, 34, 50, 101, 152)  # The ResNets of torchvision.


def median_seconds(step, steps: int) -> float:
    """Returns the median duration of `steps` calls of `step`, after two calls that are not timed."""
    times = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return float(np.median(times[2:]))


def check_torch(config) -> None:
    """Raises a UserError unless PyTorch is installed and has the network of a config of pretraining.

    It has ResNet-18 to 152 at width 1 with the stem for larger images, without selective kernels.
    """
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision")):
        raise UserError("--peer=torch needs PyTorch: pip install torch torchvision")
    model = config.model
    plain = model.encoder == "resnet" and model.width == 1 and not model.sk_ratio and not model.se_ratio
    imagenet = model.stem == "imagenet" or (model.stem == "auto" and config.image_size > 32)
    if not (plain and imagenet and model.depth in DEPTHS and model.projection_layers and not config.remat):
        raise UserError(
            f"--peer=torch has ResNet-{', '.join(map(str, DEPTHS))} of width 1 with ImageNet's stem and "
            "a projection head, without selective kernels, squeeze and excitation or remat: choose "
            "--config=configs/imagenet.py"
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
    check_torch(config)
    import torch
    import torchvision

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # for the loss, as ours has it
    torch.backends.cudnn.benchmark = True
    encoder = getattr(torchvision.models, f"resnet{config.model.depth}")(zero_init_residual=True)
    network = _make_network(torch, encoder, config.model, num_classes)
    network = network.to(device, memory_format=torch.channels_last)
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

    seconds = median_seconds(take_step, steps)
    device = f"1 x {torch.cuda.get_device_name() if on_gpu else 'cpu'}"
    report = {"seconds": seconds, "views": 2 * config.batch_size / seconds, "devices": device}
    if on_gpu:
        report["memory"] = torch.cuda.max_memory_allocated()
    return report


def _make_network(torch, encoder, model, num_classes):
    """Builds encoder, projection head and linear probe: uint8 [b, h, w, 3] -> projections, logits or None."""
    nn = torch.nn
    width = encoder.fc.in_features
    encoder.fc = nn.Identity()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, layers = encoder, []
            for layer in range(model.projection_layers):
                last = layer == model.projection_layers - 1
                outputs = model.projection_dim if last else width
                layers += [nn.Linear(width, outputs, bias=False), nn.BatchNorm1d(outputs)]
                layers += [] if last else [nn.ReLU()]
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
