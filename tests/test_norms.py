"""The kernels of norms for TPUs against what they stand for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding.local import per_token
from sharding.mesh import make_mesh, parse_mesh
from wanjax.models.rope import make_rotation
from wanjax.ops import norms
from wanjax.ops.kernels import norms_tpu

WIDTH, LENGTH, EPS = 256, 300, 1e-6  # two blocks of rows, the second not full


def random(*shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tokens(seed, batch=2):
    return random(batch, LENGTH, WIDTH, seed=seed, dtype=jnp.bfloat16) * 3 + 1


def channels(seed, batch=2):
    return random(batch, 1, WIDTH, seed=seed)


def assert_within_one_rounding(results, expected):
    """Sums of another order may round to the neighbouring bf16 number, in few places."""
    for got, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert got.dtype == wanted.dtype == jnp.bfloat16
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        assert np.all(np.abs(got - wanted) <= 2.0**-7 * np.maximum(np.abs(wanted), 0.1))
        assert np.mean(got != wanted) < 0.02


@pytest.mark.parametrize("batch", [1, 2])
def test_layer_norm(batch):
    args = tokens(0), channels(1, batch), channels(2, batch)
    kernel = norms_tpu.layer_norm(args[0], None, None, *args[1:], eps=EPS, interpret=True)
    assert_within_one_rounding(kernel, (norms.layer_norm(*args, eps=EPS),))


def test_layer_norm_behind_a_gated_sum():
    args = tokens(0), tokens(1), channels(2), channels(3, 1), channels(4, 1)
    kernel = norms_tpu.layer_norm(*args, eps=EPS, interpret=True)
    assert_within_one_rounding(kernel, norms.gated_layer_norm(*args, eps=EPS))


def test_gated_sum():
    args = tokens(0), tokens(1), channels(2)
    kernel = norms_tpu.gated_sum(*args, interpret=True)
    np.testing.assert_array_equal(kernel, norms.gated_sum.__wrapped__(*args))


def test_layer_norm_behind_a_sum():
    x, y, *others = tokens(0), tokens(1), channels(2), channels(3)
    total, result = norms.added_layer_norm(x, y, *others, eps=EPS)
    np.testing.assert_array_equal(total, x + y)
    kernel = norms_tpu.layer_norm(x, y, None, *others, eps=EPS, interpret=True)
    assert_within_one_rounding(kernel, (total, result))


def test_rms_norm():
    args = tokens(0), random(WIDTH, seed=1)
    kernel = norms_tpu.rms_norm(*args, None, None, eps=EPS, interpret=True)
    assert_within_one_rounding(kernel, norms.rms_norm(*args, eps=EPS))


@pytest.mark.parametrize(("head_dim", "parts"), [(128, 2), (64, 1), (32, 2)])
def test_rms_norm_and_rotation(head_dim, parts):
    rotation = make_rotation((3, 10, 10), head_dim, LENGTH)
    args = tokens(0), random(WIDTH, seed=1), rotation.cos, rotation.sin
    kernel = norms_tpu.rms_norm(*args, eps=EPS, parts=parts, interpret=True)
    assert_within_one_rounding(kernel, norms.rms_norm_rotate(*args, eps=EPS, parts=parts))


def test_gradients_are_those_of_the_plain_function_on_one_device_and_on_many():
    args = tokens(0), tokens(1), channels(2), channels(3, 1), channels(4, 1)
    douts = tokens(5), tokens(6)

    def gradients(function, *args):
        return jax.vjp(partial(function, eps=EPS), *args)[1](douts)

    expected = jax.jit(partial(gradients, norms.gated_layer_norm.__wrapped__))(*args)
    for got, wanted in zip(jax.jit(partial(gradients, norms.gated_layer_norm))(*args), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    with jax.set_mesh(make_mesh(parse_mesh("data=2,ulysses=2", 4), jax.devices()[:4])):
        split = PartitionSpec("data", "ulysses")
        specs = split, split, PartitionSpec("data"), PartitionSpec(), PartitionSpec()
        args = [
            jax.device_put(a, jax.NamedSharding(jax.sharding.get_mesh(), s)) for a, s in zip(args, specs, strict=True)
        ]
        douts = tuple(jax.device_put(a, args[0].sharding) for a in douts)
        on_many = jax.jit(
            lambda *a: gradients(lambda *b, eps: per_token(partial(norms.gated_layer_norm, eps=eps), *b), *a)
        )
        for got, wanted in zip(on_many(*args), expected, strict=True):
            got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
            assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_only_tpus_get_the_kernel():
    args = tokens(0), channels(1), channels(2)
    traced = jax.jit(partial(norms.layer_norm, eps=EPS)).trace(*args)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()
