"""Names of topologies, as jax's compilers and Cloud TPU have them, told apart without a compiler."""

import difflib
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

from simclr_jax.process import UserError

# A file for each GPU, NAME.txtpb, with the properties that the compiler needs
# (stream_executor.GpuTargetConfigProto). Figures: openxla/xla, xla/backends/gpu/target_config/specs/
# {a100_sxm_80,h100_sxm,h200,b200}.txtpb; of the other GPUs NVIDIA's data sheets, and deviceQuery for their
# memory. Without device_memory_size the compiler recomputes all it can, without
# shared_memory_per_block_optin nothing compiles.
TARGETS = Path(__file__).parent / "gpu_targets"
# TPU -> dimensions of its shapes, what Cloud TPU's names count for each chip, devices of a chip.
_TPUS = {"v2": (2, 2, 2), "v3": (2, 2, 2), "v4": (3, 2, 1), "v5e": (2, 1, 1), "v5p": (3, 2, 1)}
_TPUS["v6e"] = _TPUS["v5e"]
_OTHER_NAMES = {"v5litepod": "v5e", "4090": "rtx4090", "5090": "rtx5090"}


class Topology(NamedTuple):
    """Devices that need not be here.

    Attributes:
      name: as compilers take it, 'v4:4x4x8', or GPUs of a host and hosts before it, 'h200:2x8'.
      devices, hosts: their numbers.
    """

    name: str
    devices: int
    hosts: int


def is_gpu(name: str) -> bool:
    """Returns whether a topology is one of GPUs."""
    return (TARGETS / f"{name.partition(':')[0]}.txtpb").exists()


def read(text: str) -> Topology:
    """Reads a topology: chips as v4:4x4x8, a slice of Cloud TPU as v4-256, GPUs as h100:8 or H200:2x8.

    Raises:
      UserError: there is none of this name.
    """
    kind, mark, shape = re.fullmatch(r"(.*?)(?:([:-])([\dx]*))?", text.strip().lower(), re.DOTALL).groups()
    kind = re.sub(r"nvidia|geforce|[\s_-]", "", kind)
    kind = _OTHER_NAMES.get(kind, kind)
    if kind == "v100":
        raise UserError(f"--topology={text}: jax's compiler for GPUs, of CUDA 13, has no V100: give a100:8")
    if is_gpu(kind):
        if mark != ":" or not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
            raise UserError(
                f"--topology={text} is no number of GPUs: give as many as a host has, as {kind}:8, or hosts "
                f"before it, as {kind}:2x8"
            )
        hosts, _, gpus = shape.rpartition("x")
        return Topology(f"{kind}:{shape}", int(hosts or 1) * int(gpus), int(hosts or 1))
    if kind not in _TPUS:
        names = [*_TPUS, *sorted(path.stem for path in TARGETS.iterdir())]
        near = difflib.get_close_matches(kind, names, n=1)
        hint = f"did you mean {near[0]}{mark or ':'}{shape or 8}? " if near else ""
        raise UserError(
            f"--topology={text} is unknown: {hint}Known are {', '.join(names)}, as v4:4x4x8 (chips), v4-256 "
            "(a slice of Cloud TPU), h100:8 (GPUs) or h200:2x8 (hosts and GPUs), and local"
        )
    dimensions, counted, devices = _TPUS[kind]
    if mark == "-" and shape.isdecimal():
        shape = _shape_of_slice(int(shape) // counted, dimensions)
    sides = [int(side) for side in (shape or "").split("x") if side.isdecimal()]
    if len(sides) != dimensions or shape != "x".join(map(str, sides)) or 0 in sides:
        example = f"{kind}:{'x'.join('448'[:dimensions])}, or a slice of Cloud TPU, as {kind}-{64 * counted}"
        raise UserError(f"--topology={text} is no shape of {kind}: give chips, as {example}")
    chips = math.prod(sides)
    hosts = 1 if chips <= (8 if counted == 1 else 4) else chips // 4
    return Topology(f"{kind}:{shape}", chips * devices, hosts)


def _shape_of_slice(chips, dimensions):
    """Returns the shape that Cloud TPU gives so many chips, the most even one; '' where there is none."""
    shapes = itertools.combinations_with_replacement([1, 2, *range(4, 65, 4)], dimensions)
    sides = min((shape for shape in shapes if math.prod(shape) == chips), key=sum, default=())
    return "x".join(map(str, sides[::-1] if 1 in sides else sides))
