"""NVIDIA GPUs of other machines to compile for; this needs jax-cuda13-pjrt, but no driver and no CUDA."""

import importlib.util

import jax
from jax.experimental import topologies

from simclr_jax.plan.topologies import TARGETS
from simclr_jax.process import UserError


def check_compiler(topology: str) -> None:
    """Raises a UserError where the compiler is not installed."""
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
        target_config=(TARGETS / f"{name}.txtpb").read_text(),
    ).devices
