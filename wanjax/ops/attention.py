"""Full attention: one reference, one dispatcher.

`attention` is what a network calls. `kernel` chooses by platform, or as it is told, what works on one block of keys,
with which `sharding.ring` attends to a sequence that no device holds as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from wanjax.config import Attention
from wanjax.errors import InputError
from wanjax.ops.kernels import (
    LOWEST,
    Forward,
    Gradients,
    Kernel,
    cross_tpu,
    cudnn,
    flash_tpu,
    int8fp8,
    int8fp8_gpu,
    int8fp8_tpu,
)

# Small enough for the chunk's scores to stay in the cache, large enough for matrix products at full speed.
QUERY_CHUNK = 256
SMALL_SCORES = 2**14
"""Scores of a head: up to here a loop over heads costs a CPU more than what it does for each."""


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`softmax(q k^T / sqrt(d)) v` over all keys. The gradient makes the scores again: none are ever stored.

    Args:
      q: queries `[b, lq, n, d]`.
      k, v: keys and values `[b, lk, n, d]`.

    Returns:
      `[b, lq, n, d]` in the dtype of `q`. Softmax statistics are float32.
    """
    return attention_forward(q, k, v)[0]


def attention_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output, and what the gradient needs."""
    out, lse = kernel().forward(swap(q), swap(k), swap(v), None, q.dtype)
    out, lse = named(swap(out)), named(lse)  # [b, lq, n, d], [b, n, lq]
    return out, (q, k, v, out, lse)


def attention_backward(saved: tuple[jax.Array, ...], dout: jax.Array) -> Gradients:
    """Gradients of q, k and v."""
    q, k, v, out, lse = saved
    delta = softmax_delta(out, dout).swapaxes(1, 2)  # [b, n, lq]
    dq, dk, dv = kernel().backward(swap(q), swap(k), swap(v), None, lse, delta, swap(dout))
    return swap(dq).astype(q.dtype), swap(dk).astype(k.dtype), swap(dv).astype(v.dtype)  # as custom_vjp demands


attention.defvjp(attention_forward, attention_backward)  # pyright: ignore[reportFunctionMemberAccess]


def summed_attention(q: jax.Array, *keys_and_values: jax.Array) -> jax.Array:
    """The sum of attention to several sequences with the same queries, each with its own softmax.

    Args:
      q: queries `[b, lq, n, d]`.
      keys_and_values: `[b, lk, n, d]`, keys and values of one sequence after the other.

    Returns:
      `[b, lq, n, d]` in the dtype of `q`.
    """
    if not cross_tpu.supports(q, *keys_and_values[::2]):
        return _summed_attention(q, *keys_and_values)
    return _summed_on_tpus(q, *keys_and_values)


def _summed_attention(q: jax.Array, *keys_and_values: jax.Array) -> jax.Array:
    parts = [attention(q, k, v) for k, v in zip(keys_and_values[::2], keys_and_values[1::2], strict=True)]
    return functools.reduce(jnp.add, parts)


@jax.custom_vjp
def _summed_on_tpus(q: jax.Array, *keys_and_values: jax.Array) -> jax.Array:
    """One kernel on TPUs where no gradient is wanted, which would need what that kernel does not keep."""
    return jax.lax.platform_dependent(q, *keys_and_values, tpu=cross_tpu.forward, default=_summed_attention)


_summed_on_tpus.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda *args: jax.vjp(_summed_attention, *args), lambda vjp, dout: vjp(dout)
)


def kernel(choice: Attention = "auto") -> Kernel:
    """The kernel of the platform that is compiled for, which need not be the one that this process runs on.

    Args:
      choice: "auto": the flash kernel of TPUs, or of GPUs for the inputs that it takes, and else the reference.
        "reference": that, everywhere. "flash": as "auto", but compiles for no platform without a flash kernel.
        "int8fp8": in 8 bits, without gradient.
    """
    if choice == "reference":
        return Kernel(reference_forward, reference_backward)
    is_quantized = choice == "int8fp8"

    def forward(q, k, v, valid, dtype: DTypeLike) -> Forward:
        def on(forward: Callable[..., Forward]) -> Callable[..., Forward]:
            return lambda *args: forward(*args, dtype)

        kernels: dict[str, Callable[..., Forward]]
        if is_quantized:
            kernels = {"tpu": int8fp8_tpu.forward, "cuda": int8fp8_gpu.forward, "default": int8fp8.forward}
        else:
            kernels = {"tpu": flash_tpu.forward}
            if on_gpu := gpu_kernel(q, k):
                kernels["cuda"] = on_gpu.forward
            if choice != "flash":
                kernels["default"] = reference_forward
        return jax.lax.platform_dependent(q, k, v, valid, **{name: on(run) for name, run in kernels.items()})

    def backward(q, k, *args) -> Gradients:
        on_gpu = gpu_kernel(q, k)
        others = {"cuda": on_gpu.backward} if on_gpu else {}
        if choice != "flash":
            others["default"] = reference_backward
        return jax.lax.platform_dependent(q, k, *args, tpu=flash_tpu.backward, **others)

    return Kernel(forward, int8fp8.backward if is_quantized else backward)


def gpu_kernel(q: jax.Array, k: jax.Array) -> Kernel | None:
    """The flash kernel of NVIDIA GPUs for these inputs; by JAX's public function where its private ones are others."""
    if not cudnn.supports(q):
        return None
    if cudnn.known():
        return Kernel(cudnn.forward, cudnn.backward)
    return Kernel(public_forward, reference_backward) if cudnn.public_works(q, k) else None


