"""cuDNN's flash attention for NVIDIA GPUs.

The public `jax.nn.dot_product_attention` rounds the log-sum-exp to bfloat16, which is too coarse to merge blocks with,
and does not take one for the backward pass. So this calls what lies under it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.typing import DTypeLike

from wanjax.ops.kernels import LOWEST, Forward, Gradients


def supports(q: jax.Array) -> bool:
    """Whether cuDNN has a kernel for this dtype and head dim, on Ampere and later."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def forward(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, dtype: DTypeLike) -> Forward:
    """A kernel's `forward`; the output is rounded to the dtype of `q` on its way to `dtype`."""
    operands, options = arguments(q, valid)
    out, lse = cudnn._dot_product_attention_fwd_impl(q, k, v, *operands, **options, is_training=True)
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
    operands, options = arguments(q, valid)
    dout = dout.astype(q.dtype)  # cuDNN wants one dtype
    run: Any = cudnn._dot_product_attention_bwd_impl
    grads = run(q, k, v, *operands, lse, out, dout, **options)
    dq, dk, dv = (g.astype(jnp.float32) for g in grads)
    if valid is None:
        return dq, dk, dv
    return jnp.where(valid == 0, 0, dq), jnp.where(valid == 0, 0, dk), jnp.where(valid == 0, 0, dv)


def arguments(q: jax.Array, valid: jax.Array | None) -> tuple[tuple[jax.Array, ...], dict]:
    """The operands after q, k and v, and the options, as both directions take them."""
    b, _, lq, d = q.shape
    unused = jnp.zeros(0, q.dtype)
    lengths = (unused, unused)
    if valid is not None:
        lengths = jnp.full((b,), lq, jnp.int32), jnp.full((b,), valid, jnp.int32)
    options = {
        "scale": d**-0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.NO_MASK if valid is None else cudnn.MaskType.PADDING,
        "layout": cudnn.AttentionLayout.BNTH.value,
        "sliding_window_length": None,
    }
    return (unused, *lengths, unused, unused, unused, unused), options
