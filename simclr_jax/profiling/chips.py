"""The peaks of accelerators, from the data of their vendors."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A device as jax counts them: a chip, except that a TPU v3 chip has two devices."""

    memory: float  # GiB that a program may use: on NVIDIA's, jax takes three quarters by default
    flops: float  # bfloat16, dense, 1e12 a second
    bandwidth: float  # bandwidth of the memory, GB/s
    link: float  # GB/s over all links to other devices, in one direction
    slowness: float  # seconds of a ResNet-50's step over those of its FLOPs plus its traffic at the peaks


# The keys are parts of jax's `device_kind`. Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, and for v3
# Norrie et al. 2021 (doi 10.1109/MM.2021.3058217); NVIDIA's data sheets of A100 80 GB, H100, H200, all SXM,
# B200 (HGX), L4, L40S, A10G, RTX 4090 and 5090, dense, with sums in float32; the link of those without NVLink
# is PCIe. Slowness of v3, v4, A100 and H100: published and measured steps of docs/planning.md; the others
# have that of their relatives.
CHIPS = {
    "TPU v3": Chip(16, 61.5, 450, 164, 1.5),
    "TPU v4": Chip(32, 275, 1228, 300, 1.5),
    "TPU v5 lite": Chip(16, 197, 819, 200, 1.5),
    "TPU v5": Chip(95, 459, 2765, 600, 1.5),
    "TPU v6 lite": Chip(32, 918, 1638, 400, 1.5),
    "A100": Chip(59.4, 312, 2039, 300, 2.5),
    "H100": Chip(59.3, 989, 3350, 450, 2.5),
    "H200": Chip(105.7, 989, 4800, 450, 2.5),
    "B200": Chip(133.8, 2250, 7672, 900, 2.5),
    "L4": Chip(16.5, 121, 300, 32, 2.5),
    "L40S": Chip(33.3, 362, 864, 32, 2.5),
    "A10G": Chip(16.6, 70, 600, 32, 2.5),
    "RTX 4090": Chip(17.7, 165, 1008, 32, 2.5),
    "RTX 5090": Chip(23.5, 209, 1792, 64, 2.5),
}


def find_chip(kind: str) -> Chip | None:
    """Returns the chip that jax calls `kind`, as 'TPU v5 lite' or 'NVIDIA H100 80GB HBM3', or None."""
    names = sorted((name for name in CHIPS if name in kind), key=len)
    return CHIPS[names[-1]] if names else None
