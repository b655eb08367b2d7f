"""Full attention: one reference, one dispatcher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Small enough for the chunk's scores to stay in the cache, large enough for matrix products at full speed.
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
    """The reference: exact softmax over all keys, for one head and one chunk of queries at a time.

    The scores in memory are `[chunk, lk]`, which stay in a CPU's cache; XLA would write all of `[b, n, lq, lk]`.
    """
    b, length, n, d = q.shape
    chunk = min(chunk, length)
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)  # scaled in float32: d**-0.5 is not exact in bf16
    q = jnp.pad(q, ((0, 0), (0, -length % chunk), (0, 0), (0, 0))).transpose(0, 2, 1, 3)  # [b, n, lq, d]
    q = q.reshape(b * n, -1, chunk, d)  # [b * n, chunks, chunk, d]
    k = k.transpose(0, 2, 3, 1).reshape(b * n, d, -1)  # [b * n, d, lk]
    v = v.transpose(0, 2, 1, 3).reshape(b * n, -1, d)  # [b * n, lk, d]

    def attend(q_chunk: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.matmul(q_chunk, k, preferred_element_type=jnp.float32)  # [chunk, lk]
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)  # [chunk, d]
        return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q_chunk.dtype)

    def attend_head(head: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = head
        return jax.lax.map(lambda q_chunk: attend(q_chunk, k, v), q)  # [chunks, chunk, d]

    out = jax.lax.map(attend_head, (q, k, v)).reshape(b, n, -1, d)  # [b, n, lq, d]
    return out.transpose(0, 2, 1, 3)[:, :length]  # [b, lq, n, d]
