"""What pretraining will cost, before it runs: `python -m simclr_jax.plan --config=FILE --topology=v4:4x4x8`

Compiles the train step of `simclr_jax.train`, ahead of time, for a TPU topology such as v4:4x4x8, on any
Linux machine, without a TPU, and prints what it needs of each device. Needs the compiler of jax[tpu], libtpu.
`--topology=local` does it for the devices at hand. Several topologies, separated by commas, give a table.
`--compare` sets the step beside its forms that need less memory. Exits with 1 where a step does not fit.
"""

import functools
import importlib.util
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from absl import flags
from ml_collections import ConfigDict

from simclr_jax import benchmark, command_line, main
from simclr_jax.cost import GIB, find_chip, measure, roofline
from simclr_jax.errors import UserError

_TOPOLOGY = flags.DEFINE_string(
    "topology", "local", "As v4:4x4x8; several by commas; 'local': these devices."
)
_COMPARE = flags.DEFINE_boolean("compare", False, "Compares the plain step, remat and microbatches.")


def remedy(plan: dict, config) -> str | None:
    """What to change where the step does not fit; None where it does."""
    chip = find_chip(plan["kind"])
    used = gib(plan)
    if "refused" not in plan["memory"] and (chip is None or used <= chip.memory):
        return None
    rows = config.batch_size // plan["devices"] // config.microbatches
    weights = 3 * 4 * plan["parameters"] / GIB  # parameters, their momentum and gradients
    views = 2 * 3 * config.image_size**2 * config.batch_size / plan["devices"] / GIB
    held = weights + 2 * views  # microbatches are cut from a second copy, in another layout
    free = 0.8 * ((chip.memory if chip else 0) - held)
    if free <= 0:
        return (
            f"parameters, momentum and gradients take {weights:.1f} GiB, and two copies of the views "
            f"{2 * views:.1f}: lower --config.model.width or --config.batch_size, or take more devices"
        )
    parts = 2
    while (used - held) / parts > free:
        parts *= 2
    options = [] if rows % parts else [f"set --config.microbatches={config.microbatches * parts}"]
    options += [] if config.remat else ["set --config.remat=True"]
    return ", ".join([*options, "lower --config.batch_size, or take more devices"])


def gib(plan: dict) -> float:
    """What a step takes of a device's memory."""
    return sum(plan["memory"].values()) / GIB


def forecast(plan: dict, config) -> dict[str, float]:
    """At the chip's peaks: 'step' in seconds, 'hours' of the run, 'images' a second and host; or nothing."""
    seconds = roofline(plan)
    if not seconds:
        return {}
    step = max(seconds.values())
    images = config.batch_size / step / plan["hosts"]
    return {"step": step, "hours": plan["num_steps"] * step / 3600, "images": images}


def describe(plan: dict, config, images_per_core) -> dict[str, str]:
    """A plan, for a person; `images_per_core` is asked for this machine's input rate where that matters."""
    chip, memory = find_chip(plan["kind"]), plan["memory"]
    rows = config.batch_size // plan["devices"]
    forms = f", in {config.microbatches} microbatches" if config.microbatches > 1 else ""
    available = f" of {chip.memory:g}" if chip else ""
    parts = ", ".join(f"{size / GIB:.2f} {name}" for name, size in memory.items())
    lines = {
        "task": f"pretraining on {config.dataset.name}, {config.image_size} pixels",
        "model": f"ResNet-{config.model.depth}, width {config.model.width:g}x",
        "parameters": f"{plan['parameters']:,}",
        "devices": f"{plan['devices']} x {plan['kind']}, {plan['hosts']} host(s)",
        "batch": f"{config.batch_size} images, {rows} a device{forms}{', remat' if config.remat else ''}",
        "memory": f"{gib(plan):.2f}{available} GiB a device: {parts}",
        "FLOPs": f"{plan['flops'] / 1e9:,.1f} G a step and device, convolutions and products",
    }
    if "bytes" in plan:
        lines["traffic"] = f"{plan['bytes'] / 1e9:,.2f} GB of memory a step and device, as XLA estimates"
    lines["collectives"] = ", ".join(
        f"{times:,} {name} of {size / 1e6:,.2f} MB" for name, (times, size) in plan["collectives"].items()
    )
    peak = forecast(plan, config)
    if peak:
        bounds = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in roofline(plan).items())
        lines["step"] = f"{peak['step'] * 1e3:.2f} ms at the chip's peaks ({bounds}): no step is faster"
        lines["run"] = f"{plan['num_steps']:,} steps, {peak['hours']:.1f} hours at least"
        lines["input"] = (
            f"{peak['images']:,.0f} images/s a host then: {math.ceil(peak['images'] / images_per_core()):,} "
            f"cores like this machine's, at {images_per_core():,.0f} a core"
        )
    return lines


