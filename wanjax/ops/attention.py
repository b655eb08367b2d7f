"""Full attention: one reference, one dispatcher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Scores of one chunk: small enough for a core's cache, large enough to keep the matrix units busy.
QUERY_CHUNK = 256


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`softmax(q k^T / sqrt(d)) v` over all keys.

    Args:
      q: queries `[b, lq, n, d]`.
      k, v: keys and values `[b, lk, n, d]`.

    Returns:
      `[b, lq, n, d]` in the dtype of `q`. Softmax statistics are float32.
    """
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return chunked_attention(q, k, v)


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int = QUERY_CHUNK) -> jax.Array:
    """The reference: exact softmax over all keys, a chunk of queries at a time.

    Memory is `[b, n, chunk, lk]`, never `[b, n, lq, lk]`: XLA on CPU would write the whole score matrix otherwise.
    """
    b, length, n, d = q.shape
    chunk = min(chunk, length)
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)
    padded = jnp.pad(q, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    chunks = padded.reshape(b, -1, chunk, n, d).transpose(1, 0, 3, 2, 4)  # [chunks, b, n, chunk, d]
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))  # [b, n, lk, d]

    def attend(q_chunk: jax.Array) -> jax.Array:
        scores = jnp.einsum("bnqd,bnkd->bnqk", q_chunk, k, preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        out = jnp.einsum("bnqk,bnkd->bnqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)

    out = jax.lax.map(attend, chunks)  # [chunks, b, n, chunk, d]
    return out.transpose(1, 0, 3, 2, 4).reshape(b, -1, n, d)[:, :length]  # [b, lq, n, d]
