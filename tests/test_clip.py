"""The image encoder against both reference implementations, and its own invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import GOLDEN, assert_close, golden_arrays

from wanjax.conditioning.images import clip_pixels, read_image
from wanjax.config import CLIPConfig
from wanjax.models.clip import CLIPVision

encode = jax.jit(lambda clip, pixels: clip(pixels))


@functools.cache
def load(layout, dtype=jnp.float32):
    return tiny.load(GOLDEN / layout, "clip", dtype=dtype, param_dtype=dtype), golden_arrays(layout)


@pytest.mark.parametrize("case", ["clip", "large_clip"])
def test_equals_official(case):
    clip, expected = load("official")
    assert_close(encode(clip, np.moveaxis(expected[f"{case}_pixels"], 1, -1)), expected[f"{case}_features"])


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_from_picture_to_features(layout):
    clip, expected = load(layout)
    size = clip.config.image_size
    frames = [clip_pixels(read_image(GOLDEN / layout / f"{name}.png"), size, layout) for name in ("first", "last")]
    assert_close(encode(clip, np.stack(frames)), expected["clip_features"])


def test_bfloat16_stays_near_float32():
    # Measured: 0.0073 with weights and arithmetic in bfloat16.
    clip, expected = load("official", jnp.bfloat16)
    ours = encode(clip, np.moveaxis(expected["clip_pixels"], 1, -1))
    assert ours.dtype == jnp.bfloat16
    error = np.asarray(ours, np.float32) - expected["clip_features"]
    assert np.linalg.norm(error) <= 0.02 * np.linalg.norm(expected["clip_features"])


def copy(clip):
    return jax.tree.map(lambda x: x, clip)  # the cached one stays as it is


def test_last_block_and_closing_norm_do_not_touch_the_features():
    clip, expected = load("official")
    pixels = np.moveaxis(expected["clip_pixels"], 1, -1)
    changed = copy(clip)
    scale = changed.blocks.norm2.scale
    scale[...] = scale[...].at[-1].set(7.0)
    changed.norm_post.scale[...] *= 7.0
    np.testing.assert_array_equal(encode(changed, pixels), encode(clip, pixels))
    scale[...] = scale[...].at[-2].set(7.0)
    assert np.abs(encode(changed, pixels) - encode(clip, pixels)).max() > 1e-3


def test_class_token_first_then_patches_row_by_row():
    clip, expected = load("official")
    clip = copy(clip)
    clip.blocks.attention.o.kernel[...] *= 0  # without attention a token sees its own patch only
    pixels = np.moveaxis(expected["clip_pixels"], 1, -1)
    changed = pixels.copy()
    changed[:, :14, 28:] += 1  # upper right of 3 x 3 patches
    moved = np.abs(encode(clip, changed) - encode(clip, pixels)).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(moved), [3])


def test_size_of_vit_h():
    # with torch.device("meta"): sum(p.numel() for p in transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
    #   hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
    #   patch_size=14, hidden_act="gelu")).parameters())
    clip = jax.eval_shape(lambda: CLIPVision(CLIPConfig(), nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(clip)) == 630_766_080