def public_forward(q, k, v, valid, dtype: DTypeLike) -> Forward:
    """A kernel's `forward` by cuDNN, with the log-sum-exp of the reference, which XLA drops where nobody uses it."""
    return cudnn.public_output(q, k, v, valid, dtype), reference_forward(q, k, v, valid, dtype)[1]


def check_choice(choice: Attention, dtype: DTypeLike, platform: str) -> None:
    """Raises `InputError` if self-attention in `dtype` cannot be had as `choice` on `platform`."""
    if choice == "flash" and platform != "tpu" and not (platform == "gpu" and dtype == jnp.bfloat16):
        raise InputError(
            f"attention flash of {jnp.dtype(dtype)} on {platform}; TPUs have such a kernel, and GPUs for bfloat16; "
            "use --attention auto"
        )


def reference_forward(q, k, v, valid, dtype: DTypeLike) -> Forward:
    """A kernel's `forward`, exact, for one head and one chunk of queries at a time, or all heads where scores are few.

    The scores in memory are `[chunk, lk]`, which stay in a CPU's cache; XLA would write all of `[b, n, lq, lk]`.
    """
    b, n, length, d = q.shape
    each_head = _each_head(q, k)
    q = to_chunks(scaled(q))  # [b * n, chunks, chunk, d]
    k = k.swapaxes(2, 3).reshape(b * n, d, -1)  # [b * n, d, lk]
    v = v.reshape(b * n, -1, d)  # [b * n, lk, d]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Forward:
        scores = masked(jnp.matmul(q, k, preferred_element_type=jnp.float32), valid)  # [chunk, lk]
        row_max = jnp.maximum(jnp.max(scores, axis=-1), LOWEST)  # [chunk]
        weights = jnp.exp(scores - row_max[:, None])
        row_sum = jnp.sum(weights, axis=-1)  # [chunk]
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)  # [chunk, d]
        row_sum = jnp.where(row_sum == 0, 1, row_sum)  # no valid key
        return (out / row_sum[:, None]).astype(dtype), row_max + jnp.log(row_sum)

    def attend_head(head: tuple[jax.Array, jax.Array, jax.Array]) -> Forward:
        q, k, v = head
        return jax.lax.map(lambda q: attend(q, k, v), q)  # [chunks, chunk, d], [chunks, chunk]

    out, lse = each_head(attend_head, (q, k, v))
    return out.reshape(b, n, -1, d)[:, :, :length], lse.reshape(b, n, -1)[:, :, :length]


