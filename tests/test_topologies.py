"""Names of topologies, without a compiler."""

import pytest

from simclr_jax.plan import topologies
from simclr_jax.process import UserError
from simclr_jax.profiling.chips import CHIPS, find_chip


@pytest.mark.parametrize(
    ("text", "name", "devices", "hosts"),
    [
        ("v4-256", "v4:4x4x8", 128, 32),  # cloud.google.com/tpu/docs/v4
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v4-512", "v4:4x8x8", 256, 64),
        ("v4-1536", "v4:8x8x12", 768, 192),
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v3-32", "v3:4x4", 32, 4),
        ("v2-8", "v2:2x2", 8, 1),
        ("v5litepod-1", "v5e:1x1", 1, 1),
        ("v5litepod-8", "v5e:2x4", 8, 1),
        ("v6e-256", "v6e:16x16", 256, 64),
        ("V4:4x4x8", "v4:4x4x8", 128, 32),
        ("H100:8", "h100:8", 8, 1),
        ("h200:2x8", "h200:2x8", 16, 2),
        ("RTX 4090:2", "rtx4090:2", 2, 1),
        ("NVIDIA L40S:4", "l40s:4", 4, 1),
    ],
)
def test_names_of_compilers_and_clouds(text, name, devices, hosts):
    assert topologies.read(text) == (name, devices, hosts)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("h10:8", " is unknown: did you mean h100:8?"),
        ("a10:2", " is unknown: did you mean a10g:2?"),
        ("v9:2x2", " is unknown: Known are v2, v3, v4, v5e, v5p, v6e, a100,"),
        ("", " is unknown: "),
        ("v100:8", ": jax's compiler for GPUs, of CUDA 13, has no V100"),
        ("h100", " is no number of GPUs: give as many as a host has, as h100:8"),
        ("h100:", " is no number of GPUs: "),
        ("h100:0", " is no number of GPUs: "),
        ("v4-1538", " is no shape of v4: give chips, as v4:4x4x8, or a slice of Cloud TPU, as v4-128"),
        ("v4:8x8", " is no shape of v4: "),
        ("v5e:4x0", " is no shape of v5e: give chips, as v5e:4x4,"),
        ("v3-1", " is no shape of v3: "),
    ],
)
def test_others_are_refused(text, error):
    with pytest.raises(UserError) as raised:
        topologies.read(text)
    assert str(raised.value).startswith(f"--topology={text}{error}")


@pytest.mark.parametrize("path", sorted(topologies.TARGETS.iterdir()), ids=lambda path: path.stem)
def test_every_gpu_has_its_peaks(path):
    kind = path.read_text().rpartition('device_description_str: "')[2].strip('"\n')
    chip = find_chip(kind)
    assert chip is CHIPS[max((name for name in CHIPS if name in kind), key=len)]
    size = int(path.read_text().partition("device_memory_size: ")[2].split()[0])
    assert chip.memory == pytest.approx(0.75 * size / 2**30, abs=0.06)
