"""AdamW with moments in 8 bits: against float32 AdamW over 200 steps, and what is stored against what it stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import DIT, TRAIN, normal, on

from sharding.mesh import MeshShape
from wanjax.data.batch import make_batch
from wanjax.training.adam_8bit import scale_by_adam_8bit
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.objectives import make_objective
from wanjax.training.state import abstract_state, init_state
from wanjax.training.step import make_step

SIZES = (24, 256, 16)  # both matrices are in 8 bits: one of two blocks a row, one of rows shorter than a block
CODES = {"kernel1": jnp.int8, "kernel2": jnp.int8, "bias": jnp.float32}


def problem():
    """A small network that shall do what another does, its inputs of very different sizes; loss and start."""
    i, h, o = SIZES
    x = normal(0, 512, i) * np.logspace(-2, 1, i, dtype=np.float32)
    y = np.tanh(x @ normal(1, i, h) / i) @ normal(2, h, o) / h**0.5
    start = {"kernel1": normal(3, i, h) / i**0.5, "bias": np.zeros(h, np.float32), "kernel2": normal(4, h, o) / h**0.5}

    x, y = jnp.asarray(x), jnp.asarray(y)

    def loss(w, key):
        rows = jax.random.randint(key, (64,), 0, 512)
        made = jnp.tanh(x[rows] @ w["kernel1"] + w["bias"]) @ w["kernel2"]
        return jnp.mean((made - y[rows]) ** 2)

    return loss, start


def train(adam, steps=200):
    """Losses and weights of AdamW with these moments."""
    loss, weights = problem()
    optimizer = optax.chain(adam, optax.add_decayed_weights(1e-2), optax.scale_by_learning_rate(3e-3))

    def step(carry, number):
        weights, state = carry
        value, grads = jax.value_and_grad(loss)(weights, jax.random.fold_in(jax.random.key(0), number))
        updates, state = optimizer.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    weights = jax.tree.map(jnp.asarray, weights)
    (weights, state), losses = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(
        (weights, optimizer.init(weights))
    )
    return np.asarray(losses), jax.device_get(weights), state[0]


def test_two_hundred_steps_are_those_of_float32():
    expected, weights, _ = train(optax.scale_by_adam())
    losses, ours, state = train(scale_by_adam_8bit())
    assert losses[-20:].mean() < 0.1 * losses[:3].mean()  # it is a problem that is learned
    np.testing.assert_allclose(losses[-20:].mean(), expected[-20:].mean(), rtol=0.05)
    np.testing.assert_allclose(losses, expected, rtol=0.25)
    _, start = problem()
    for name, dtype in CODES.items():
        assert state.mu[name].dtype == dtype
        moved, wanted = ours[name] - start[name], weights[name] - start[name]
        assert np.linalg.norm(moved - wanted) < 0.15 * np.linalg.norm(wanted), name
    stored = sum(x.nbytes for x in jax.tree.leaves((state.mu, state.nu, state.mu_scale, state.nu_scale)))
    assert stored < 0.36 * 2 * sum(x.nbytes for x in jax.tree.leaves(weights))


def test_what_is_stored_is_the_moment_in_the_mean():
    """Of a gradient that never changes: m and v are its own and its square, at every size within a block."""
    adam, g = scale_by_adam_8bit(0.9, 0.9), {"kernel": jnp.asarray(normal(0, 64, 256) * np.logspace(-2, 0, 256))}
    update = jax.jit(adam.update)
    state, sums = adam.init(g), [0.0, 0.0]
    for step in range(300):
        _, state = update(g, state)
        if step >= 100:
            for i, (code, scale) in enumerate(((state.mu, state.mu_scale), (state.nu, state.nu_scale))):
                x = np.asarray(code["kernel"], np.float64) ** (i + 1)
                sums[i] += x.reshape(64, 2, -1) * np.asarray(scale["kernel"])[..., None] / 200
    g = np.asarray(g["kernel"]).reshape(64, 2, -1)
    for mean, wanted in zip(sums, (g, g * g), strict=True):
        largest = np.abs(wanted).max(axis=-1, keepdims=True)
        assert np.abs(mean - wanted).max() < 0.01 * largest.max()
        assert np.abs((mean - wanted) / largest).mean() < 2e-3


@pytest.mark.slow
def test_a_training_on_a_mesh_with_moments_in_the_hosts_memory(tmp_path):
    """A network learns with it; moments are split as the weights, wait where they are to, and come back so."""
    config = dataclasses.replace(TRAIN, dit=DIT, optimizer="adamw8bit", offload_optimizer=True, learning_rate=1e-2)
    with on(MeshShape(fsdp=2, ulysses=2)):
        objective = make_objective(config)
        state, step = init_state(config, objective), make_step(objective)
        batch = make_batch(objective.open_data(config).source, 0, config.batch)
        losses = []
        for _ in range(30):
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer) if x.ndim}
        assert kinds == {"pinned_host"}
        kernel = state.optimizer[0].mu.blocks.ffn.fc_in.kernel[...]
        assert kernel.dtype == jnp.int8
        assert kernel.sharding.spec == state.model.blocks.ffn.fc_in.kernel[...].sharding.spec
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(abstract_state(config, objective)), strict=True):
            assert (x.sharding.spec, x.sharding.memory_kind or "device") == (
                y.sharding.spec,
                y.sharding.memory_kind or "device",
            )
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
        checkpoints = TrainCheckpoints(tmp_path)
        checkpoints.save(state, 30)
        checkpoints.wait()
        again, _ = checkpoints.restore(abstract_state(config, objective))
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
            assert x.sharding == y.sharding
            np.testing.assert_array_equal(x, y)
        checkpoints.close()
