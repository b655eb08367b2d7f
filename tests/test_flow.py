"""Flow matching: noising, targets and noise levels against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from wanjax.diffusion import flow

SHAPE = (4, 3, 2, 4, 16)  # [b, f, h, w, c]


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(0), 3)
    x0, noise = (jax.random.normal(key, SHAPE) for key in keys[:2])
    return x0, noise, jax.random.uniform(keys[2], SHAPE[:1])


def test_ends_of_the_path(batch):
    x0, noise, _ = batch
    np.testing.assert_array_equal(flow.interpolate(x0, noise, jnp.zeros(4)), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, jnp.ones(4)), noise)


def test_every_sample_has_its_own_sigma(batch):
    x0, noise, sigma = batch
    x_t = flow.interpolate(x0, noise, sigma)
    for b in range(4):
        np.testing.assert_allclose(x_t[b], (1 - sigma[b]) * x0[b] + sigma[b] * noise[b], rtol=1e-6)


def test_velocity_is_the_derivative_of_the_path(batch):
    x0, noise, sigma = batch
    _, slope = jax.jvp(lambda s: flow.interpolate(x0, noise, s), (sigma,), (jnp.ones(4),))
    np.testing.assert_allclose(flow.velocity(x0, noise), slope, atol=1e-6)


def test_bfloat16_becomes_float32(batch):
    x0, noise, sigma = (x.astype(jnp.bfloat16) for x in batch)
    results = (
        flow.interpolate(x0, noise, sigma),
        flow.velocity(x0, noise),
        flow.loss(x0, noise, sigma),
    )
    assert {x.dtype for x in results} == {jnp.dtype("float32")}


def test_shift():
    sigma = np.linspace(0.01, 0.99, 50)
    shifted = flow.shift_sigma(sigma, 5.0)
    np.testing.assert_allclose(np.log(shifted / (1 - shifted)), np.log(sigma / (1 - sigma)) + np.log(5), rtol=1e-9)
    np.testing.assert_array_equal(flow.shift_sigma(sigma, 1.0), sigma)
    np.testing.assert_array_equal(flow.shift_sigma(np.array([0.0, 1.0]), 16.0), [0.0, 1.0])


def test_sampled_sigmas_are_shifted_logit_normal():
    sigma = flow.sample_sigmas(jax.random.key(1), 20_000, mean=-0.5, std=1.5, shift=3.0)
    assert sigma.dtype == jnp.float32
    assert sigma.shape == (20_000,)
    assert sigma.min() > 0
    assert sigma.max() < 1
    logit = np.log(sigma) - np.log1p(-sigma)
    assert abs(logit.mean() - (-0.5 + np.log(3))) < 0.05
    assert abs(logit.std() - 1.5) < 0.05
    assert not np.array_equal(sigma, flow.sample_sigmas(jax.random.key(2), 20_000, mean=-0.5, std=1.5, shift=3.0))


def test_timestep():
    np.testing.assert_allclose(flow.timestep(jnp.array([0.0, 0.1234, 1.0])), [0, 123.4, 1000], rtol=1e-6)


def test_loss(batch):
    prediction, target, weight = batch
    expected = np.mean((np.asarray(prediction) - np.asarray(target)).reshape(4, -1) ** 2, axis=1)
    np.testing.assert_allclose(flow.loss(prediction, target), expected, rtol=1e-6)
    np.testing.assert_allclose(flow.loss(prediction, target, weight), expected * weight, rtol=1e-6)
    np.testing.assert_array_equal(flow.loss(target, target), np.zeros(4))


def test_shardings_are_kept(batch):
    """A batch split over one mesh axis and the width over another stay so, on a mesh with explicit shardings."""
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "context"))):
        x0, noise = (jax.device_put(x, P("data", None, None, "context")) for x in batch[:2])
        sigma = jax.device_put(batch[2], P("data"))
        x_t = jax.jit(flow.interpolate)(x0, noise, sigma)
        error = jax.jit(flow.loss)(x0, noise)
        assert jax.typeof(x_t).sharding.spec == P("data", None, None, "context", None)
        assert jax.typeof(error).sharding.spec == P("data")
    np.testing.assert_allclose(x_t, flow.interpolate(*batch), atol=1e-6)
