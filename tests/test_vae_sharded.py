"""The VAE on eight devices: videos, latents and every gradient as on one; neighbours exchange rows, never pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from tiny import on, random_like

from sharding.mesh import AXES, MeshShape
from sharding.rules import pictures_spec, shard_parameters, split_pictures
from wanjax.config import VAEConfig
from wanjax.models.vae import VAE
from wanjax.report.hlo import read

# 2x2 in space, 2 in time. Every kind of block, few of each.
CONFIG = VAEConfig(dim=8, num_res_blocks=0, dim_mult=(1, 1), temporal_downsample=(True,))
BATCH, CELLS = 8, (6, 8)
BATCH_AXES, WHOLE = ("data", "fsdp"), (None,) * 4
MESHES = pytest.mark.parametrize("shape", [MeshShape(fsdp=8), MeshShape(ring=8), MeshShape(fsdp=2, ring=2, ulysses=2)])


def abstract_mesh(shape):
    return jax.sharding.use_abstract_mesh(AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Explicit,) * 4))


def abstract(config=CONFIG):
    return jax.eval_shape(lambda: VAE(config, nnx.Rngs(0)))


@functools.cache
def inputs():
    """A network with random weights, biases and scales included, a video and latents."""
    rng = np.random.default_rng(1)
    height, width = CELLS
    video = rng.uniform(-1, 1, (BATCH, 3, 2 * height, 2 * width, 3)).astype(np.float32)
    latents = rng.normal(size=(BATCH, 2, height, width, 16)).astype(np.float32)
    return random_like(abstract()), video, latents


def forward(vae, video, latents):
    return vae.encode_chunk(video)[0], vae.decode_chunk(latents)[0]


@jax.jit
def both(vae, video, latents):
    """Encoded, decoded and the gradients of a number made from both."""

    def loss(*args):
        encoded, decoded = forward(*args)
        return jnp.sum(jnp.sin(encoded)) + jnp.sum(jnp.sin(3 * decoded)), (encoded, decoded)

    (_, outputs), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(vae, video, latents)
    return outputs, gradients


@functools.cache
def alone():
    return jax.device_get(both(*inputs()))


@functools.cache
def program(shape):
    """Results on a mesh, and what the program costs a device."""
    with on(shape):
        vae, *pictures = jax.tree.map(jnp.asarray, inputs())
        arguments = shard_parameters(vae), *(split_pictures(x, CELLS) for x in pictures)
        compiled = both.lower(*arguments).compile()
        return compiled(*arguments), read(compiled)


def assert_same(ours, reference):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        x = np.asarray(x)
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), jax.tree_util.keystr(path)


@MESHES
def test_results_and_gradients_are_those_of_one_device(shape):
    assert_same(program(shape)[0], alone())


@MESHES
def test_every_device_holds_its_part(shape):
    (encoded, decoded), (vae, *_) = program(shape)[0]
    height, width = {(1, 1): (None, None), (8, 1): (None, "ring"), (2, 2): ("ring", "ulysses")}[shape[2:]]
    assert encoded.sharding.spec == P(BATCH_AXES, *WHOLE)
    assert decoded.sharding.spec == P(BATCH_AXES, None, height, width, None)
    parts = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(vae)]
    assert sum(parts) <= 1.1 * sum(leaf.size for leaf in jax.tree.leaves(vae)) / 8


def test_only_weights_and_what_attention_sees_are_gathered():
    (_, (vae, _, latents)), program_of_ring = program(MeshShape(ring=8))
    weights = sum(x.nbytes for x in jax.tree.leaves(vae) if not x.sharding.is_fully_replicated)  # some have 3 or 4 rows
    keys_and_values = 2 * CONFIG.dim * latents.nbytes // latents.shape[-1]  # in each direction, as many as latents
    assert program_of_ring.payload("all-gather") == weights + 2 * keys_and_values + latents.nbytes
    assert program_of_ring.payload("all-to-all") == 0
    assert program_of_ring.payload("collective-permute") > 0


def test_a_size_that_the_mesh_does_not_divide():
    with on(MeshShape(ring=5)):
        ours = jax.jit(forward)(*inputs())
    assert_same(ours, alone()[0])


@pytest.mark.parametrize(
    ("cells", "mesh", "height", "width"),
    [
        ((90, 160), MeshShape(ulysses=4), None, "ulysses"),
        ((90, 160), MeshShape(ring=2, ulysses=2), "ring", "ulysses"),
        ((90, 160), MeshShape(ring=2, ulysses=4), "ring", "ulysses"),
        ((90, 160), MeshShape(ring=4, ulysses=8), None, ("ring", "ulysses")),
        ((160, 90), MeshShape(ring=4, ulysses=4), ("ring", "ulysses"), None),
        ((90, 160), MeshShape(ring=3, ulysses=7), "ring", None),
        ((90, 90), MeshShape(ulysses=8), None, None),
    ],
)
def test_height_and_width_in_as_many_parts_as_divide(cells, mesh, height, width):
    with abstract_mesh(mesh):
        assert pictures_spec((1, 1, *cells, 16), cells) == P(BATCH_AXES, None, height, width, None)


@pytest.mark.parametrize(
    ("batch", "mesh", "names"),
    [
        (2, MeshShape(fsdp=2, ring=2, ulysses=2), (BATCH_AXES, ("ring", "ulysses"))),
        (1, MeshShape(data=2, ulysses=4), (None, "ulysses")),
        (1, MeshShape(), (BATCH_AXES, None)),
    ],
)
def test_streams_and_tiles_fit_together_on_a_mesh(batch, mesh, names):
    video, vae = jax.ShapeDtypeStruct((batch, 5, 16, 16, 3), jnp.float32), abstract()
    whole, split = P(names[0], *WHOLE), P(names[0], None, names[1], None, None)
    with abstract_mesh(mesh):
        latents = jax.eval_shape(lambda vae, x: vae.encode(x), vae, video)
        assert latents.sharding.spec == whole
        assert jax.eval_shape(lambda vae, x: vae.decode(x), vae, latents).sharding.spec == split