def compile_apart(config, topology: str) -> dict:
    """`measure` in a process of its own, since the TPU compiler can crash its process."""
    if (
        topology != "local"
        and "TPU_LIBRARY_PATH" not in os.environ
        and not importlib.util.find_spec("libtpu")
    ):
        raise UserError(f"--topology={topology} needs the TPU compiler: pip install 'jax[tpu]'")
    quiet = _hush if topology != "local" else None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=quiet) as pool:
        try:
            return pool.submit(measure, config, topology).result()
        except BrokenProcessPool:
            raise UserError(
                f"the compiler crashed on this step for {topology}: try another topology, or another "
                "--config.batch_size"
            ) from None


def _hush():
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtpu complains at length that there is no TPU


def _plan_one(config, topology, images_per_core) -> bool:
    plan = compile_apart(config, topology)
    lines = describe(plan, config, images_per_core)
    width = max(map(len, lines))
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in lines.items()))
    change = remedy(plan, config)
    print(f"does not fit: {change}" if change else "fits" if find_chip(plan["kind"]) else "compiles")
    return change is None


def _plan_table(cases, images_per_core) -> bool:
    """A row of a Markdown table for every (name, config, topology)."""
    print(
        "| | devices | images a device | memory, GiB | TFLOPs | ms a step | hours | images/s a host | cores |"
    )
    print("| --- " * 9 + "|", flush=True)
    fits = True
    for name, config, topology in cases:
        cells = [name]
        try:
            plan = compile_apart(config, topology)
        except UserError as error:
            print(f"| {name} | {error} |", flush=True)
            fits = False
            continue
        chip, peak = find_chip(plan["kind"]), forecast(plan, config)
        fitting = remedy(plan, config) is None
        fits &= fitting
        memory = f"{gib(plan):.1f} of {chip.memory if chip else '?'}"
        cells += [f"{plan['devices']} x {plan['kind']}", str(config.batch_size // plan["devices"])]
        cells += [memory if fitting else f"**{memory}**", f"{plan['flops'] / 1e12:.2f}"]
        if peak:
            cells += [f"{peak['step'] * 1e3:.1f}", f"{peak['hours']:.2f}", f"{peak['images']:,.0f}"]
            cells += [f"{math.ceil(peak['images'] / images_per_core()):,}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return fits


def _forms(config):
    """The plain step and its two forms that need less memory, as (name, config)."""
    parts = config.microbatches if config.microbatches > 1 else 8
    for name, change in {
        "plain": {"microbatches": 1, "remat": False},
        "remat": {"microbatches": 1, "remat": True},
        f"{parts} microbatches": {"microbatches": parts, "remat": False},
    }.items():
        form = ConfigDict(config)
        form.update(change)
        yield name, form


def plan(_) -> None:
    config = command_line.read_config()
    if config.task != "pretrain":
        raise UserError(f"plans are of pretraining, not of {config.task}: give the config without a task")
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
    main.run(plan)
