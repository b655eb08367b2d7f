"""The Wan-VAE against both references, and its promises: causal, streamed, bounded memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GOLDEN, assert_close, golden_arrays, random_like

from wanjax.config import VAEConfig
from wanjax.errors import InputError
from wanjax.models.vae import VAE
from wanjax.models.vae_blocks import Norm, conv
from wanjax.ops.conv import conv2d
from wanjax.weights import Checkpoint

SMALL = VAEConfig(dim=4, num_res_blocks=1, dim_mult=(1, 2), temporal_downsample=(True,))  # 2x2 in space, 2 in time
LAYOUTS = pytest.mark.parametrize("layout", ["diffusers", "official"])

encode = jax.jit(lambda vae, video: vae.encode(video))
decode = jax.jit(lambda vae, latents: vae.decode(latents))
encode_chunk = jax.jit(lambda vae, frames, cache: vae.encode_chunk(frames, cache))
decode_chunk = jax.jit(lambda vae, latents, cache: vae.decode_chunk(latents, cache))


def abstract(config):
    return jax.eval_shape(lambda: VAE(config, nnx.Rngs(0)))


@functools.cache
def small(dtype=jnp.float32):
    """Random weights, biases and scales included, that keep the size of the activations."""
    return jax.tree.map(jnp.asarray, random_like(abstract(dataclasses.replace(SMALL, dtype=dtype))))


@functools.cache
def load(layout):
    """Network, video, latents (normalised by the reference or here), reconstruction; channels last."""
    checkpoint = Checkpoint(GOLDEN / layout)
    config = checkpoint.config("vae")
    expected = golden_arrays(layout)
    if layout == "official":
        video = expected["vae_video_u8"][None].astype(np.float32) / np.float32(127.5) - 1
        latents, recon = expected["vae_latent"][None], expected["vae_recon"][None]
    else:  # diffusers gives the mean as it is
        mean, std = (np.float32(x).reshape(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        video, recon = expected["vae_video"], expected["vae_recon"]
        latents = (expected["vae_latent"] - mean) / std
    return checkpoint.load("vae", config), *(np.moveaxis(x, 1, -1) for x in (video, latents, recon))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@LAYOUTS
def test_encode(layout):
    vae, video, latents, _ = load(layout)
    ours = np.asarray(encode(vae, video))
    assert ours.dtype == np.float32
    assert_close(ours, latents)


@LAYOUTS
def test_mean_before_normalisation(layout):
    vae, video, _, _ = load(layout)
    expected = golden_arrays(layout)
    reference = expected["vae_mu"][None] if layout == "official" else expected["vae_latent"]
    mean, std = np.float32(vae.config.latents_mean), np.float32(vae.config.latents_std)
    assert_close(np.asarray(encode(vae, video)) * std + mean, np.moveaxis(reference, 1, -1))


@LAYOUTS
def test_decode(layout):
    vae, _, latents, recon = load(layout)
    ours = np.asarray(decode(vae, latents))
    assert_close(ours, recon)
    assert np.abs(ours).max() == 1  # the golden clip reaches the clamp


def test_chunks_give_the_whole_clip():
    vae, video, latents, _ = load("official")
    whole, _ = encode_chunk(vae, video, None)
    np.testing.assert_allclose(encode(vae, video), whole, rtol=0, atol=4e-6)
    whole, _ = decode_chunk(vae, latents, None)
    np.testing.assert_allclose(decode(vae, latents), whole, rtol=0, atol=4e-6)


def test_bfloat16_stays_near_float32():
    # Measured: 0.4 % of the latents' norm.
    video = noise(1, 1, 32, 32, 3)
    exact, ours = encode(small(), video), encode(small(jnp.bfloat16), video)
    assert ours.dtype == jnp.float32  # the solver's
    assert 0 < np.linalg.norm(ours - exact) <= 0.01 * np.linalg.norm(exact)


def test_a_caller_may_stream():
    vae, video = small(), noise(1, 9, 32, 32, 3)
    latents, cache = [], None
    for frames in np.split(video, (3,), axis=1):  # 3, 6
        y, cache = encode_chunk(vae, frames, cache)
        latents.append(y)
    assert [x.shape[1] for x in latents] == [2, 3]
    latents = np.concatenate(latents, axis=1)
    np.testing.assert_allclose(latents, encode(vae, video), rtol=0, atol=4e-6)
    frames, cache = [], None
    for chunk in np.split(latents, (2,), axis=1):  # 2, 3
        y, cache = decode_chunk(vae, chunk, cache)
        frames.append(y)
    assert [x.shape[1] for x in frames] == [3, 6]
    np.testing.assert_allclose(np.concatenate(frames, axis=1), decode(vae, latents), rtol=0, atol=4e-6)


def test_later_frames_do_not_change_earlier_ones():
    vae, video, latents = small(), noise(1, 9, 32, 32, 3), noise(1, 5, 16, 16, 16)
    changed = video.copy()
    changed[:, 5:] *= -1
    a, b = np.asarray(encode(vae, video)), np.asarray(encode(vae, changed))
    np.testing.assert_array_equal(a[:, :3], b[:, :3])
    assert np.abs(a[:, 3:] - b[:, 3:]).max() > 1e-3
    changed = latents.copy()
    changed[:, 3:] *= -1
    a, b = np.asarray(decode(vae, latents)), np.asarray(decode(vae, changed))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


def test_an_image_is_a_clip_of_one_frame():
    vae, video, latents = small(), noise(1, 9, 32, 32, 3), noise(1, 5, 16, 16, 16)
    np.testing.assert_allclose(encode(vae, video[:, :1]), encode(vae, video)[:, :1], rtol=0, atol=4e-6)
    np.testing.assert_allclose(decode(vae, latents[:, :1]), decode(vae, latents)[:, :1], rtol=0, atol=4e-6)


def working_memory(function, *shape):
    """Bytes that the compiled function needs beside its inputs and outputs."""
    compiled = function.lower(abstract(SMALL), jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_clip():
    short, long = (working_memory(decode, 1, f, 16, 16, 16) for f in (5, 41))
    assert long <= 1.02 * short
    short, long = (working_memory(encode, 1, f, 32, 32, 3) for f in (9, 81))
    assert long <= 1.02 * short


@pytest.mark.parametrize(
    ("size", "time_stride", "space_stride"),
    [((3, 3, 3), 1, 1), ((3, 1, 1), 2, 1), ((1, 3, 3), 1, 2), ((1, 1, 1), 1, 1)],
)
def test_both_forms_of_the_convolution(monkeypatch, size, time_stride, space_stride):
    """The one for CPUs, and that of all other platforms, which a CPU computes too."""
    x, kernel = noise(2, 5, 6, 8, 4), noise(*size, 4, 3, seed=1)
    split = jax.jit(lambda x, kernel: conv(x, kernel, time_stride, space_stride))(x, kernel)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    whole = jax.jit(lambda x, kernel: conv(x, kernel, time_stride, space_stride))(x, kernel)
    assert whole.shape == (2, (5 - size[0]) // time_stride + 1, 6 // space_stride, 8 // space_stride, 3)
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-5)


def test_only_cpus_get_the_split_convolution():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 5, 8, 8, 4), (3, 3, 3, 4, 4))]
    traced = jax.jit(conv).trace(*shapes)
    count = {p: traced.lower(lowering_platforms=(p,)).as_text().count("stablehlo.convolution") for p in ("cpu", "tpu")}
    assert count == {"cpu": 3, "tpu": 1}


def test_norm():
    x = noise(1, 2, 3, 4, 5) * 1e3
    norm = Norm(5)
    np.testing.assert_allclose(np.linalg.norm(norm(x), axis=-1), 5**0.5, rtol=1e-6)
    np.testing.assert_allclose(norm(x * 1e-9), norm(x), rtol=1e-5)
    np.testing.assert_array_equal(norm(x * 0), 0)


def test_full_size():
    # Parameters: sum(p.numel() for p in diffusers.AutoencoderKLWan().parameters()).
    vae = abstract(VAEConfig(dtype=jnp.bfloat16))
    assert sum(leaf.size for leaf in jax.tree.leaves(vae)) == 126_892_531
    latents = jax.eval_shape(
        lambda vae, x: vae.encode(x), vae, jax.ShapeDtypeStruct((1, 81, 720, 1280, 3), jnp.float32)
    )
    assert (latents.shape, latents.dtype) == ((1, 21, 90, 160, 16), jnp.float32)
    video = jax.eval_shape(lambda vae, x: vae.decode(x), vae, latents)
    assert (video.shape, video.dtype) == ((1, 81, 720, 1280, 3), jnp.bfloat16)


def test_weights_are_stored_as_asked_and_norms_in_float32():
    vae = abstract(dataclasses.replace(SMALL, param_dtype=jnp.bfloat16))
    leaves = jax.tree_util.tree_leaves_with_path(vae)
    assert all((leaf.dtype == jnp.float32) == ("scale" in jax.tree_util.keystr(path)) for path, leaf in leaves)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.encode(jnp.zeros((1, 16, 16, 16, 3))), "16 frames was given"),
        (lambda v: v.encode(jnp.zeros((1, 0, 16, 16, 3))), "0 frames was given"),
        (lambda v: v.encode(jnp.zeros((1, 5, 16, 20, 3))), "20x16 were given"),
        (lambda v: v.encode(jnp.zeros((5, 16, 16, 3))), r"\(5, 16, 16, 3\) was given"),
        (lambda v: v.encode(jnp.zeros((1, 3, 5, 16, 16))), "was given"),
        (lambda v: v.decode(jnp.zeros((1, 2, 2, 2, 4))), r"\(1, 2, 2, 2, 4\) were given"),
        (lambda v: v.decode(jnp.zeros((1, 0, 2, 2, 16))), "were given"),
        (lambda v: v.encode_chunk(jnp.zeros((1, 5, 16, 16, 3)), ()), "5 frames was given"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message) as error:
        call(abstract(VAEConfig()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("stride", "padding"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1))), (1, ((0, 0), (0, 0)))])
def test_gradient_of_a_convolution_is_xlas(stride, padding):
    x = jax.random.normal(jax.random.key(0), (3, 8, 10, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 5))

    def gradients(convolution):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(convolution(x, k, stride, padding))), argnums=(0, 1))(x, kernel)

    for ours, wanted in zip(gradients(conv2d), gradients(conv2d.fun), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)
