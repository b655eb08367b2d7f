"""The same velocity, loss and gradients on every mesh, in parts or whole, and whatever is computed again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DIT, TRAIN, on

from sharding.mesh import MeshShape
from wanjax.data.batch import make_batch
from wanjax.data.synthetic import Synthetic
from wanjax.diffusion import flow
from wanjax.training.objectives.flow_matching import FlowMatching
from wanjax.training.state import abstract_state
from wanjax.training.step import gradients, make_step

CONFIG = dataclasses.replace(TRAIN, dit=DIT, width=64, frames=9, batch=8, remat="none")
UNEVEN = dataclasses.replace(CONFIG, height=48, width=80)  # 45 tokens
SPLIT = MeshShape(fsdp=2, ring=2, ulysses=2)
MESHES = [
    (MeshShape(fsdp=8), CONFIG),
    (MeshShape(fsdp=8), UNEVEN),
    (MeshShape(ring=8), CONFIG),
    (MeshShape(ring=8), UNEVEN),
    (MeshShape(ulysses=8), CONFIG),
    (MeshShape(ulysses=8), UNEVEN),
    (SPLIT, CONFIG),
    (SPLIT, UNEVEN),
    (MeshShape(ring=2, ulysses=4), CONFIG),
    (MeshShape(ring=2, ulysses=4), UNEVEN),
    (MeshShape(data=2, fsdp=4), UNEVEN),
    (MeshShape(data=2, ring=4), CONFIG),
    (MeshShape(data=2, ulysses=4), UNEVEN),
    (MeshShape(data=2, ring=2, ulysses=2), CONFIG),
    (MeshShape(data=2, fsdp=2, ulysses=2), dataclasses.replace(UNEVEN, batch=1)),
    (MeshShape(data=2, fsdp=2, ring=2), dataclasses.replace(CONFIG, accumulate=2)),
    (MeshShape(), dataclasses.replace(CONFIG, remat="block")),
    (MeshShape(), dataclasses.replace(CONFIG, remat="attention")),
    (SPLIT, dataclasses.replace(UNEVEN, remat="dots")),
    (SPLIT, dataclasses.replace(UNEVEN, remat="offload")),
]


def random_state(config, dit=DIT):
    """A state in which no weight is zero, so that every gradient counts; the same on every mesh."""
    abstract = abstract_state(config, FlowMatching(config, dit))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        if "scale" in str(path):  # attention that tells tokens apart: else gradients are what rounding leaves of zero
            values = 1.5 + 0.2 * values
        elif "kernel" in str(path):
            values = values * leaf.shape[-2] ** -0.5
        return jax.device_put((values if leaf.ndim else 0 * values).astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def results(config, shape):
    """Loss, gradients and velocity of step 0, on the host."""
    with on(shape):
        state = random_state(config)
        batch, objective = make_batch(Synthetic(config, DIT), 0, config.batch), FlowMatching(config, DIT)

        def run(state, batch):
            noised = objective.prepare(batch, state.key())
            x = flow.interpolate(batch.latents, noised.noise, noised.sigma)
            x = jnp.concatenate([x, batch.image_condition], axis=-1)
            velocity = state.model(x, flow.timestep(noised.sigma), state.model.context(batch.text, batch.image))
            return *gradients(objective.loss, state.model, noised, config.accumulate), velocity

        loss, grads, velocity = jax.jit(run)(state, batch)
        for g, x in zip(jax.tree.leaves(grads), jax.tree.leaves(state.model), strict=True):
            assert g.dtype == jnp.float32
            assert g.sharding == x.sharding
        return jax.device_get((loss, grads, velocity))


@functools.cache
def one_device(config):
    return results(config, MeshShape())


def assert_same(ours, theirs, tolerance):
    """Every array, in relative L2."""
    expected = dict(jax.tree_util.tree_flatten_with_path(theirs)[0])
    got = dict(jax.tree_util.tree_flatten_with_path(ours)[0])
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.linalg.norm(leaf) > 0, path
        assert np.linalg.norm(got[path] - leaf) <= tolerance * np.linalg.norm(leaf), path


@pytest.mark.parametrize(("shape", "config"), MESHES)
def test_velocity_loss_and_gradients_equal_one_device(shape, config):
    whole = dataclasses.replace(config, accumulate=1, remat="none")
    assert_same(results(config, shape), one_device(whole), 1e-5)


def test_offloaded_activations_wait_in_the_hosts_memory():
    config = dataclasses.replace(CONFIG, remat="offload")
    objective = FlowMatching(config, DIT)
    with on(MeshShape()):
        state, batch = abstract_state(config, objective), make_batch(Synthetic(config, DIT), 0, config.batch)
        program = str(jax.make_jaxpr(make_step(objective))(state, batch))
    assert f"<host>[{DIT.num_layers},{config.batch}@" in program  # a layer's input and attention, all layers together
