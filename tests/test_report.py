"""What a compiled program costs, read off XLA's text."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import DIT

from sharding.mesh import MeshShape, make_mesh
from sharding.xla_options import use_tpu_options
from wanjax.config import SampleConfig
from wanjax.report import programs
from wanjax.report.hlo import collectives, flops, parse, read

LAYERS, TOKENS, WIDTH = 5, 64, 32


@functools.cache
def program():
    """A loop over layers whose weights are split and gathered, its tokens split throughout."""
    mesh = make_mesh(MeshShape(ulysses=8))

    def forward(x, weights):
        def layer(x, weight):
            return jnp.tanh(x @ jax.sharding.reshard(weight, P(None, None))), None

        return jax.lax.scan(layer, x, weights)[0]

    def shape(dims, *spec):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        arguments = shape((TOKENS, WIDTH), "ulysses", None), shape((LAYERS, WIDTH, WIDTH), None, "ulysses", None)
        return read(jax.jit(forward).lower(*arguments).compile())


def test_collectives_in_a_loop_count_every_time():
    assert program().payload("all-gather") == LAYERS * WIDTH * WIDTH * 4
    assert program().payload("all-gather", asynchronous=True) == 0
    assert program().payload("all-to-all") == 0


def test_operations_in_a_loop_count_every_time_on_one_device():
    assert program().flops == LAYERS * 2 * (TOKENS // 8) * WIDTH * WIDTH


@pytest.mark.parametrize("mesh", [MeshShape(ulysses=8), MeshShape(ring=2, ulysses=4), MeshShape(ring=8)])
def test_work_is_shared_evenly(mesh):
    """All of `benchmarks/scaling.py` in small: an n-th of the operations on each of n devices, within 5%."""
    network = dataclasses.replace(DIT, dim=128, ffn_dim=256)
    video = SampleConfig(height=128, width=256, frames=29, guidance=1.0)

    def operations(shape):
        real = make_mesh(shape, jax.devices()[: shape.sequence])
        with jax.set_mesh(real):
            return read(programs.denoise_step(video, network, programs.AbstractInputs(real)).lower().compile()).flops

    assert operations(mesh) * 8 == pytest.approx(operations(MeshShape()), rel=0.05)


def test_memory_holds_the_arguments():
    assert program().arguments == 4 * (TOKENS // 8 * WIDTH + LAYERS * WIDTH * WIDTH // 8)
    assert program().peak >= program().arguments


# Lines as libtpu writes them; shortened.
TPU = """\
HloModule jit_f, is_scheduled=true
%started (param.1: bf16[1,8,4]) -> (bf16[1,8,4], bf16[8,8,4]) {
  %all-gather.1 = bf16[8,8,4]{2,1,0:T(8,128)} all-gather(%param.1), channel_id=4, dimensions={0}, metadata={op_name="w"}
  ROOT %custom-call.1 = (bf16[1,8,4], bf16[8,8,4]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.2 (param.2: bf16[1,8,4]) -> bf16[16,4] {
  %all-gather.2 = bf16[8,8,4]{2,1,0:T(8,128)} all-gather(%param.2), channel_id=4, dimensions={0}
  %x = bf16[16,8]{1,0} parameter(1)
  %y = bf16[8,4]{1,0} parameter(2)
  ROOT %convolution.1 = bf16[16,4]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
}
%body (param.3: (s32[], bf16[1,8,4])) -> (s32[], bf16[1,8,4]) {
  %start = (bf16[1,8,4], bf16[8,8,4]) fusion(%w), kind=kCustom, calls=%started
  %middle = bf16[16,4]{1,0} fusion(%start), kind=kCustom, calls=%async_collective_fusion.2
  %all-to-all-start = ((bf16[1,40,8]{2,1,0}), bf16[1,40,8]{2,1,0}, u32[]{:S(2)}) all-to-all-start(%z), channel_id=1
  %work = bf16[4]{0} fusion(%z), kind=kLoop, calls=%something
  %done = bf16[1,40,8]{2,1,0} all-to-all-done(%all-to-all-start)
  %later = ((bf16[2,8]{1,0}), bf16[2,8]{1,0}, u32[]{:S(2)}) async-start(%z), calls=%wrapped
  %more = bf16[4]{0} fusion(%z), kind=kLoop, calls=%something
  %end = bf16[2,8]{1,0} async-done(%later)
  %rs = f32[2,8]{1,0} reduce-scatter(%g), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %kept = bf16[2,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  ROOT %tuple = (s32[], bf16[1,8,4]) tuple(%i, %w)
}
%wrapped (param.5: bf16[2,8]) -> bf16[2,8] {
  ROOT %permute = bf16[2,8]{1,0} collective-permute(%param.5), channel_id=9, source_target_pairs={{0,1},{1,0}}
}
%all-reduce-scatter (param.6: bf16[8,8]) -> bf16[2,8] {
  %all-reduce.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-reduce(%param.6), channel_id=7, replica_groups={{0,1,2,3}}
  %start = s32[] multiply(%device, %rows)
  ROOT %slice = bf16[2,8]{1,0} dynamic-slice(%all-reduce.1, %start, %zero), dynamic_slice_sizes={2,8}
}
%condition (param.4: (s32[], bf16[1,8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3), metadata={}
  %i = s32[]{:T(128)} get-tuple-element(%param.4), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}
ENTRY %main (w: bf16[1,8,4]) -> bf16[1,8,4] {
  %while = (s32[]{:T(128)}, bf16[1,8,4]{2,1,0}) while(%tuple.1), condition=%condition, body=%body
}
"""


def test_text_of_a_tpu():
    *found, last = collectives(parse(TPU))
    assert last[:4] == ("reduce-scatter", 8 * 8 * 2, 3, False)
    found = {c.kind: c for c in found}
    assert len(list(collectives(parse(TPU)))) == len(found) + 1 == 5
    assert found["collective-permute"][1:4] == (2 * 8 * 2, 3, True)
    assert found["all-gather"][1:4] == (8 * 8 * 4 * 2, 3, True)
    assert found["all-to-all"][1:4] == (40 * 8 * 2, 3, True)
    assert found["reduce-scatter"][1:4] == (4 * 2 * 8 * 4, 3, False)
    assert flops(parse(TPU)) == 3 * 2 * 16 * 4 * 8


# Lines as XLA writes them for GPUs; shortened.
GPU = """\
HloModule jit_f, is_scheduled=true
ENTRY %main (g: bf16[8,6]) -> bf16[1,6] {
  %rs = ((bf16[8,6], bf16[8,2]), (bf16[1,6], bf16[1,2])) reduce-scatter-start(%g, %h), replica_groups=[1,8]<=[8]
  %work = bf16[8]{0} fusion(%x), kind=kLoop, calls=%something
  %rs-done = (bf16[1,6]{1,0}, bf16[1,2]{1,0}) reduce-scatter-done(%rs)
  %gather = (bf16[1,6]{1,0}, bf16[8,6]{1,0}) all-gather-start(%w), dimensions={0}
  %gather-done = bf16[8,6]{1,0} all-gather-done(%gather)
}
"""


def test_text_of_a_gpu():
    """Several arrays travel in one collective, and a start whose done comes at once overlaps with nothing."""
    scattered, gathered = collectives(parse(GPU))
    assert scattered[:4] == ("reduce-scatter", 8 * (6 + 2) * 2, 1, True)
    assert gathered[:4] == ("all-gather", 8 * 6 * 2, 1, False)


def test_the_users_options_of_libtpu_come_last(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_force_async_all_to_all=false")
    use_tpu_options()
    first, *_, last = os.environ["LIBTPU_INIT_ARGS"].split()
    assert first == "--xla_enable_async_all_gather=true"
    assert last == "--xla_tpu_force_async_all_to_all=false"
