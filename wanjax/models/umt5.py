"""umT5 encoder: the text encoder of Wan2.1 (arXiv 2304.09151; Wan2.1 `wan/modules/t5.py`).

It is T5 v1.1 (arXiv 1910.10683 with the gated GELU of arXiv 2002.05202), but every layer, not only the first, has its
own relative position bias.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding.rules import constrain, gather, lookup
from wanjax.config import UMT5Config
from wanjax.models.layers import Axes, Linear, RMSNorm, stack

normal = jax.nn.initializers.normal(1.0)


class UMT5Encoder(nnx.Module):
    """Token ids to text features."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        c = self.config = config
        embedding = normal(rngs.params(), (c.vocab_size, c.dim), c.param_dtype)
        self.embedding = nnx.Param(embedding, axes=("vocab", "embed"))
        self.blocks = stack(lambda rngs: Block(c, rngs), c.num_layers, rngs)
        self.norm_out = RMSNorm(c.dim, c.eps)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Features of every token.

        Args:
          ids: token ids `[b, l]`, int32.
          mask: `[b, l]`, True at the tokens of the text, False at padding. Padding is not attended to.

        Returns:
          `[b, l, e]` in the config's dtype. Rows of padding hold numbers that mean nothing.
        """
        c = self.config
        mask = constrain(mask, "batch", None)
        x = lookup(self.embedding[...], ids).astype(c.dtype)  # [b, l, e]
        buckets = jnp.asarray(relative_buckets(ids.shape[1], c.num_buckets, c.max_distance))

        def step(x: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return block(x, mask, buckets), None

        x, _ = jax.lax.scan(step, x, self.blocks)
        return self.norm_out(x)


class Block(nnx.Module):
    """Self-attention and gated feed-forward, each behind an RMS norm."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        self.norm_attention = RMSNorm(config.dim, config.eps)
        self.attention = Attention(config, rngs)
        self.norm_ffn = RMSNorm(config.dim, config.eps)
        self.ffn = GatedFFN(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, buckets: jax.Array) -> jax.Array:
        """`x` `[b, l, e]`, `mask` `[b, l]`, `buckets` `[l, l]` -> `[b, l, e]`."""
        x = x + self.attention(self.norm_attention(x), mask, buckets)
        return x + self.ffn(self.norm_ffn(x))


class Attention(nnx.Module):
    """Attention of every token to every token of the text, with a learned bias for each distance.

    The scores are not divided by sqrt(d): T5 was trained that way.
    """

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        c, width = config, config.num_heads * config.head_dim
        self.q, self.k, self.v = (linear(c, c.dim, width, rngs, ("embed", "heads")) for _ in range(3))
        self.o = linear(c, width, c.dim, rngs, ("heads", "embed"))
        self.relative_bias = nnx.Param(jnp.zeros((c.num_buckets, c.num_heads), jnp.float32), axes=(None, "heads"))
        self.num_heads = c.num_heads

    def __call__(self, x: jax.Array, mask: jax.Array, buckets: jax.Array) -> jax.Array:
        """`x` `[b, l, e]`, `mask` `[b, l]` of the keys, `buckets` `[l, l]` (query, key)."""
        b, length, _ = x.shape
        q, k, v = (f(x).reshape(b, length, self.num_heads, -1) for f in (self.q, self.k, self.v))  # [b, l, n, d]
        bias = gather(self.relative_bias[...])[buckets].transpose(2, 0, 1)[None]  # [1, n, l, l]
        # Scores, bias and softmax are float32 whatever the dtype of q: unscaled scores reach hundreds.
        scores = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) + bias  # [b, n, l, l]
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(v.dtype)  # the product with v at the speed of the activations' dtype
        return self.o(jnp.einsum("bnqk,bknd->bqnd", weights, v).reshape(b, length, -1))  # [b, l, e]


class GatedFFN(nnx.Module):
    """`down(gelu(gate(x)) * up(x))` with the tanh form of GELU."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        c = config
        self.gate = linear(c, c.dim, c.ffn_dim, rngs, ("embed", "mlp"))
        self.up = linear(c, c.dim, c.ffn_dim, rngs, ("embed", "mlp"))
        self.down = linear(c, c.ffn_dim, c.dim, rngs, ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, l, e]` -> `[b, l, e]`."""
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


def linear(config: UMT5Config, in_dim: int, out_dim: int, rngs: nnx.Rngs, axes: Axes) -> Linear:
    """A layer without bias: umT5 has none anywhere."""
    return Linear(in_dim, out_dim, rngs, axes=axes, use_bias=False, param_dtype=config.param_dtype)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Which row of the relative bias a (query, key) pair uses: `[l, l]`, int32 (arXiv 1910.10683, section 2.1).

    The lower half of the buckets is for keys before the query or on it, the upper half for keys behind it. Of each
    half, the first half counts single positions; the rest grows geometrically up to `max_distance` and stays there.
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None] - np.arange(length)[:, None]  # [query, key]
    distance = np.abs(offset)
    octave = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    # Distances that are a power of two lie on a boundary; the margin keeps rounding from pulling them below it.
    far = np.minimum(exact + np.floor(octave * (half - exact) + 1e-6), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)
