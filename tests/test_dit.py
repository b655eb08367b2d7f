"""The DiT against the reference implementations, and its own invariants."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    GOLDEN,
    assert_close,
    channels_last,
    diffusers_inputs,
    golden,
    golden_arrays,
    official_inputs,
    on,
    pad_text,
    values,
    velocity,
)

from wanjax.config import DiTConfig
from wanjax.models.dit import DiT
from wanjax.models.embeddings import timestep_features, unpatchify
from wanjax.models.rope import axis_dims, make_rotation, rotate
from wanjax.weights import Checkpoint


def test_velocity_equals_diffusers():
    dit, expected = golden("diffusers", "dit"), golden_arrays("diffusers")
    latents, text, image = diffusers_inputs()
    timestep = np.atleast_1d(expected["dit_timestep"]).astype(np.float32)
    assert_close(velocity(dit, latents, timestep, text, image), channels_last(expected["dit_velocity"]))


@pytest.mark.parametrize(
    ("text", "name"), [("prompt_context", "dit_velocity"), ("negative_context", "dit_velocity_negative")]
)
def test_velocity_equals_official(text, name):
    dit, expected = golden("official", "dit"), golden_arrays("official")
    latents, text, image = official_inputs(text)
    timestep = expected["dit_t"].astype(np.float32)
    assert_close(velocity(dit, latents, timestep, text, image), channels_last(expected[name][None]))


KEYS_AND_VALUES = ("k", "norm_k", "v", "k_image", "norm_k_image", "v_image")


def test_steps_do_not_need_the_weights_of_the_context():
    dit, expected = golden("official", "dit"), golden_arrays("official")
    latents, text, image = official_inputs()
    context = dit.context(text, image)
    timestep = expected["dit_t"].astype(np.float32)
    smaller = dit.without_context()
    of_context = (
        "text_embedding.",
        "image_embedding.",
        *(f"blocks.cross_attention.{name}." for name in KEYS_AND_VALUES),
    )
    assert values(dit).keys() - values(smaller).keys() == {path for path in values(dit) if path.startswith(of_context)}
    np.testing.assert_array_equal(smaller(latents, timestep, context), dit(latents, timestep, context))
    assert dit.text_embedding is not None


def test_guidance_batch_equals_two_calls():
    dit, expected = golden("official", "dit"), golden_arrays("official")
    latents, text, image = official_inputs()
    negative = pad_text(expected["negative_context"])
    twice = [np.concatenate([x, x]) for x in (latents, image)]
    timestep = np.full(2, expected["dit_t"][0], np.float32)
    out = velocity(dit, twice[0], timestep, np.concatenate([text, negative]), twice[1])
    assert_close(out[:1], channels_last(expected["dit_velocity"][None]))
    assert_close(out[1:], channels_last(expected["dit_velocity_negative"][None]))


def test_zero_rows_behind_the_prompt_are_attended_to():
    dit, expected = golden("official", "dit"), golden_arrays("official")
    latents, text, image = official_inputs()
    timestep = expected["dit_t"].astype(np.float32)
    cut = velocity(dit, latents, timestep, text[:, : len(expected["prompt_context"])], image)
    assert np.abs(np.asarray(cut) - channels_last(expected["dit_velocity"][None])).max() > 0.1


def test_bfloat16_is_close_and_its_output_float32():
    checkpoint = Checkpoint(GOLDEN / "official")
    dit = checkpoint.load("dit", checkpoint.config("dit", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    expected = golden_arrays("official")
    latents, text, image = official_inputs()
    out = velocity(dit, latents, expected["dit_t"].astype(np.float32), text, image)
    reference = channels_last(expected["dit_velocity"][None])
    assert out.dtype == jnp.float32
    assert np.linalg.norm(out - reference) <= 0.05 * np.linalg.norm(reference)
    kept = (dit.blocks.modulation, dit.blocks.norm_cross.scale, dit.time_embedding.fc_in.kernel)
    assert {p.dtype for p in kept} == {jnp.dtype("float32")}


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_rope_equals_complex_rotation_in_float64(head_dim):
    grid = (3, 5, 7)
    x = np.random.default_rng(0).normal(size=(1, 3 * 5 * 7, 2, head_dim))
    positions = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)  # [l, 3]
    angles = [
        positions[:, i, None] * 10000.0 ** -(np.arange(0, dim, 2) / dim) for i, dim in enumerate(axis_dims(head_dim))
    ]
    turn = np.exp(1j * np.concatenate(angles, -1))[None, :, None]  # [1, l, 1, d / 2]
    rotated = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    reference = np.stack([rotated.real, rotated.imag], -1).reshape(x.shape)
    ours = rotate(jnp.asarray(x, jnp.float32), make_rotation(grid, head_dim, x.shape[1]))
    np.testing.assert_allclose(ours, reference, atol=2e-6)


def test_rope_keeps_float32_accuracy_at_720p():
    rotation = make_rotation((21, 45, 80), 128, 75600)
    angle = 79 * 10000.0 ** -(np.arange(0, 42, 2) / 42)  # the last column
    np.testing.assert_allclose(rotation.cos[-1, -42::2], np.cos(angle), atol=1e-7)
    np.testing.assert_allclose(rotation.sin[-1, -41::2], np.sin(angle), atol=1e-7)


def test_timestep_features_equal_float64():
    timestep = np.concatenate([np.arange(1001), [0.25, 333.3, 999.9]]).astype(np.float32)
    angle = np.outer(timestep.astype(np.float64), 10000.0 ** -(np.arange(128) / 128))
    reference = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    np.testing.assert_allclose(timestep_features(jnp.asarray(timestep), 256), reference, atol=2e-6)


def test_unpatchify_puts_patches_where_they_came_from():
    latents = np.arange(2 * 3 * 4 * 6 * 5, dtype=np.float32).reshape(2, 3, 4, 6, 5)
    tokens = latents.reshape(2, 3, 2, 2, 3, 2, 5).transpose(0, 1, 2, 4, 3, 5, 6).reshape(2, 18, 20)
    np.testing.assert_array_equal(unpatchify(jnp.asarray(tokens), (3, 2, 3), (1, 2, 2)), latents)


def test_published_sizes():
    """Parameters of diffusers' WanTransformer3DModel of this configuration (test_parameter_counts)."""
    small = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "in_channels": 16}
    t2v = DiTConfig(**small, image_dim=None, image_positions=0)
    for config, count in ((DiTConfig(), 16_395_536_704), (t2v, 1_418_996_800)):
        model = jax.eval_shape(lambda config=config: DiT(config, nnx.Rngs(0)))
        assert sum(x.size for x in jax.tree.leaves(model)) == count
    assert (DiTConfig().task, DiTConfig(image_positions=0).task, t2v.task) == ("flf2v", "i2v", "t2v")


