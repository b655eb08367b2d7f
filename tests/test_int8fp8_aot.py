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
    ("topology", "scores", "values"),
    [
        ("v5e:2x2", "s8", "bf16"),
        ("v5p:2x2x1", "s8", "bf16"),
        ("v6e:2x4", "s8", "bf16"),
        ("tpu7x:2x2x1", "bf16", "f8e4m3fn"),  # has fp8 units, but none for int8
    ],
)
def test_the_kernel_compiles_with_the_units_of_the_chip(topology, scores, values):
    mesh = topology_mesh(topology, "ring=-1")
    length = 18900 * mesh.size  # 18900 is no multiple of a block, of the lanes or of the sublanes
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, ("ring", "ulysses")))
        x = jax.ShapeDtypeStruct((1, length, 10, 128), jnp.bfloat16, sharding=sharding)
        attend = jax.jit(partial(sequence_attention, length=length - 5, choice="int8fp8"))
        text = attend.lower(x, x, x).compile(compiler_options=TPU_OPTIONS).as_text()
    calls = 0
    for name, body in parse(text).items():
        results = {i.name: i.result for i in body}
        for i in body:
            if name != "ENTRY" and i.name.startswith("int8fp8_forward"):
                operands = re.findall(r"%([^\s,()]+)", i.line.split("custom-call(")[1].split(")")[0])
                _, q, _, k, _, v, _ = (shapes(results[operand])[0] for operand in operands)
                assert (q, k, v[0]) == ((scores, (10, 18900, 128)), (scores, (10, 18944, 128)), values)
                calls += 1
    assert calls == 2  # in the loop, and for the last hop
