"""What a measured plan means for a person: whether it fits, how long it takes, what to change."""

import math

from simclr_jax import models
from simclr_jax.chips import find_chip
from simclr_jax.plan.cost import GIB, roofline


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
        "model": models.describe(config.model),
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
