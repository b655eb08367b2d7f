"""How fast training goes: operations of the model in a step, and what share of the devices' time they fill.

    utilisation = operations / (seconds x devices x peak)

Counted are the model's own matrix products and convolutions, forward once and backward twice (PaLM, arXiv 2204.02311,
appendix B): not what is computed again to save memory, nor what several devices all do. They are read off the traced
program, before it is compiled, so that kernels count as the mathematics that they do; what a device carries out of a
compiled program, `wanjax.report.hlo` counts.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh, AxisType

from sharding.mesh import AXES, MeshShape

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Objective


PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""bfloat16 operations a second of a device, by what its kind's name contains, without sparsity.

Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), data sheets of NVIDIA's A100, H100, H200 and HGX B200.
"""


def peak(kind: str) -> float | None:
    """Of a device of that kind (`jax.Device.device_kind`); None where it is not known."""
    return next((value for name, value in PEAKS.items() if name in kind), None)


def forward_operations(objective: Objective, batch: Any, loss: Callable[[Any, Any], Any]) -> int:
    """Operations of a loss of an objective's model and a prepared batch, forward, over all devices.

    Backward is as much again for the gradients of what goes through a network, and again for those of its weights.
    """

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    one = AbstractMesh(tuple(MeshShape()), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    none = AbstractMesh((), ())  # JAX changes a mesh's size only by way of none
    # On one device nothing is computed twice.
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(one):
        model = jax.eval_shape(lambda: objective.make(nnx.Rngs(0)))
        prepared = jax.eval_shape(objective.prepare, jax.tree.map(shape, batch), jax.eval_shape(jax.random.key, 0))
        return operations(jax.make_jaxpr(loss)(model, prepared).jaxpr)


def operations(program: Jaxpr) -> int:
    """Of a program's matrix products and convolutions. Loops of unknown length count once; of branches, the largest."""
    return operations_by_type(program).total()


def operations_by_type(program: Jaxpr) -> collections.Counter[str]:
    """The same by the dtype of what is multiplied."""
    total: collections.Counter[str] = collections.Counter()
    for equation in program.eqns:
        kind, parameters = equation.primitive.name, equation.params
        shapes: list[Any] = [getattr(x.aval, "shape", ()) for x in (*equation.outvars, *equation.invars)]
        if kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            count = 2 * math.prod(shapes[0]) * math.prod(shapes[1][axis] for axis in contracted)
            total[str(equation.invars[0].aval.dtype)] += count  # pyright: ignore[reportAttributeAccessIssue]
        elif kind == "conv_general_dilated":
            outputs = parameters["dimension_numbers"].rhs_spec[0]
            count = 2 * math.prod(shapes[0]) * math.prod(shapes[2]) // shapes[2][outputs]
            total[str(equation.invars[0].aval.dtype)] += count  # pyright: ignore[reportAttributeAccessIssue]
        inner = [operations_by_type(part) for part in _parts(parameters)]
        if kind == "cond":
            inner = [max(inner, key=collections.Counter.total)]
        for part in inner:
            total.update({name: count * parameters.get("length", 1) for name, count in part.items()})
    return total


def _parts(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs inside of an equation."""
    for value in jax.tree.leaves(parameters, is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