@pytest.mark.parametrize("mesh", [False, True])
def test_long_samples_are_computed_one_after_the_other(monkeypatch, mesh):
    """Guidance's two branches, on one device: the same numbers as together, in a loop inside of that over blocks."""
    dit = golden("diffusers", "dit")
    latents, text, image = (np.repeat(x, 2, axis=0) for x in diffusers_inputs())
    text[1] *= 0.5
    timestep = np.float32([900, 300])

    def lowered(busy):
        monkeypatch.setattr("wanjax.models.dit.SEQUENTIAL_BRANCH_MIN_TOKENS", busy)
        return jax.jit(lambda *args: dit(*args)).lower(latents, timestep, context)

    with on() if mesh else contextlib.nullcontext():
        context = dit.context(text, image)
        together, apart = lowered(4096), lowered(1)
        results = [f.compile()(latents, timestep, context) for f in (apart, together)]
    assert_close(*results)
    assert apart.as_text().count("stablehlo.while") == together.as_text().count("stablehlo.while") + 1


@pytest.mark.parametrize(("remat", "mesh"), [("none", False), ("attention", True)])
def test_their_gradients_are_the_same(monkeypatch, remat, mesh):
    dit = golden("diffusers", "dit")
    latents, text, image = (np.repeat(x, 2, axis=0) for x in diffusers_inputs())
    gradients = []
    with on() if mesh else contextlib.nullcontext():
        context = dit.context(text, image)
        for busy in (1, 4096):
            monkeypatch.setattr("wanjax.models.dit.SEQUENTIAL_BRANCH_MIN_TOKENS", busy)
            loss = jax.jit(jax.grad(lambda dit: jnp.sum(dit(latents, np.float32([900, 300]), context, remat) ** 2)))
            gradients.append(jax.tree.leaves(loss(dit)))
    for ours, reference in zip(*gradients, strict=True):
        assert_close(ours, np.asarray(reference))
