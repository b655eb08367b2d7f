"""The text encoder against both reference implementations, and its own invariants."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import GOLDEN, assert_close, golden_arrays

from wanjax.conditioning.text import Tokenizer
from wanjax.config import UMT5Config
from wanjax.models.umt5 import UMT5Encoder, relative_buckets

encode = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))


@functools.cache
def load(layout, dtype=jnp.float32):
    return tiny.load(GOLDEN / layout, "umt5", dtype=dtype, param_dtype=dtype), golden_arrays(layout)


def features(encoder, ids, length):
    """The rows of the text, for one text of `length` tokens."""
    return np.asarray(encode(encoder, ids[None], np.arange(len(ids))[None] < length), np.float32)[0, :length]


@pytest.mark.parametrize("text", ["prompt", "negative"])
def test_equals_official(text):
    encoder, expected = load("official")
    ours = features(encoder, expected[f"{text}_ids"], int(expected[f"{text}_len"]))
    assert_close(ours, expected[f"{text}_context"])


def test_all_relative_positions_equal_official():
    encoder, expected = load("official")
    assert_close(features(encoder, expected["tok_ids"][-1], 512)[::8], expected["long_context"])


@pytest.mark.parametrize("text", ["prompt", "negative"])
def test_equals_diffusers(text):
    encoder, expected = load("diffusers")
    prompt = json.loads((GOLDEN / "diffusers/case.json").read_text())[f"{text}_prompt" if text == "negative" else text]
    ids, mask = Tokenizer(GOLDEN / "diffusers/tokenizer")([prompt])
    reference = expected[f"{text}_embeds"][0]
    assert_close(features(encoder, ids[0], mask.sum()), reference[: mask.sum()])
    assert not reference[mask.sum() :].any()


def test_padding_is_not_attended():
    encoder, expected = load("official")
    ids, length = expected["prompt_ids"], int(expected["prompt_len"])
    other = np.where(np.arange(512) < length, ids, 7)
    np.testing.assert_array_equal(features(encoder, ids, length), features(encoder, other, length))
    assert np.abs(features(encoder, ids, 512)[:length] - features(encoder, ids, length)).max() > 1e-3


def test_relative_buckets():
    # First distance of every bucket from transformers 5.23 (UMT5Attention._relative_position_bucket, 32 buckets, 128):
    # the lowest n for which it gives the bucket, for keys n before the query.
    first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    before = np.searchsorted(first, np.arange(512), side="right") - 1
    buckets = relative_buckets(512, 32, 128)
    np.testing.assert_array_equal(buckets[-1, ::-1], before)
    np.testing.assert_array_equal(buckets[0, 1:], before[1:] + 16)
    np.testing.assert_array_equal(np.diagonal(buckets), 0)


def test_bfloat16_stays_near_float32():
    # The weights are stored in bfloat16, so only the arithmetic differs. Measured: 0.014.
    encoder, expected = load("official", jnp.bfloat16)
    ids, length = expected["prompt_ids"], int(expected["prompt_len"])
    assert encode(encoder, ids[None], np.arange(512)[None] < length).dtype == jnp.bfloat16
    error = features(encoder, ids, length) - expected["prompt_context"]
    assert np.linalg.norm(error) <= 0.02 * np.linalg.norm(expected["prompt_context"])


def test_bfloat16_does_not_overflow_where_float16_would():
    def outliers(dtype):
        """What large activations inside the feed-forward do; trained T5 has them."""
        encoder, expected = load("official", dtype)
        encoder = jax.tree.map(lambda x: x, encoder)  # the cached one stays as it is
        encoder.blocks.ffn.up.kernel[...] *= 2**15
        return features(encoder, expected["prompt_ids"], int(expected["prompt_len"]))

    exact, rounded = outliers(jnp.float32), outliers(jnp.bfloat16)
    assert np.linalg.norm(rounded - exact) <= 0.02 * np.linalg.norm(exact)
    assert not np.isfinite(outliers(jnp.float16)).all()


def test_norms_and_relative_bias_stay_float32():
    encoder = jax.eval_shape(lambda: UMT5Encoder(UMT5Config(param_dtype=jnp.bfloat16), nnx.Rngs(0)))
    assert encoder.embedding.dtype == encoder.blocks.ffn.gate.kernel.dtype == jnp.bfloat16
    assert encoder.norm_out.scale.dtype == encoder.blocks.norm_ffn.scale.dtype == jnp.float32
    assert encoder.blocks.attention.relative_bias.dtype == jnp.float32


def test_size_of_umt5_xxl():
    # with torch.device("meta"): sum(p.numel() for p in transformers.UMT5EncoderModel(transformers.UMT5Config(
    #   vocab_size=256384, d_model=4096, d_ff=10240, num_heads=64, d_kv=64, num_layers=24)).parameters())
    encoder = jax.eval_shape(lambda: UMT5Encoder(UMT5Config(), nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(encoder)) == 5_680_910_336
