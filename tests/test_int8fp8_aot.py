"""8-bit attention compiled for TPUs that are not here, at the size of 720p on four chips, in a ring."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import sequence_attention
from sharding.xla_options import TPU_OPTIONS
from wanjax.report.hlo import parse, shapes
from wanjax.report.topology import topology_mesh

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    ("topology", "name", "operand"),
    [
        ("v5p:2x2x1", "flash_forward", "bf16"),  # its matrix unit is no deeper than a head
        ("v6e:2x4", "int8fp8_forward", "s8"),
        ("tpu7x:2x2x1", "flash_forward", "bf16"),  # has no units for int8
    ],
)
def test_8_bits_only_where_they_gain(topology, name, operand):
    mesh = topology_mesh(topology, "ring=-1")
    length = 18900 * mesh.size  # 18900 is no multiple of a block, of the lanes or of the sublanes
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, ("ring", "ulysses")))
        x = jax.ShapeDtypeStruct((1, length, 10, 128), jnp.bfloat16, sharding=sharding)
        attend = jax.jit(partial(sequence_attention, length=length - 5, choice="int8fp8"))
        text = attend.lower(x, x, x).compile(compiler_options=TPU_OPTIONS).as_text()
    assert ("int8fp8_forward" in text) == (name == "int8fp8_forward")
    keys = []
    for computation, body in parse(text).items():
        results = {i.name: i.result for i in body}
        for i in body:
            if computation != "ENTRY" and i.name.startswith(name):  # which is there by its own name too
                operands = re.findall(r"%([^\s,()]+)", i.line.split("custom-call(")[1].split(")")[0])
                tokens = [x for operand in operands for x in shapes(results[operand]) if len(x[1]) == 3]
                keys.append(tokens[1])  # behind the queries
    assert {key[0] for key in keys} == {operand}
    assert {key[1] for key in keys} == {(1, 18900, 1280)}
    assert len(keys) == 3  # for the first hop, in the loop, and for the last one
