"""Explains a measured plan: whether the step fits, how long it takes, which settings to change."""

import math

from simclr_jax import models, train
from simclr_jax.plan.cost import GIB, roofline
from simclr_jax.profiling.chips import find_chip


def remedy(plan: dict, config) -> str | None:
    """Returns which settings to change where the step does not fit, and None where it does."""
    chip = find_chip(plan["kind"])
    used = gib(plan)
    if "refused" not in plan["memory"] and (chip is None or used <= chip.memory):
        return None
    rows = config.batch_size // plan["devices"] // train.microbatches_of(config)
    weights = 3 * 4 * plan["parameters"] / GIB  # parameters, their momentum and gradients
    views = 2 * 3 * config.image_size**2 * config.batch_size / plan["devices"] / GIB
    fixed = weights + 2 * views  # microbatches are cut from a second copy of the views, in another layout
    free = 0.8 * ((chip.memory if chip else 0) - fixed)
    if free <= 0:
        return (
            f"parameters, momentum and gradients take {weights:.1f} GiB, and two copies of the views "
            f"{2 * views:.1f}: lower --config.model.width or --config.batch_size, or take more devices"
        )
    if config.task != "pretrain":
        return "lower --config.batch_size, or take more devices"
    parts = 2
    while (used - fixed) / parts > free:
        parts *= 2
    options = [] if rows % parts else [f"set --config.microbatches={config.microbatches * parts}"]
    options += [] if config.remat else ["set --config.remat=True"]
    return ", ".join([*options, "lower --config.batch_size, or take more devices"])


def gib(plan: dict) -> float:
    """Returns how much of a device's memory a step takes, in GiB."""
    return sum(plan["memory"].values()) / GIB


def forecast(plan: dict, config) -> dict[str, float]:
    """Estimates the duration of a step and of the run.

    The expected step is the sum of the least seconds for FLOPs and for traffic, times the factor that
    ResNet-50s are known to take (docs/planning.md states the error), plus the seconds of the links.

    Returns:
      'least' seconds of a step at the chip's peaks, expected seconds of a 'step', 'hours' and 'device_hours'
      of the run, and 'images' per second and host; nothing if the chip is unknown or the step does not fit.
    """
    seconds, chip = roofline(plan), find_chip(plan["kind"])
    if not seconds or "refused" in plan["memory"]:
        return {}
    step = chip.slowness * (seconds["compute"] + seconds["memory"]) + seconds["links"]
    images = config.batch_size / step / plan["hosts"]
    hours = plan["num_steps"] * step / 3600
    times = {"least": max(seconds.values()), "step": step, "hours": hours}
    return times | {"device_hours": hours * plan["devices"], "images": images}


def priced(device_hours: float, price: float | None) -> str:
    """Returns device-hours, and what they cost where the price of one is given, in US dollars."""
    return f"{device_hours:,.1f}" + (f" ({device_hours * price:,.2f} USD)" if price else "")


def describe(plan: dict, config, images_per_core, price: float | None = None) -> dict[str, str]:
    """Describes a plan by name and text.

    Args:
      plan, config: from `cost.measure`, and the config of pretraining that it measured.
      images_per_core: measures this machine, if needed.
      price: US dollars of an hour of a device.
    """
    chip, memory = find_chip(plan["kind"]), plan["memory"]
    rows = config.batch_size // plan["devices"]
    parts = f", in {config.microbatches} microbatches" if config.microbatches > 1 else ""
    available = f" of {chip.memory:g}" if chip else ""
    sizes = ", ".join(f"{size / GIB:.2f} {name}" for name, size in memory.items())
    lines = {
        "task": f"pretraining on {config.dataset.name}, {config.image_size} pixels",
        "model": models.describe(config.model),
        "parameters": f"{plan['parameters']:,}",
        "devices": f"{plan['devices']} x {plan['kind']}, {plan['hosts']} host(s)",
        "batch": f"{config.batch_size} images, {rows} a device{parts}{', remat' if config.remat else ''}",
        "memory": f"{gib(plan):.2f}{available} GiB a device: {sizes}",
        "FLOPs": f"{plan['flops'] / 1e9:,.1f} G a step and device, convolutions and products",
    }
    lines["traffic"] = f"{plan['bytes'] / 1e9:,.2f} GB of memory a step and device at least, for these"
    lines["collectives"] = ", ".join(
        f"{times:,} {name} of {size / 1e6:,.2f} MB" for name, (times, size) in plan["collectives"].items()
    )
    expected = forecast(plan, config)
    if expected:
        bounds = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in roofline(plan).items())
        lines["step"] = f"{expected['step'] * 1e3:.1f} ms expected; {expected['least'] * 1e3:.1f} at the "
        lines["step"] += f"chip's peaks ({bounds})"
        lines["run"] = f"{plan['num_steps']:,} steps, {expected['hours']:.1f} hours expected, "
        lines["run"] += f"{priced(expected['device_hours'], price)} device-hours"
        if "images" in memory:
            lines["input"] = f"{expected['images']:,.0f} images/s a host then, made by its devices"
            return lines
        advice = "" if config.augment.on_device else "; --config.augment.on_device=True wants half of them"
        cores = math.ceil(expected["images"] / images_per_core())
        lines["input"] = (
            f"{expected['images']:,.0f} images/s a host then: {cores:,} cores like this machine's, at "
            f"{images_per_core():,.0f} a core{advice}"
        )
    return lines
