"""Measures the speed of this machine: `python -m simclr_jax.benchmark input|step|loss [--config=FILE]`

input  images/s that the input pipeline of pretraining makes on this machine's cores, for a config, with the
       official chain, albumentations and lightly beside it, in turns
step   views/s and memory of the train step on this machine's devices, for a config, without an input
       pipeline, and with --peer=torch those of the same step in PyTorch, on one device; on CPUs in turns
loss   time and memory of NT-Xent, plain and in tiles, from 2,048 pairs on

step and loss need no TensorFlow.
"""

import sys

import jax
import numpy as np
from absl import flags

from simclr_jax import benchmark
from simclr_jax.benchmark import torch_step
from simclr_jax.config import command_line
from simclr_jax.plan import cost
from simclr_jax.plan.forecast import forecast
from simclr_jax.process import say

_PEER = flags.DEFINE_enum(
    "peer", None, ["torch"], "The library whose step `benchmark step` measures as well."
)


def _input(_) -> None:
    from simclr_jax.data import CORES

    config = _config()
    say(f"on 64 JPEG files made of scikit-learn's two photographs, not on {config.dataset.name}")
    rates = benchmark.input_rates(config)
    own_rates = np.array(rates["ours"])
    rate = np.median(own_rates)
    print(f"{rate * CORES:,.0f} images/s of two views on {CORES} cores, {rate:,.0f} a core")
    if cost.run_in_process(jax.default_backend) != "cpu":
        say("compiling the step for the devices here")
        expected = forecast(cost.measure_in_process(config, "local"), config)
        if expected:
            enough = "enough" if rate * CORES >= expected["images"] else "too few, they will wait"
            print(f"the devices here take {expected['images']:,.0f} images/s by the plan: that is {enough}")
    ratios = {name: own_rates / samples for name, samples in rates.items()}
    print("\n".join(["", *_quantile_table("images/s a core", rates, ratios)]))


def _quantile_table(unit, samples, ratios):
    """Yields a Markdown table of medians and quartiles, of the measures by name and of ratios to ours."""
    rows = []
    for name, measured in samples.items():
        low, median, high = np.quantile(measured, [0.25, 0.5, 0.75])
        lower, ratio, higher = np.quantile(ratios[name], [0.25, 0.5, 0.75])
        cells = [name, f"{median:,.1f}", f"{low:,.1f} to {high:,.1f}"]
        rows.append([*cells, f"{ratio:.2f}", f"{lower:.2f} to {higher:.2f}"])
    return benchmark.table([unit, "median", "quartiles", "ours to it, median", "quartiles"], rows)


def _step(_) -> None:
    config = _config()
    if not _PEER.value:
        print(_step_line(benchmark.step_rate(config)))
        return
    torch_step.check_torch(config)
    classes = cost.Examples.from_config(config.dataset).num_classes
    if cost.run_in_process(jax.default_backend) == "cpu":
        times = {name: np.array(x) * 1e3 for name, x in benchmark.steps_in_turns(config, classes).items()}
        ratios = {name: times["ours"] / measured for name, measured in times.items()}
        print("\n".join(_quantile_table("ms a step", times, ratios)))
        return
    report = cost.run_in_process(benchmark.step_rate, config)
    print(_step_line(report), flush=True)
    torch_report = cost.run_in_process(torch_step.torch_step_rate, config, classes)
    ratio = report["views"] / torch_report["views"]
    print(f"{_step_line(torch_report)}: PyTorch\n{ratio:.2f} of PyTorch's rate")


def _step_line(report):
    line = f"{report['views']:,.0f} views/s, {report['seconds'] * 1e3:,.1f} ms a step on {report['devices']}"
    if "memory" in report:
        line += f", {report['memory'] / cost.GIB:.2f} GiB a device"
    if "flops" in report:
        line += f", {report['flops']:.1%} of peak FLOPs, {report['bandwidth']:.1%} of peak bandwidth"
    return line


def _config():
    config = command_line.read_config()
    cost.check_pretraining(config, "benchmarks are")
    return config


if __name__ == "__main__":
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if verb in ("input", "step"):
        command_line.run({"input": _input, "step": _step}[verb])
    elif verb == "loss" and not sys.argv[1:]:
        for line in benchmark.loss_table(benchmark.PAIRS):
            say(line)
    elif verb in ("-h", "--help"):
        print(__doc__)
    else:
        unknown = " ".join([verb, *sys.argv[1:]])
        print(f"error: '{unknown}' is unknown: give input, step, or loss alone", file=sys.stderr)
        sys.exit(2)
