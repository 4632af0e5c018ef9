"""The floating point operations of convolutions and matrix products; all others are few beside them."""

import math

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import Literal, jaxprs_in_params

from simclr_jax.parallel import AXIS
from simclr_jax.profiling.chips import find_chip


def product_flops(equation) -> float:
    """Returns the operations of one equation of a jaxpr; a multiplication and an addition count as two."""
    name, parameters = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        dimensions = parameters["dimension_numbers"].rhs_spec
        products = math.prod(kernel.shape[axis] for axis in dimensions[1:])
        # Zeros that dilation puts between inputs, as gradients of strided convolutions do, cost nothing.
        products /= math.prod(parameters["lhs_dilation"])
        return 2 * products * equation.outvars[0].aval.size
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval
        return 2 * math.prod(left.shape[axis] for axis in contracted) * equation.outvars[0].aval.size
    return 0.0


def inner_jaxprs(equation) -> list:
    """Returns the jaxprs that an equation runs; of branches for several platforms, the accelerators'."""
    inner = list(jaxprs_in_params(equation.params))
    return inner[-1:] if equation.primitive.name == "cond" else inner


def seconds_at_peak(loss, is_trained, state, batch) -> float | None:
    """Returns how long a train step would take if each device did its model FLOPs alone, at its peak.

    The peak is that of bfloat16, whatever the step computes in. Nothing is run.

    Args:
      loss: (params, batch_stats, batch) -> (loss, ...); it also gets `extra` where the state has one.
      is_trained: path of a parameter, as 'encoder/conv1/kernel' -> whether the step changes it.
      state: the train state.
      batch: arrays on the devices, [devices, rows, ...].

    Returns:
      Seconds; None where the peak of the devices is unknown.
    """
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is None:
        return None

    def loss_value(trained, frozen, *others):
        return loss(unflatten_dict(trained | frozen, sep="/"), *others)[0]

    trained = flatten_dict(state["params"], sep="/")
    frozen = {path: trained.pop(path) for path in [*trained] if not is_trained(path)}
    rows = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), batch)
    others = [state["batch_stats"], rows, *([state["extra"]] if "extra" in state else [])]
    return training_flops(loss_value, trained, frozen, *others) / (chip.flops * 1e12)


def training_flops(loss, trained, *others) -> float:
    """Returns the model FLOPs of a loss and its gradient on one device: those that no step can do without.

    A product is counted once, and once more for the gradient of each operand that depends on a trained
    parameter. Recomputation that saves memory (`remat`, `microbatches`, the tiles of NT-Xent) is not counted:
    the time that it takes shows in the utilisation. Nothing is compiled: tracing the loss takes
    0.4 s on configs/digits.py, 1.8 s for a ResNet-50, where tracing the gradient takes 2 and 9 s.

    Args:
      loss: (trained, *others) -> scalar, of one device's rows; may name the axis `AXIS`.
      trained: the parameters that have gradients, a tree of arrays or of their shapes.
      others: the other arguments of the loss, likewise.
    """
    trained, others = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (trained, others))
    jaxpr = jax.make_jaxpr(loss, axis_env=[(AXIS, jax.device_count())])(trained, *others).jaxpr
    count = len(jax.tree.leaves(trained))
    return _flops_with_gradients(jaxpr, [index < count for index in range(len(jaxpr.invars))])[0]


def _flops_with_gradients(jaxpr, inputs_depend):
    """Counts the FLOPs of a jaxpr, and finds out which outputs depend on trained parameters.

    Args:
      jaxpr: the program.
      inputs_depend: for each of its inputs, whether it depends on trained parameters.

    Returns:
      FLOPs; for each output, whether it depends on trained parameters.
    """
    dependent, total = {v for v, depends in zip(jaxpr.invars, inputs_depend) if depends}, 0.0

    def depend(variables):
        return [not isinstance(v, Literal) and v in dependent for v in variables]

    for equation in jaxpr.eqns:
        operands, parameters = depend(equation.invars), equation.params
        outputs = [any(operands) and equation.primitive.name != "stop_gradient"] * len(equation.outvars)
        total += product_flops(equation) * (1 + sum(operands))
        operands = operands[1:] if equation.primitive.name == "cond" else operands  # without the index
        for inner in inner_jaxprs(equation):
            inputs = operands if len(operands) == len(inner.invars) else [any(operands)] * len(inner.invars)
            inner_flops, inner_outputs = _flops_with_gradients(inner, inputs)
            if equation.primitive.name == "scan":
                # Inputs are constants, carry and slices, outputs carry and slices; only slices lose an axis
                # inside. (The parameters that tell how many there are have other names in jax 0.12.)
                whole, carried = (
                    sum(outside.aval.ndim == inside.aval.ndim for outside, inside in zip(*pair))
                    for pair in ((equation.invars, inner.invars), (equation.outvars, inner.outvars))
                )
                # The next round begins with the carry that this round returns.
                inputs = [*inputs[: whole - carried], *inner_outputs[:carried], *inputs[whole:]]
                inner_flops, inner_outputs = _flops_with_gradients(inner, inputs)
                inner_flops *= parameters["length"]
            total += inner_flops
            outputs = inner_outputs if len(inner_outputs) == len(outputs) else outputs
        dependent |= {v for v, depends in zip(equation.outvars, outputs) if depends}
    return total, depend(jaxpr.outvars)
