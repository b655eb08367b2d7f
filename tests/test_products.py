"""The matrix products of TPUs against those of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import constrain, shard_parameters
from wanjax.models.layers import Linear
from wanjax.models.products import identity, quantized_product
from wanjax.ops.kernels import matmul_int8_tpu, matmul_tpu
from wanjax.ops.quantized import quantize_weight


def random(*shape, seed, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def distance(got, wanted):
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def assert_close_by_norm(got, wanted, tolerance):
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("activation", [identity, jax.nn.gelu])
@pytest.mark.parametrize(("read", "written", "long"), [(1, 1, 8192), (2, 3, 8192), (1, 1, 128)])
def test_kernel_equals_the_product(monkeypatch, activation, read, written, long):
    monkeypatch.setattr(matmul_tpu, "ROWS", 64)
    monkeypatch.setattr(matmul_tpu, "COLUMNS", 128)
    monkeypatch.setattr(matmul_tpu, "LONG", long)
    matmul_tpu.matmul.clear_cache()
    x, kernel, bias = random(2, 150, 512, seed=0), random(512, 768, seed=1) / 20, random(768, seed=2)
    run = partial(matmul_tpu.matmul, activation=activation, read=read, written=written, interpret=True)
    got = run(x, kernel, bias)
    matmul_tpu.matmul.clear_cache()
    x, kernel, bias = (a.astype(jnp.float32) for a in (x, kernel, bias))
    assert got.dtype == jnp.bfloat16
    assert_close_by_norm(got, activation(x @ kernel + bias), 2.0**-8)


def test_parts_are_an_order_of_memory():
    """What is written in parts is one transposition of a row-major array, which XLA takes away."""
    x, kernel, bias = random(1, 64, 128, seed=0), random(128, 256, seed=1), random(256, seed=2)
    one, two = (matmul_tpu.matmul(x, kernel, bias, activation=identity, written=n, interpret=True) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def layer_and_inputs():
    layer = Linear(256, 384, nnx.Rngs(0), axes=("embed", "mlp"), param_dtype=jnp.float32)
    layer.bias = nnx.Param(random(384, seed=3, dtype=jnp.float32), axes=("mlp",))
    return layer, random(2, 2048, 256, seed=1), random(2, 2048, 384, seed=2)


def value_and_gradients(layer, x, dout):
    y, vjp = jax.vjp(lambda layer, x: layer(x, jax.nn.gelu), layer, x)
    return y, *vjp(dout)


def test_value_and_gradients_are_those_of_the_plain_product(monkeypatch):
    layer, *arrays = layer_and_inputs()
    got = jax.jit(value_and_gradients)(layer, *arrays)
    with jax.set_mesh(make_mesh(parse_mesh("data=2,ulysses=2", 4), jax.devices()[:4])):
        split = [constrain(a, "batch", "tokens", None) for a in arrays]
        on_many = jax.jit(value_and_gradients)(shard_parameters(layer), *split)
    monkeypatch.setattr(matmul_tpu, "supports", lambda *_: False)
    expected = jax.jit(lambda *args: value_and_gradients(*args))(layer, *arrays)
    exact = jax.jit(lambda *args: value_and_gradients(*args))(
        *jax.tree.map(lambda x: x.astype(jnp.float32), (layer, *arrays))
    )
    for a, b, c, d in zip(*map(jax.tree.leaves, (got, on_many, expected, exact)), strict=True):
        np.testing.assert_array_equal(a, c)
        # The bias's gradient is a sum in bf16, in whatever order: no worse on many devices than on one.
        assert distance(b, d) <= 1.5 * distance(c, d) + 2.0**-8


def test_only_tpus_get_the_kernel():
    layer, x, _ = layer_and_inputs()
    traced = jax.jit(lambda layer, x: layer(x)).trace(layer, x)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("activation", [identity, jax.nn.gelu])
@pytest.mark.parametrize(("read", "written"), [(1, 1), (2, 3)])
def test_int8_kernel_equals_the_plain_product(monkeypatch, activation, read, written):
    monkeypatch.setattr(matmul_int8_tpu, "ROWS", 64)
    monkeypatch.setattr(matmul_int8_tpu, "COLUMNS", 128)
    matmul_int8_tpu.matmul.clear_cache()
    x, kernel, bias = random(2, 150, 512, seed=0), random(512, 768, seed=1) / 20, random(768, seed=2)
    x = x.at[0, 3].set(0)
    kernel, scale = quantize_weight(kernel, "int8")
    run = partial(matmul_int8_tpu.matmul, activation=activation, read=read, written=written, interpret=True)
    got = run(x, kernel, scale, bias)
    matmul_int8_tpu.matmul.clear_cache()
    assert_close_by_norm(got, quantized_product(x, kernel, scale, bias, activation), 2.0**-8)
