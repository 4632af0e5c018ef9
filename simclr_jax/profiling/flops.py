"""The floating point operations of convolutions and matrix products; other operations are few beside them."""

import math

import jax
from jax.extend.core import Literal, jaxprs_in_params

from simclr_jax.parallel import AXIS


def of_product(equation) -> float:
    """Those of one equation of a jaxpr: a multiplication and an addition are two operations."""
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
    """The jaxprs that an equation runs: of those for several platforms the last, that of accelerators."""
    inner = list(jaxprs_in_params(equation.params))
    return inner[-1:] if equation.primitive.name == "cond" else inner


def of_training(loss, trained, *others) -> float:
    """Model FLOPs of a loss and its gradient, on one device: what a step cannot do without.

    A product is counted once, and once more for the gradient of each operand that depends on what is trained.
    What a step computes again to save memory, with `remat`, `microbatches` or the tiles of NT-Xent, is not
    counted: that it takes longer for it shows in its utilisation. Nothing is compiled: tracing the loss takes
    0.4 s on configs/digits.py, 1.8 s for a ResNet-50, where tracing the gradient takes 2 and 9 s.

    Args:
      loss: (trained, *others) -> scalar, of one device's rows; may name the axis `AXIS`.
      trained: the parameters that have gradients, a tree of arrays or of their shapes.
      others: what else the loss takes, likewise.
    """
    trained, others = jax.tree.map(lambda of: jax.ShapeDtypeStruct(of.shape, of.dtype), (trained, others))
    jaxpr = jax.make_jaxpr(loss, axis_env=[(AXIS, jax.device_count())])(trained, *others).jaxpr
    count = len(jax.tree.leaves(trained))
    return _with_gradients(jaxpr, [row < count for row in range(len(jaxpr.invars))])[0]


def _with_gradients(jaxpr, inputs):
    """FLOPs, and which outputs depend on what is trained, of a jaxpr of whose inputs these do."""
    dependent, total = {v for v, depends in zip(jaxpr.invars, inputs) if depends}, 0.0

    def which(variables):
        return [not isinstance(v, Literal) and v in dependent for v in variables]

    for equation in jaxpr.eqns:
        depends, parameters = which(equation.invars), equation.params
        outputs = [any(depends) and equation.primitive.name != "stop_gradient"] * len(equation.outvars)
        total += of_product(equation) * (1 + sum(depends))
        depends = depends[1:] if equation.primitive.name == "cond" else depends  # without the index
        for inner in inner_jaxprs(equation):
            given = depends if len(depends) == len(inner.invars) else [any(depends)] * len(inner.invars)
            flops, found = _with_gradients(inner, given)
            if equation.primitive.name == "scan":
                # Inputs are constants, carry and slices, outputs carry and slices; only slices lose an axis
                # inside. (The parameters that tell how many there are have other names in jax 0.12.)
                whole, carried = (
                    sum(outside.aval.ndim == inside.aval.ndim for outside, inside in zip(*pair))
                    for pair in ((equation.invars, inner.invars), (equation.outvars, inner.outvars))
                )
                # What one round makes of the carry, the next one begins with.
                given = [*given[: whole - carried], *found[:carried], *given[whole:]]
                flops, found = _with_gradients(inner, given)
                flops *= parameters["length"]
            total += flops
            outputs = found if len(found) == len(outputs) else outputs
        dependent |= {v for v, depends in zip(equation.outvars, outputs) if depends}
    return total, which(jaxpr.outvars)
