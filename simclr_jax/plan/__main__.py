"""Plans what pretraining costs, before it runs: `python -m simclr_jax.plan --config=FILE --topology=v4:4x4x8`

Compiles the train step of `simclr_jax.train`, ahead of time, for a topology such as v4:4x4x8, on any Linux
machine, without a TPU, and prints what it needs of each device. This takes the compiler of jax[tpu], libtpu;
for GPUs such as a100:1, h100:8 or h200:2x8 (two hosts) that of jax-cuda13-pjrt, no driver and no CUDA.
`--topology=local` plans for the devices of this machine. Several topologies, by commas, give a table.
`--compare` adds the forms of the step that need less memory. Exits with 1 where a step does not fit.
"""

import functools
import itertools
import math
import sys

from absl import flags
from ml_collections import ConfigDict

from simclr_jax import benchmark
from simclr_jax.config import command_line
from simclr_jax.plan import cost
from simclr_jax.plan.forecast import describe, forecast, gib, remedy
from simclr_jax.process import UserError, say
from simclr_jax.profiling.chips import find_chip
from simclr_jax.workdir import report

_TOPOLOGY = flags.DEFINE_string(
    "topology", "local", "As v4:4x4x8 or h100:8; several by commas; 'local': these devices."
)
_COMPARE = flags.DEFINE_boolean("compare", False, "Compares the plain step, remat and microbatches.")
_HEAD = ["", "devices", "images a device", "memory, GiB", "TFLOPs"]
_HEAD += ["least ms a step", "expected", "hours", "images/s a host", "cores"]


def _plan_one(config, topology, images_per_core) -> bool:
    """Prints a plan; returns whether the step fits."""
    plan = cost.measure_in_process(config, topology)
    report.print_table(describe(plan, config, images_per_core))
    change = remedy(plan, config)
    print(f"does not fit: {change}" if change else "fits" if find_chip(plan["kind"]) else "compiles")
    return change is None


def _plan_table(cases, images_per_core) -> bool:
    """Prints a row of a Markdown table for every (name, config, topology); returns whether all fit."""
    fits = []

    def row(name, config, topology):
        try:
            plan = cost.measure_in_process(config, topology)
        except UserError as error:
            fits.append(False)
            return [name, str(error)]
        chip, expected = find_chip(plan["kind"]), forecast(plan, config)
        fits.append(remedy(plan, config) is None)
        memory = f"{gib(plan):.1f} of {chip.memory if chip else '?'}"
        cells = [name, f"{plan['devices']} x {plan['kind']}", str(config.batch_size // plan["devices"])]
        cells += [memory if fits[-1] else f"**{memory}**", f"{plan['flops'] / 1e12:.2f}"]
        if expected:
            cells += [f"{expected[key] * 1e3:.1f}" for key in ("least", "step")]
            cells += [f"{expected['hours']:.2f}", f"{expected['images']:,.0f}"]
            on_device = "images" in plan["memory"]
            cells += ["0" if on_device else f"{math.ceil(expected['images'] / images_per_core()):,}"]
        return cells

    for line in benchmark.table(_HEAD, itertools.starmap(row, cases)):
        say(line)
    return all(fits)


def _forms(config):
    """Yields the plain step and its two forms that need less memory, as (name, config)."""
    parts = config.microbatches if config.microbatches > 1 else 8
    for name, change in {
        "plain": {"microbatches": 1, "remat": False},
        "remat": {"microbatches": 1, "remat": True},
        f"{parts} microbatches": {"microbatches": parts, "remat": False},
    }.items():
        variant = ConfigDict(config)
        variant.update(change)
        yield name, variant


def plan(_) -> None:
    config = command_line.read_config()
    cost.check_pretraining(config, "plans are")
    images_per_core = functools.cache(lambda: benchmark.input_rate(config, seconds=5))
    topologies = _TOPOLOGY.value.split(",")
    forms = list(_forms(config)) if _COMPARE.value else [("", config)]
    if len(topologies) * len(forms) == 1:
        fits = _plan_one(config, topologies[0], images_per_core)
    else:
        cases = [
            (f"{config.dataset.name} {topology} {name}".strip(), form, topology)
            for topology in topologies
            for name, form in forms
        ]
        fits = _plan_table(cases, images_per_core)
    sys.exit(not fits)


if __name__ == "__main__":
    command_line.run(plan)
