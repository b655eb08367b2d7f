"""Ring attention compiled for TPUs that are not here: the kernels fit, and what travels does so behind them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import sequence_attention
from sharding.local import local_attention
from sharding.xla_options import TPU_OPTIONS
from wanjax.report.hlo import parse
from wanjax.report.topology import topology_mesh

pytestmark = pytest.mark.aot
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def computations(mesh, function, spec, *shapes):
    """The computations of `function` and its gradients, each as `(name, opcode)` in the order of execution."""

    def with_gradients(dout, *inputs):
        out, vjp = jax.vjp(function, *inputs)
        return out, *vjp(dout)

    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        x = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in (shapes[0], *shapes)]
        text = jax.jit(with_gradients).lower(*x).compile(compiler_options=TPU_OPTIONS).as_text()
    return [[(i.name, i.opcode) for i in body] for body in parse(text).values()]


def places(body, name="", opcode=""):
    """Where a computation's instructions of that name or opcode are."""
    return [i for i, (n, o) in enumerate(body) if n.startswith(name) and o.startswith(opcode)]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_ring_computes_while_keys_travel(topology):
    mesh = topology_mesh(topology, "ring=-1")
    length = 18900 * mesh.size  # 18900 is no multiple of a block, of the lanes or of the sublanes
    shape, spec = (1, length, 2, 128), PartitionSpec(None, ("ring", "ulysses"))
    bodies = computations(mesh, lambda q, k, v: sequence_attention(q, k, v, length - 5), spec, shape, shape, shape)
    assert not any(places(body, opcode="all-gather") for body in bodies)
    for kernel in ("flash_forward", "flash_backward"):
        loops = [b for b in bodies if places(b, kernel) and len(places(b, opcode="collective-permute-start")) > 0]
        body = min(loops, key=len)  # the entry has the last hop
        (here,) = places(body, kernel)
        starts, ends = (places(body, opcode=f"collective-permute-{x}") for x in ("start", "done"))
        assert len(starts) == len(ends) == 2  # keys and values, or their gradients
        assert max(starts) < here < min(ends)


@pytest.mark.parametrize("keys", [257, 512])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_attention_to_text_and_images_compiles(topology, keys):
    mesh = topology_mesh(topology, "data=-1")
    q, k = (mesh.size, 18900, 2, 128), (mesh.size, keys, 2, 128)
    bodies = computations(mesh, local_attention, PartitionSpec("data"), q, k, k)
    names = {name.split(".")[0] for body in bodies for name, _ in body}
    assert {"flash_forward", "flash_backward"} <= names
