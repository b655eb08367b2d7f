"""Programs compiled for NVIDIA GPUs that are not here: `make aot-gpu`."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import sequence_attention
from sharding.xla_options import GPU_OPTIONS
from wanjax.models.layers import Linear, QuantizedLinear
from wanjax.ops.kernels import int8fp8_gpu
from wanjax.report import compiled, memory
from wanjax.report.compiled import Case
from wanjax.report.hlo import parse, shapes
from wanjax.report.programs import AbstractInputs
from wanjax.report.topology import topology_mesh
from wanjax.weights.quantize import requantized

pytestmark = pytest.mark.aot_gpu
GIB = 2**30


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("gpu", "values", "products"),
    [
        ("a100", "bf16", {"mma.sync s8", "mma.sync bf16"}),
        ("rtx3090", "bf16", {"mma.sync s8", "mma.sync bf16"}),
        ("l40s", "fp8", {"mma.sync s8", "mma.sync e4m3"}),
        ("h100", "bf16", {"wgmma s8", "wgmma bf16"}),
        ("b200", "fp8", {"tcgen05.mma i8", "tcgen05.mma f8f6f4"}),
        ("rtx5090", "fp8", {"mma.sync s8", "mma.sync e4m3"}),
    ],
)
def test_8_bit_attention_uses_the_units_of_the_chip(tmp_path, gpu, values, products, d):
    mesh = topology_mesh(f"{gpu}:1", "data=1")
    sharding = NamedSharding(mesh, PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((1, 2, length, d), jnp.bfloat16, sharding=sharding) for length in (500, 3000))
    attend = jax.jit(partial(int8fp8_gpu.run, values=values), static_argnums=4)
    with jax.set_mesh(mesh):  # Pallas reads the GPU from it
        options = {"xla_dump_to": str(tmp_path), "xla_dump_emitter_re": ".*"}
        attend.lower(q, k, k, None, jnp.bfloat16).compile(compiler_options=options)
    (program,) = (text for file in tmp_path.glob("*.ptx") if "int8fp8" in (text := file.read_text()))
    found = re.findall(r"(mma\.sync|wgmma|tcgen05\.mma)\S*?[.:](s8|i8|bf16|f16|e4m3|f8f6f4)\b", program)
    assert {" ".join(pair) for pair in found} == products


@pytest.mark.parametrize(("choice", "kernel"), [("int8fp8", "__gpu$xla.gpu.triton"), ("flash", "__cudnn$fmhaSoftmax")])
def test_attention_inside_ring_and_ulysses(choice, kernel):
    mesh, length = topology_mesh("h100:8", "ring=2,ulysses=4"), 16000
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, ("ring", "ulysses")))
        x = jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16, sharding=sharding)
        attend = jax.jit(partial(sequence_attention, length=length - 5, choice=choice))
        text = attend.lower(x, x, x).compile(compiler_options=GPU_OPTIONS).as_text()
    assert text.count(f'custom_call_target="{kernel}"') == 2  # in the loop, and for the last hop


@pytest.mark.parametrize(
    ("topology", "format", "product"),
    [
        ("h100:8", "fp8", r'custom_call_target="__cublas\$lt\$matmul\$f8"'),
        ("l40s:8", "fp8", r'custom_call_target="__cublas\$lt\$matmul\$f8"'),
        ("a100:8", "int8", r'\(s32\[1024,5120\].*custom_call_target="__cublas\$lt\$matmul"'),
    ],
)
def test_the_product_is_of_8_bit_numbers(topology, format, product):
    """A layer of the 14B network, split over the GPUs as all its weights are."""
    mesh = topology_mesh(topology, "fsdp=-1")
    with jax.set_mesh(mesh):
        linear = partial(Linear, 5120, 5120, axes=("embed", "heads"))
        layer = AbstractInputs(mesh).network(lambda rngs: QuantizedLinear(linear(rngs), format))
        sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        x = jax.ShapeDtypeStruct((mesh.size, 1024, 5120), jnp.bfloat16, sharding=sharding)
        text = jax.jit(lambda m, x: m(x)).lower(layer, x).compile(compiler_options=GPU_OPTIONS).as_text()
    assert len(re.findall(product, text)) == 1
    assert text.count("custom_call_target=") == 1
    opcodes = ("all-gather", "all-gather-done")  # synchronous, or not
    gathered = [i.result for body in parse(text).values() for i in body if i.opcode in opcodes]
    matrices = {kind for result in gathered for kind, size in shapes(result) if size == (5120, 5120)}
    assert matrices == {"s8"}  # the bits of either format


def figures(config, topology, mesh, name="DiT step", quantize=None):
    config, dit, *_ = memory.load(config)
    return compiled.measure(Case(config, requantized(dit, quantize), topology, mesh), name)


def test_a_step_of_sampling_on_eight():
    row = figures("configs/flf2v_14b_720p.py", "h100:8", "data=2,ulysses=4")
    assert row.peak <= 11 * GIB
    assert row.payload["all-to-all"] == 4 * 40 * 18944 * 5120 * 2  # self-attention's queries, keys, values and results
    assert row.payload["all-gather"] <= 24 * GIB  # the weights once
    assert row.exposed <= 0.35 * row.payload["all-to-all"]
    assert row.payload["all-reduce"] == row.payload["reduce-scatter"] == row.payload["collective-permute"] == 0


@pytest.mark.parametrize(("gpu", "quantize", "limit"), [("h100:1", None, 35), ("rtx5090:1", "fp8", 24)])
def test_a_step_of_sampling_on_one(gpu, quantize, limit):
    """One branch of guidance after the other; no weight twice."""
    row = figures("configs/flf2v_14b_720p.py", gpu, "data=1", quantize=quantize)
    assert row.peak <= limit * GIB


def test_a_training_step_on_eight():
    row = figures("configs/train_flf2v_14b_720p_4chips.py", "h100:8", "ulysses=8", "training step")
    assert row.peak <= 60 * GIB
    assert row.payload["all-reduce"] < 0.1 * row.payload["reduce-scatter"]  # gradients go home as sums of parts
