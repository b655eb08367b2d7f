"""Operations against programs and networks whose count is known."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny import on

from sharding.mesh import MeshShape
from wanjax.conditioning.samples import Encoded
from wanjax.config import DiTConfig, LoRAConfig, TrainConfig
from wanjax.training.objectives import make_objective
from wanjax.training.speed import operations, peak


def test_operations_of_loops_convolutions_and_branches():
    def program(x, weights, kernel, way):
        def layer(x, weight):
            return jax.checkpoint(lambda x: jnp.tanh(x @ weight))(x), None

        x, _ = jax.lax.scan(layer, x, weights)  # 5 times [4, 8] @ [8, 8]
        y = jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return jax.lax.cond(way, lambda y: y[0] @ weights[0, :6], lambda y: x, y)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 8), (5, 8, 8), (3, 8, 6), ())]
    count = operations(jax.make_jaxpr(lambda x, w, k, way: program(x, w, k, way > 0))(*shapes).jaxpr)
    loop, convolution, larger_branch = 5 * (4 * 8 * 8), 4 * 6 * (3 * 8), 4 * 6 * 8
    assert count == 2 * (loop + convolution + larger_branch)  # a multiplication and an addition


def test_a_step_of_the_full_model_on_a_mesh():
    """A forward of 75,600 tokens takes 6.55 PFLOP, 71% of which are self-attention: 4 x 40 x 75600^2 x 5120."""
    config = TrainConfig(dit=DiTConfig(), height=720, width=1280, frames=81, batch=2, remat="block")
    objective = make_objective(config)
    shapes = ((2, 21, 90, 160, 16), (2, 512, 4096), (2, 514, 1280), (2, 21, 90, 160, 20))
    batch = Encoded(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert objective.unit == "tokens"
    assert objective.units(batch) == 2 * 75600
    with on(MeshShape(fsdp=2, ring=2, ulysses=2)):
        count = objective.step_operations(batch)
        adapters = dataclasses.replace(objective, config=dataclasses.replace(config, lora=LoRAConfig(rank=1)))
        beside = adapters.step_operations(batch)
        assert beside == pytest.approx(count / 3 * 2, rel=1e-3)  # and what adapters of rank 1 take
    assert count / 6 == pytest.approx(6.55e15, rel=0.01)
    assert 4 * 40 * 75600**2 * 5120 / (count / 6) == pytest.approx(0.71, abs=0.01)
    one = Encoded(*(jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in batch))
    assert objective.step_operations(one) == pytest.approx(count / 2, rel=1e-3)


def test_peaks():
    kinds = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "cpu")
    assert [peak(kind) for kind in kinds] == [197e12, 459e12, 918e12, 989e12, 756e12, None]
