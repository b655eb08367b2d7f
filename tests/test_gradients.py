"""The same loss and gradients on every mesh, in parts or whole, and whatever is computed again."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.mesh import MeshShape, make_mesh
from wanjax.config import DiTConfig, TrainConfig
from wanjax.data.batch import make_batch
from wanjax.data.synthetic import Synthetic
from wanjax.training.flow_matching import FlowMatching
from wanjax.training.state import abstract_state
from wanjax.training.step import gradients

DIT = DiTConfig(
    dim=64,
    ffn_dim=96,
    num_heads=8,
    num_layers=2,
    freq_dim=16,
    text_dim=16,
    text_len=8,
    image_dim=16,
    image_positions=6,
)
CONFIG = TrainConfig(
    workdir="unused", dit=DIT, height=32, width=64, frames=9, batch=8, warmup=0, remat="none", dtype="float32"
)
# XLA:CPU compiles a training step for half a minute to run it for milliseconds.
FAST = {"xla_backend_optimization_level": 0}
UNEVEN = dataclasses.replace(CONFIG, height=48, width=80)  # 45 tokens
MESHES = [
    (MeshShape(fsdp=8), CONFIG),
    (MeshShape(ring=8), UNEVEN),
    (MeshShape(ulysses=8), UNEVEN),
    (MeshShape(fsdp=2, ring=2, ulysses=2), UNEVEN),
    (MeshShape(ring=2, ulysses=4), CONFIG),
    (MeshShape(data=2, ring=2, ulysses=2), CONFIG),
    (MeshShape(data=2, fsdp=2, ulysses=2), dataclasses.replace(UNEVEN, batch=1)),
    (MeshShape(data=2, fsdp=2, ring=2), dataclasses.replace(CONFIG, accumulate=2)),
    (MeshShape(), dataclasses.replace(CONFIG, remat="block")),
    (MeshShape(), dataclasses.replace(CONFIG, remat="attention")),
]


def on(shape):
    """The mesh, on as many of the fake devices as it needs."""
    return jax.set_mesh(make_mesh(shape, jax.devices()[: math.prod(shape)]))


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


def loss_and_gradients(config, shape):
    """Of step 0, on the host, and the gradients' shardings."""
    with on(shape):
        state = random_state(config)
        batch, objective = make_batch(Synthetic(config, DIT), 0, config.batch), FlowMatching(config, DIT)

        def run(state, batch):
            return gradients(config, objective, state.model, objective.prepare(batch, state.key()))

        loss, grads = jax.jit(run, compiler_options=FAST)(state, batch)
        for g, x in zip(jax.tree.leaves(grads), jax.tree.leaves(state.model), strict=True):
            assert g.dtype == jnp.float32
            assert g.sharding == x.sharding
        return float(loss), jax.device_get(grads)


@functools.cache
def one_device(config):
    return loss_and_gradients(config, MeshShape())


def assert_same(ours, theirs, tolerance):
    """Loss and every gradient leaf, in relative L2."""
    assert abs(ours[0] - theirs[0]) <= tolerance * abs(theirs[0])
    expected = dict(jax.tree_util.tree_flatten_with_path(theirs[1])[0])
    got = dict(jax.tree_util.tree_flatten_with_path(ours[1])[0])
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.linalg.norm(leaf) > 0, path
        assert np.linalg.norm(got[path] - leaf) <= tolerance * np.linalg.norm(leaf), path


@pytest.mark.parametrize(("shape", "config"), MESHES)
def test_gradients_equal_one_device(shape, config):
    whole = dataclasses.replace(config, accumulate=1, remat="none")
    assert_same(loss_and_gradients(config, shape), one_device(whole), 1e-5)
