"""NVIDIA GPUs of other machines to compile for; this needs jax-cuda13-pjrt, but no driver and no CUDA."""

import importlib.util
import re

import jax
from jax.experimental import topologies

from simclr_jax.process import UserError

# The properties of a GPU that the compiler needs (stream_executor.GpuTargetConfigProto). Figures:
# openxla/xla, xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,h200}.txtpb.
# Without device_memory_size the compiler recomputes all it can, without shared_memory_per_block_optin nothing
# compiles.
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_HOPPER = {
    "shared": 233472,
    "cores": 132,
    "fpus": 128,
    "l2": 52428800,
    "clock": 1.98,
    "optin": 232448,
    "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
}
_GPUS = {
    "a100": {
        "shared": 167936,
        "cores": 108,
        "fpus": 64,
        "l2": 41943040,
        "clock": 1.41,
        "optin": 166912,
        "capability": "major: 8",
        "bandwidth": 2039040000000,
        "memory": 85100068864,
        "name": "NVIDIA A100-SXM4-80GB",
    },
    "h100": _HOPPER | {"bandwidth": 3352320000000, "memory": 84942979072, "name": "NVIDIA H100 80GB HBM3"},
    "h200": _HOPPER | {"bandwidth": 4800000000000, "memory": 151397597184, "name": "NVIDIA H200 141GB HBM3e"},
}


def is_gpu_topology(topology: str) -> bool:
    """Returns whether a topology is one of GPUs, as 'h100:8' or 'h200:2x8'."""
    return topology.partition(":")[0] in _GPUS


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
        target_config=_CONFIG.format(**_GPUS[name]),
    ).devices
