"""cuDNN's flash attention for NVIDIA GPUs.

The public `jax.nn.dot_product_attention` rounds the log-sum-exp to bfloat16, which is too coarse to merge blocks with,
does not take one for the backward pass, and cannot be traced where there is no GPU. So this calls what lies under it,
by the names of its arguments: a release of JAX may add some. Where it is gone or wants arguments that are not known
here, `known` is false, and `public_output` is what remains.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wanjax.ops.kernels import LOWEST, Forward, Gradients

try:
    private: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
except ImportError:
    private = None

# Arguments of JAX's own functions beside queries, keys and values.
OPERANDS = ("bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v")
OPTIONS = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length")
LATER = {"score_mod_args": (), "score_mod": None}  # taken since JAX 0.12, a function of the scores: none


def supports(q: jax.Array) -> bool:
    """Whether cuDNN has a kernel for this dtype and head dim, on Ampere and later."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def known() -> bool:
    """Whether the installed JAX has what `forward` and `backward` call, with arguments as known here."""
    return private_function("fwd") is not None and private_function("bwd") is not None


def forward(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, dtype: DTypeLike) -> Forward:
    """A kernel's `forward`; the output is rounded to the dtype of `q` on its way to `dtype`."""
    run: Any = private_function("fwd")
    out, lse = run(query=q, key=k, value=v, **arguments(q, valid), is_training=True)
    out, lse = out.astype(dtype), lse.reshape(q.shape[:3])  # [b, n, lq, d], [b, n, lq]
    if valid is None:
        return out, lse
    return jnp.where(valid == 0, 0, out), jnp.where(valid == 0, LOWEST, lse)


def backward(q, k, v, valid, lse, delta, dout) -> Gradients:
    """A kernel's `backward`. cuDNN wants the output only to make `delta` of it: any other with that `delta` does."""
    dout32 = dout.astype(jnp.float32)
    squares = jnp.sum(dout32 * dout32, axis=-1)  # [b, n, lq]
    ratio = delta / jnp.where(squares == 0, 1, squares)
    out = (dout32 * ratio[..., None]).astype(q.dtype)  # [b, n, lq, d]
    run: Any = private_function("bwd")
    saved = {"activation": lse, "fwd_output": out, "grad_output": dout.astype(q.dtype)}  # cuDNN wants one dtype
    grads = run(query=q, key=k, value=v, **arguments(q, valid), **saved)
    dq, dk, dv = (g.astype(jnp.float32) for g in grads)
    if valid is None:
        return dq, dk, dv
    return jnp.where(valid == 0, 0, dq), jnp.where(valid == 0, 0, dk), jnp.where(valid == 0, 0, dv)


def private_function(direction: str) -> Callable[..., Any] | None:
    """JAX's own for "fwd" or "bwd", ready for the arguments given here; None if it takes others."""
    run = getattr(private, f"_dot_product_attention_{direction}_impl", None)
    if run is None or not hasattr(private, "MaskType") or not hasattr(private, "AttentionLayout"):
        return None
    own = ("is_training",) if direction == "fwd" else ("activation", "fwd_output", "grad_output")
    names = ("query", "key", "value", *OPERANDS, *OPTIONS, *own)
    for later in ({}, LATER):
        try:
            inspect.signature(run).bind(**dict.fromkeys(names), **later)
        except TypeError:
            continue
        return partial(run, **later)
    return None


def arguments(q: jax.Array, valid: jax.Array | None) -> dict[str, Any]:
    """What both directions take beside q, k and v: `OPERANDS` and `OPTIONS`."""
    b, _, lq, d = q.shape
    unused = jnp.zeros(0, q.dtype)
    given: dict[str, Any] = dict.fromkeys(OPERANDS, unused)
    if valid is not None:
        given |= {"q_seqlen": jnp.full((b,), lq, jnp.int32), "kv_seqlen": jnp.full((b,), valid, jnp.int32)}
    mask = private.MaskType.NO_MASK if valid is None else private.MaskType.PADDING
    layout = private.AttentionLayout.BNTH.value
    return given | dict(zip(OPTIONS, (d**-0.5, 0, 0.0, (False, False), mask, layout, None), strict=True))


def public_works(q: jax.Array, k: jax.Array) -> bool:
    """Whether `public_output` can be traced here: JAX asks for the GPU then, and for its libraries."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, k)]
    try:
        jax.eval_shape(partial(public_output, valid=None, dtype=q.dtype), *shapes)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def public_output(q, k, v, valid: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """The output of a kernel's `forward` by JAX's public function."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [b, l, n, d]
    lengths = None if valid is None else jnp.full(q.shape[:1], valid, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    out = out.swapaxes(1, 2).astype(dtype)  # [b, n, lq, d]
    return out if valid is None else jnp.where(valid == 0, 0, out)
