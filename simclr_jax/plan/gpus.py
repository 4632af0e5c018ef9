"""NVIDIA GPUs of other machines to compile for; this needs jax-cuda13-pjrt, but no driver and no CUDA."""

import importlib.util
import re
from pathlib import Path

import jax
from jax.experimental import topologies

from simclr_jax.process import UserError

# A file for each GPU, NAME.txtpb, with the properties that the compiler needs
# (stream_executor.GpuTargetConfigProto). Figures: openxla/xla,
# xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,h200}.txtpb. Without device_memory_size the
# compiler recomputes all it can, without shared_memory_per_block_optin nothing compiles.
_TARGETS = Path(__file__).parent / "gpu_targets"


def is_gpu_topology(topology: str) -> bool:
    """Returns whether a topology is one of GPUs, as 'h100:8' or 'h200:2x8'."""
    return (_TARGETS / f"{topology.partition(':')[0]}.txtpb").exists()


def check_compiler(topology: str) -> None:
    """Raises a UserError where the topology is malformed or the compiler is not installed."""
    if not re.fullmatch(r"\w+:([1-9]\d*x)?[1-9]\d*", topology):
        raise UserError(
            f"--topology={topology} is no number of GPUs: give as many as a host has, as h100:8, or hosts "
            "before it, as h200:2x8"
        )
    plugins = importlib.util.find_spec("jax_plugins")
    if not (plugins and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (13, 12))):
        package = f"jax-cuda13-pjrt=={jax.__version__}"
        raise UserError(f"--topology={topology} needs the compiler for GPUs: pip install --no-deps {package}")


def devices(topology: str):
    """Returns the GPUs of a topology, to compile for; `device_kind` is the one on the machine itself."""
    name, _, shape = topology.partition(":")
    hosts, _, gpus_per_host = shape.rpartition("x")
    return topologies.get_topology_desc(
        platform="cuda",
        topology=f"1x{hosts or 1}x{gpus_per_host}",
        target_config=(_TARGETS / f"{name}.txtpb").read_text(),
    ).devices
