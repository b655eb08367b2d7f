"""Others for the same work: JAX's splash attention on TPUs, torch's attention and diffusers' block on GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from chip.measuring import SECONDS, Chip, Row, reason
from chip.parts import Sizes

from wanjax.report import programs


def attention(chip: Chip, sizes: Sizes) -> Iterator[Row]:
    """Forward and, of torch, backward in bf16."""
    tera = 4 * sizes.heads * sizes.length**2 * sizes.dit.head_dim / 1e12
    if chip.platform == "tpu":
        yield splash(chip, sizes, tera)
    else:
        yield from torch_attention(chip, sizes, tera)


def splash(chip: Chip, sizes: Sizes, tera: float) -> Row:
    """The fastest blocks of those tried by the static count; tokens filled up to whole blocks."""
    block = 2048
    length = -(-sizes.length // block) * block
    told = f"{sizes.heads} heads x {length}"
    try:
        from jax.experimental.pallas.ops.tpu import splash_attention as splash
    except ImportError as error:  # it may move
        return Row("jax's splash attention forward", told, why=reason(error))
    mask = splash.MultiHeadMask([splash.FullMask((length, length))] * sizes.heads)
    blocks = splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block // 2)
    x = programs.AbstractInputs(chip.mesh).array((sizes.heads, length, sizes.dit.head_dim), jnp.bfloat16)
    run = splash.make_splash_mha_single_device(mask, block_sizes=blocks)
    return chip.measure("jax's splash attention forward", told, jax.jit(run), (x, x, x), tera)


def torch_attention(chip: Chip, sizes: Sizes, tera: float) -> Iterator[Row]:
    """`scaled_dot_product_attention`, by whichever kernel torch takes."""
    told = f"{sizes.heads} heads x {sizes.length}"
    rows = [Row(f"torch's attention {name}", told) for name in ("forward", "backward")]
    try:
        import torch

        device = "cuda" if chip.platform == "gpu" else "cpu"
        shape = 1, sizes.heads, sizes.length, sizes.dit.head_dim
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(q, k, v)
        dout = torch.randn_like(out)
        calls = (lambda: attend(q, k, v)), (lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
        for row, call, times in zip(rows, calls, (1, 2.5), strict=True):
            row.tera = times * tera
            chip.clock(row, lambda call=call: torch_seconds(call))
    except Exception as error:
        rows = [row if row.seconds else Row(row.part, told, why=reason(error)) for row in rows]
    yield from rows


def diffusers_block(chip: Chip, sizes: Sizes, tera: float | None) -> Row:
    """`WanTransformerBlock` with random weights, forward, on all tokens of a sample; `tera` of ours."""
    row = Row("diffusers' block forward, bf16", f"1 x {sizes.length} x {sizes.dit.dim}", tera=tera)
    try:
        import torch
        from diffusers.models.transformers import transformer_wan as wan

        device, dit = "cuda" if chip.platform == "gpu" else "cpu", sizes.dit
        f, h, w = programs.latent_shape(sizes.config)
        options = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "added_kv_proj_dim": dit.dim}
        block = (
            wan.WanTransformerBlock(dit.dim, dit.ffn_dim, dit.num_heads, **options).to(device, torch.bfloat16).eval()
        )
        rotate = wan.WanRotaryPosEmbed(dit.head_dim, dit.patch_size, 1024).to(device)

        def random(*shape: int, dtype: Any = torch.bfloat16) -> Any:
            return torch.randn(shape, dtype=dtype, device=device)

        rotation = rotate(random(1, dit.out_channels, f, h, w))
        given = random(1, sizes.length, dit.dim), random(1, dit.text_len + dit.image_positions, dit.dim)
        modulation = random(1, 6, dit.dim, dtype=torch.float32)
        with torch.inference_mode():
            chip.clock(row, lambda: torch_seconds(lambda: block(*given, modulation, rotation)))
    except Exception as error:
        row.why = reason(error)
    return row


def torch_seconds(call: Callable[[], Any]) -> float:
    """Of a call, the shortest of several."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    return min(once() for _ in range(max(1, min(20, int(SECONDS / first)))))
