"""The machine around a process: its cores, the kind of its CPU, and an accelerator that jax does not use."""

import hashlib
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import jax

from simclr_jax.process.console import say_once

_KEPT_DAYS = 90  # of a compiled program in the user's cache


def count_cores() -> int:
    """Returns how many cores this process may keep busy, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([cores, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Yields the cores that the control groups around this process grant, of version 1 and 2."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            files = (
                ("cpu/{}/cpu.cfs_quota_us", "cpu/{}/cpu.cfs_period_us") if controllers else ("{}/cpu.max",)
            )
            for folder in (Path(group), *Path(group).parents):  # inside a container its own group is the root
                with suppress(OSError, ValueError):  # there is no such group here, or its quota is 'max'
                    texts = [Path(f"/sys/fs/cgroup/{file.format(folder)}").read_text() for file in files]
                    quota, period = map(int, " ".join(texts).split())
                    if quota > 0:
                        yield quota / period


# XLA would start a thread for each core of the affinity, whatever the quota.
os.environ.setdefault("PJRT_NPROC", str(count_cores()))


def use_cores(rows: int) -> None:
    """Makes the CPU several devices: the largest number, up to its cores, that divides `rows` of a batch.

    XLA leaves the cores of one device idle for a part of each step. A number of devices that the user has
    chosen stays, and so does that of a program that has used jax before, or of several processes. It does
    nothing to GPUs and TPUs.
    """
    chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.config.jax_num_cpu_devices >= 0 or jax.distributed.is_initialized():
        return
    with suppress(RuntimeError):  # jax has its devices already.
        devices = max(n for n in range(1, count_cores() + 1) if max(rows, 1) % n == 0)
        jax.config.update("jax_num_cpu_devices", devices)


def cpu_kind() -> str:
    """Returns a digest of what the CPU is and can do, since programs compiled for it may fail on another."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else platform.processor()
    kinds = set(re.findall(r"(?m)^(?:flags|Features|model name|CPU part).*", cpuinfo)) or {cpuinfo}
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]


def folder_of_programs(workdir) -> str:
    """Returns the folder that keeps compiled programs for later runs on such a CPU.

    The user's cache serves runs in every workdir; programs that were compiled `_KEPT_DAYS` ago are removed
    from it. Several processes, and the machines of a remote workdir, may not share such a cache: for them,
    and where the cache cannot be written, it is WORKDIR/compiled.
    """
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = Path(cache, "simclr_jax", "compiled", cpu_kind())
    if "://" not in str(workdir) and not jax.distributed.is_initialized():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            for program in folder.iterdir():
                with suppress(OSError):  # It is a folder, another user's, or another run has removed it.
                    if program.stat().st_mtime < time.time() - _KEPT_DAYS * 86400:
                        program.unlink()
            if os.access(folder, os.W_OK):
                return str(folder)
    return f"{workdir}/compiled/{cpu_kind()}"


def note_unused_accelerator() -> None:
    """Prints a note where an NVIDIA GPU or a TPU is there, but jax has only CPUs, which nobody chose."""
    if jax.config.jax_platforms or jax.default_backend() != "cpu":
        return
    from jax._src import hardware_utils  # jax has no public name for it

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    gpu = not hidden and hardware_utils.has_visible_nvidia_gpu()
    if gpu or hardware_utils.num_available_tpu_chips_and_device_id()[0]:
        kind, extra = ("an NVIDIA GPU", "cuda13") if gpu else ("a TPU", "tpu")
        driver = ", or cuda12 where nvidia-smi shows a driver before 580" if gpu else ""
        say_once(
            f"note: {kind} is not used, jax has only CPUs: pip install 'jax[{extra}]=={jax.__version__}'"
            f"{driver}; python -c 'import jax; jax.devices()' prints jax's own reason, and JAX_PLATFORMS=cpu "
            "chooses CPUs"
        )
