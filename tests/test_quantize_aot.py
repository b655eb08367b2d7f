"""8-bit products compiled for TPUs that are not here: chips with the units multiply in 8 bits."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding.xla_options import TPU_OPTIONS_8_BIT
from wanjax.models.layers import Linear, QuantizedLinear
from wanjax.report.hlo import parse, shapes
from wanjax.report.programs import AbstractInputs
from wanjax.report.topology import topology_mesh

pytestmark = pytest.mark.aot
AXES = ("embed", "heads")


def compiled(topology, format):
    """A layer of the 14B network, split over the chips as all its weights are."""
    mesh = topology_mesh(topology, "fsdp=-1")
    with jax.set_mesh(mesh):
        layer = AbstractInputs(mesh).network(lambda rngs: QuantizedLinear(Linear(5120, 5120, rngs, axes=AXES), format))
        spec = PartitionSpec(("data", "fsdp"))
        x = jax.ShapeDtypeStruct((mesh.size, 1024, 5120), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        return jax.jit(lambda m, x: m(x)).lower(layer, x).compile(compiler_options=TPU_OPTIONS_8_BIT).as_text()


@pytest.mark.parametrize(
    ("topology", "format", "dtype"), [("v6e:2x4", "int8", "s8"), ("tpu7x:2x2x1", "fp8", "f8e4m3fn")]
)
def test_the_product_is_of_8_bit_numbers(topology, format, dtype):
    computations = parse(compiled(topology, format))
    products = 0
    for body in [body for name, body in computations.items() if name != "ENTRY"]:  # which has a name of its own too
        results = {i.name: i.result for i in body}
        for i in body:
            is_kernel = i.opcode == "custom-call" and i.name.startswith("matmul_int8")
            if is_kernel or i.opcode in ("convolution", "dot"):
                operands = re.findall(r"%([^\s,()]+)", i.line.split(f" {i.opcode}(")[1].split(")")[0])
                if is_kernel:  # x, its scales, the weights, the bias
                    operands = operands[0:3:2]
                assert all(results[name].startswith(f"{dtype}[") for name in operands), i.line
                products += 1
    assert products == 1
    results = [i.result for body in computations.values() for i in body if i.opcode.startswith("all-gather")]
    matrices = {kind for result in results for kind, size in shapes(result) if size == (5120, 5120)}
    assert matrices == {"s8"}  # the bits of either format
