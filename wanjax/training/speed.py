"""How fast training goes: operations of the model in a step, and what share of the devices' time they fill.

    utilisation = operations / (seconds x devices x peak)

Counted are the model's own matrix products and convolutions, forward once and backward twice (PaLM, arXiv 2204.02311,
appendix B): not what is computed again to save memory, nor what several devices all do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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


def step_operations(objective: Objective, batch: Any) -> int:
    """Operations of a training step on a batch, over all devices.

    Backward is as much as forward for the gradients of what goes through the network, and again for those of its
    weights, unless those are frozen beside adapters.
    """

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    one = AbstractMesh(tuple(MeshShape()), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    none = AbstractMesh((), ())  # JAX changes a mesh's size only by way of none
    # On one device nothing is computed twice.
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(one):
        model = jax.eval_shape(lambda: objective.make(nnx.Rngs(0)))
        prepared = jax.eval_shape(objective.prepare, jax.tree.map(shape, batch), jax.eval_shape(jax.random.key, 0))
        return (2 if objective.has_frozen else 3) * operations(jax.make_jaxpr(objective.loss)(model, prepared).jaxpr)


def operations(program: Jaxpr) -> int:
    """Of a program's matrix products and convolutions. Loops of unknown length count once; of branches, the largest."""
    total = 0
    for equation in program.eqns:
        kind, parameters = equation.primitive.name, equation.params
        shapes: list[Any] = [getattr(x.aval, "shape", ()) for x in (*equation.outvars, *equation.invars)]
        if kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            total += 2 * math.prod(shapes[0]) * math.prod(shapes[1][axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            outputs = parameters["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(shapes[0]) * math.prod(shapes[2]) // shapes[2][outputs]
        inner = [operations(part) for part in _parts(parameters)]
        total += max(inner, default=0) if kind == "cond" else parameters.get("length", 1) * sum(inner)
    return total


def _parts(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs inside of an equation."""
    for value in jax.tree.leaves(parameters, is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
