"""A network that starts from a checkpoint with fewer inputs gives that checkpoint's velocity, and learns the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GOLDEN, assert_close, assert_same_model, normal, on, values

from sharding.mesh import MeshShape
from sharding.rules import parameter_sharding
from wanjax.config import DiTConfig
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.training.initialize import load_warm_start, warm_start_config
from wanjax.weights import Checkpoint, save
from wanjax.weights.load import parameter_shapes, parameters
from wanjax.weights.quantize import quantize

T2V = Checkpoint(GOLDEN / "diffusers_t2v")
FLF2V = dataclasses.replace(T2V.config("dit"), in_channels=36, image_dim=40, image_positions=10)
SHAPE = (2, 3, 6, 8)


NOISE, CONTROL = normal(0, *SHAPE, 16), 3 * normal(1, *SHAPE, 20)
TEXT, IMAGE = normal(2, 2, 512, FLF2V.text_dim), 3 * normal(3, 2, 10, 40)
TIMESTEP = np.float32([900, 77])


@jax.jit
def velocity(dit: DiT, image_condition, image):
    x = NOISE if image_condition is None else jnp.concatenate([NOISE, image_condition], axis=-1)
    return dit(x, TIMESTEP, dit.context(TEXT, image))


@jax.jit
def gradients(dit: DiT):
    x, target = np.concatenate([NOISE, CONTROL], axis=-1), normal(4, *SHAPE, 16)
    return jax.grad(lambda dit: ((dit(x, TIMESTEP, dit.context(TEXT, IMAGE)) - target) ** 2).mean())(dit)


@pytest.mark.parametrize("positions", [0, 10])
def test_t2v_widened_gives_its_velocity(positions):
    config = dataclasses.replace(FLF2V, image_positions=positions)
    expected = velocity(T2V.load("dit", T2V.config("dit")), None, None)
    widened = load_warm_start(T2V, config)
    assert widened.config == config
    assert {path: x.shape for path, x in values(widened).items()} == parameter_shapes("dit", config)
    for image in (None, IMAGE):
        np.testing.assert_allclose(velocity(widened, CONTROL, image), expected, atol=1e-6)


def test_without_an_image_branch():
    """The joint phase of Wan's training has the image condition and no image encoder."""
    config = dataclasses.replace(FLF2V, image_dim=None, image_positions=0)
    expected = velocity(T2V.load("dit", T2V.config("dit")), None, None)
    np.testing.assert_allclose(velocity(load_warm_start(T2V, config), CONTROL, None), expected, atol=1e-6)


def test_new_weights_learn():
    """Those that are zero from the first step; the others of the branch as soon as these are not."""
    dit = load_warm_start(T2V, FLF2V)
    grads = gradients(dit)
    assert np.all(np.abs(grads.patch_embedding.kernel[...]).max((0, 1, 2, 4)) > 0)
    attention = grads.blocks.cross_attention
    assert np.abs(attention.v_image.kernel[...]).max() > 1e-6
    assert np.abs(attention.k_image.kernel[...]).max() == 0
    kernel = dit.blocks.cross_attention.v_image.kernel
    dit.blocks.cross_attention.v_image.kernel = kernel.replace(kernel[...] - attention.v_image.kernel[...])
    grads = gradients(dit)
    for x in (grads.blocks.cross_attention.k_image.kernel, grads.image_embedding.fc_in.kernel):
        assert np.abs(x[...]).max() > 0
    assert np.abs(grads.image_embedding.positions[...]).max() > 0


def i2v_checkpoint(folder):
    """The golden flf2v network without its position embedding."""
    base = Checkpoint(GOLDEN / "diffusers")
    config = base.config("dit")
    dit = base.load("dit", config)
    dit.image_embedding.positions = None
    dit.config = dataclasses.replace(config, image_positions=0)
    save(folder, "diffusers", {"dit": dit})
    return Checkpoint(folder), config


def test_i2v_gains_a_position_embedding_of_zeros(tmp_path):
    checkpoint, config = i2v_checkpoint(tmp_path / "i2v")
    i2v = checkpoint.load("dit", checkpoint.config("dit"))
    flf2v = load_warm_start(checkpoint, config)
    assert not np.any(flf2v.image_embedding.positions[...])
    assert flf2v.image_embedding.positions.shape == (10, 40)
    np.testing.assert_array_equal(velocity(flf2v, CONTROL, IMAGE), velocity(i2v, CONTROL, IMAGE))
    flf2v.image_embedding.positions = None
    assert_same_model(flf2v, i2v)


def test_the_same_network_is_loaded_as_it_is():
    base = Checkpoint(GOLDEN / "diffusers")
    config = base.config("dit")
    assert_same_model(load_warm_start(base, config), base.load("dit", config))


def test_what_a_checkpoint_is_for_does_not_bind_training(tmp_path):
    """The weights are the same, whatever official files call the network."""
    base = Checkpoint(GOLDEN / "official")
    config = base.config("dit")
    told = dataclasses.replace(config, model_type="i2v")
    assert warm_start_config(base, told) == config
    dit = load_warm_start(base, told)
    assert dit.config == told
    assert_same_model(dit, base.load("dit", config))


def test_on_a_mesh():
    alone = load_warm_start(T2V, FLF2V, seed=3)
    expected = np.asarray(velocity(alone, CONTROL, IMAGE))
    with on(MeshShape(fsdp=2, ring=2, ulysses=2)):
        dit = load_warm_start(T2V, FLF2V, parameter_sharding, seed=3)
        assert_same_model(dit, alone)
        for leaf in parameters(dit).values():
            assert leaf[...].sharding.is_equivalent_to(parameter_sharding((), leaf), leaf.ndim)
        kernel = dit.blocks.cross_attention.v_image.kernel[...]
        assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
        assert_close(velocity(dit, CONTROL, IMAGE), expected)
    kernels = [values(x)["image_embedding.fc_in.kernel"] for x in (dit, load_warm_start(T2V, FLF2V, seed=4))]
    assert np.all(np.std(kernels, axis=(1, 2)) > 0.1)
    assert np.any(kernels[0] != kernels[1])


def test_what_is_refused(tmp_path):
    flf2v = Checkpoint(GOLDEN / "diffusers")
    with pytest.raises(InputError, match=r"has in_channels 36, the config's dit 16; .* with fewer inputs"):
        warm_start_config(flf2v, T2V.config("dit"))
    for changes in ({"dim": 128}, {"num_layers": 3}, {"eps": 1e-5}, {"text_dim": 16}):
        ((name, value),) = changes.items()
        with pytest.raises(InputError, match=rf"has {name} \S+, the config's dit {value};"):
            warm_start_config(T2V, dataclasses.replace(FLF2V, **changes))
    with pytest.raises(InputError, match="has image_dim 40, the config's dit 24"):
        warm_start_config(flf2v, dataclasses.replace(FLF2V, image_dim=24))
    save(tmp_path / "c", "diffusers", {"dit": quantize(T2V.load("dit", T2V.config("dit")), "int8")})
    with pytest.raises(InputError, match="quantised to int8, which has no gradient"):
        warm_start_config(Checkpoint(tmp_path / "c"), FLF2V)
    assert warm_start_config(T2V, FLF2V) == T2V.config("dit")


def test_published_sizes():
    """T2V-14B becomes FLF2V-14B: the same layers, and no other numbers differ."""
    t2v = DiTConfig(in_channels=16, image_dim=None, image_positions=0)
    different = {f.name for f in dataclasses.fields(t2v) if getattr(t2v, f.name) != getattr(DiTConfig(), f.name)}
    assert different == {"in_channels", "image_dim", "image_positions"}