def reference_backward(q, k, v, valid, lse, delta, dout) -> Gradients:
    """A kernel's `backward`, with the scores of one head and one chunk of queries at a time made again."""
    b, n, length, d = q.shape
    lk, each_head = k.shape[2], _each_head(q, k)
    rows = tuple(map(to_chunks, (scaled(q), lse[..., None], delta[..., None], dout)))  # [b * n, chunks, chunk, ..]
    k, v = (x.reshape(b * n, lk, d) for x in (k, v))  # [b * n, lk, d]

    def step(k, kt, vt, sums: tuple[jax.Array, jax.Array], rows) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q, lse, delta, dout = rows  # [chunk, ..]
        scores = masked(jnp.matmul(q, kt, preferred_element_type=jnp.float32), valid)  # [chunk, lk]
        weights = jnp.exp(scores - lse)
        dweights = jnp.matmul(dout, vt, preferred_element_type=jnp.float32)  # [chunk, lk]
        dscores = (weights * (dweights - delta)).astype(k.dtype)  # for the matrix unit, as in the forward
        dq = jnp.matmul(dscores, k, preferred_element_type=jnp.float32)  # [chunk, d]
        dk = jnp.matmul(q.T, dscores, preferred_element_type=jnp.float32)  # [d, lk]
        dv = jnp.matmul(dout.T, weights.astype(dout.dtype), preferred_element_type=jnp.float32)  # [d, lk]
        return (sums[0] + dk, sums[1] + dv), dq * d**-0.5

    def differentiate_head(head) -> Gradients:
        rows, k, v = head
        zeros = jnp.zeros((d, lk), jnp.float32)
        (dk, dv), dq = jax.lax.scan(lambda sums, rows: step(k, k.T, v.T, sums, rows), (zeros, zeros), rows)
        return dq, dk.T, dv.T  # [chunks, chunk, d], [lk, d], [lk, d]

    dq, dk, dv = each_head(differentiate_head, (rows, k, v))
    return dq.reshape(b, n, -1, d)[:, :, :length], dk.reshape(b, n, lk, d), dv.reshape(b, n, lk, d)


def _each_head(q: jax.Array, k: jax.Array) -> Callable[[Callable[[Any], Any], Any], Any]:
    """How to run a function for each head of `[b, n, l, d]`: as `jax.lax.map` does, or all together."""
    if q.shape[2] * k.shape[2] > SMALL_SCORES:
        return jax.lax.map
    return lambda function, heads: jax.vmap(function)(heads)


def scaled(q: jax.Array) -> jax.Array:
    """`q / sqrt(d)`, in float32 first: d**-0.5 is not exact in bf16."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def to_chunks(x: jax.Array) -> jax.Array:
    """`[b, n, l, d]` -> `[b * n, chunks, chunk, d]`, padded with zeros."""
    b, n, length, d = x.shape
    chunk = min(QUERY_CHUNK, length)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -length % chunk), (0, 0))).reshape(b * n, -1, chunk, d)


def masked(scores: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Minus infinity for the keys (last axis) that do not count."""
    return scores if valid is None else jnp.where(jnp.arange(scores.shape[-1]) < valid, scores, -jnp.inf)


def softmax_delta(x: jax.Array, y: jax.Array) -> jax.Array:
    """`sum(x * y)` over the last axis, float32: it is subtracted from numbers of its own size."""
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


def swap(x: jax.Array) -> jax.Array:
    """`[b, l, n, d]` <-> `[b, n, l, d]`."""
    return x.swapaxes(1, 2)


def named(x: jax.Array) -> jax.Array:
    """Marks a result for a `jax.checkpoint` policy; with those saved, the backward pass does not attend anew."""
    return checkpoint_name(x, "attention")
