"""The Wan2.1 diffusion transformer (arXiv 2503.20314, section 4.2; Wan2.1 `wan/modules/model.py`).

    context  = dit.context(text, image)              # once per video: every layer's cross-attention keys and values
    velocity = dit(latents, timestep, context)       # every step

A block is: self-attention and feed-forward, both modulated by the timestep (adaLN), with an unmodulated
cross-attention between them. Text and image are attended to separately with the same queries and added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sharding.local import local_attention, per_token
from sharding.mesh import current_shape
from sharding.rules import constrain, gather, split_batch
from sharding.ulysses import check_heads, sequence_attention
from wanjax.config import Attention, DiTConfig, Remat
from wanjax.models.embeddings import MLP, Head, ImageEmbedding, PatchEmbedding, timestep_features, unpatchify
from wanjax.models.layers import (
    LayerNorm,
    Linear,
    QuantizedLinear,
    RMSNorm,
    add_gated,
    apply_all,
    modulate,
    rematerialised,
    scan,
    stack,
)
from wanjax.models.rope import Rotation, make_rotation
from wanjax.ops import norms
from wanjax.ops.quantized import Format

SEQUENTIAL_BRANCH_MIN_TOKENS = 4096
"""Tokens of a sample: from here on one sample saturates a device."""
normal = jax.nn.initializers.normal(0.02)


class Context(NamedTuple):
    """Keys and values of the text and of the images for every block; the image's are None for t2v.

    Shapes `[layers, b, l, e]`, as the projections make them and the kernels take them. Inside a block without the
    layer axis.
    """

    k: jax.Array
    v: jax.Array
    k_image: jax.Array | None
    v_image: jax.Array | None


class Tokens(NamedTuple):
    """What goes into the blocks beside the context: tokens `[b, l, e]`, l padded to what the mesh divides; embedding
    of the timestep `[b, e]` and its projection `[b, 6, e]`, both float32; positions; patches along f, h and w.
    """

    x: jax.Array
    time: jax.Array
    modulation: jax.Array
    rotation: Rotation
    grid: tuple[int, int, int]


class DiT(nnx.Module):
    """Predicts the velocity of noisy latents."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.patch_embedding = PatchEmbedding(c, rngs)
        self.text_embedding: MLP | None = MLP(c.text_dim, c.dim, c.dim, rngs, param_dtype=c.param_dtype, init=normal)
        # The time path is float32 throughout: bf16 cannot tell neighbouring timesteps apart.
        self.time_embedding = MLP(c.freq_dim, c.dim, c.dim, rngs, param_dtype=jnp.float32, init=normal)
        self.time_projection = Linear(c.dim, 6 * c.dim, rngs, axes=("embed", "mlp"), param_dtype=c.param_dtype)
        self.image_embedding = ImageEmbedding(c, rngs) if c.image_dim is not None else None

        def make(rngs: nnx.Rngs, is_quantized: bool) -> Block:
            block = Block(c, rngs)
            if is_quantized and c.quantize != "off":
                return quantized(block, c.quantize, c.channel_scales, c.weight_only)
            return block

        stacks = [stack(partial(make, is_quantized=kind), stop - first, rngs) for first, stop, kind in c.stacks]
        self.blocks = stacks[0] if len(stacks) == 1 else nnx.List(stacks)
        self.head = Head(c, rngs)

    def context(self, text: jax.Array, image: jax.Array | None = None, remat: Remat = "none") -> Context:
        """Project text and image features to every block's cross-attention keys and values.

        They do not depend on the timestep, so a video needs this once.

        Args:
          text: umT5 features `[b, text_len, text_dim]`, zero rows behind the prompt. Those rows are attended to.
          image: CLIP features `[b, l, image_dim]` of the given frames one after the other; None without images.
          remat: for training, see `rematerialised`.
        """
        text = constrain(text, "batch", None, None)
        assert self.text_embedding is not None  # it is in all but what without_context() returns
        text_tokens = self.text_embedding(text.astype(self.config.dtype), jax.nn.gelu)  # [b, text_len, e]
        image_tokens = None
        if image is not None and self.image_embedding is not None:
            features = constrain(image.astype(self.config.dtype), "batch", None, None)
            image_tokens = self.image_embedding(features)  # [b, l, e]

        def project(_: None, layer: tuple[Block, None]) -> tuple[None, Context]:
            return None, layer[0].cross_attention.context(text_tokens, image_tokens)

        return scan(rematerialised(project, remat), None, self.stacks)[1]

    @property
    def stacks(self) -> tuple[Block, ...]:
        """All blocks, those of one kind stacked: one stack, unless only some are quantised."""
        return (self.blocks,) if isinstance(self.blocks, Block) else tuple(self.blocks)

    def without_context(self) -> DiT:
        """The same network without the weights that only `context()` needs, which are a quarter of all."""
        dit = nnx.merge(*nnx.split(self))  # another tree of the same arrays
        for name in ("text_embedding", "image_embedding"):
            setattr(dit, name, None)
        for blocks in dit.stacks:
            for name in ("k", "v", "norm_k", "k_image", "v_image", "norm_k_image"):
                setattr(blocks.cross_attention, name, None)
        return dit

    def __call__(self, latents: jax.Array, timestep: jax.Array, context: Context, remat: Remat = "none") -> jax.Array:
        """Velocity of `latents`.

        Args:
          latents: noise and image condition `[b, f, h, w, in_channels]`; h and w divisible by the patch.
          timestep: `[b]`, in [0, 1000]; the official sampler truncates it to an integer first.
          context: what `context()` returned.
          remat: for training, see `rematerialised`.

        Returns:
          `[b, f, h, w, out_channels]`, float32.
        """
        tokens = self.embed(latents, timestep)
        return self.velocity(self.run_blocks(tokens.x, tokens, context, remat), tokens)

    def embed(self, latents: jax.Array, timestep: jax.Array) -> Tokens:
        """What goes into the blocks.

        Args:
          latents: `[b, f, h, w, in_channels]`.
          timestep: `[b]`, in [0, 1000].
        """
        c = self.config
        x, grid = self.patch_embedding(latents.astype(c.dtype))  # [b, l, e], l padded to what the mesh divides
        rotation = make_rotation(grid, c.head_dim, x.shape[1])
        time = self.time_embedding(timestep_features(timestep, c.freq_dim), jax.nn.silu)  # [b, e]
        modulation = self.time_projection(jax.nn.silu(time)).reshape(-1, 6, c.dim)  # [b, 6, e]
        return Tokens(x, time, modulation, rotation, grid)

    def modulated_input(self, tokens: Tokens) -> jax.Array:
        """What the first block's self-attention sees, `[b, l, e]`: cheap, and changes as the network's result does."""
        first = self.stacks[0]
        m = gather(first.modulation[...][0])[None] + tokens.modulation  # [b, 6, e]
        return modulate(tokens.x, m[:, :1], m[:, 1:2], first.eps)

    def run_blocks(self, x: jax.Array, tokens: Tokens, context: Context, remat: Remat = "none") -> jax.Array:
        """All blocks, nearly all of the work: `[b, l, e]` -> `[b, l, e]`; `tokens` of batch b or 1."""

        def step(x: jax.Array, layer: tuple[Block, Context]) -> tuple[jax.Array, None]:
            block, block_context = layer
            x = checkpoint_name(x, "block_input")
            return map_over_batch(partial(block, rotation=tokens.rotation), x, tokens.modulation, block_context), None

        return scan(rematerialised(step, remat), x, self.stacks, context)[0]

    def velocity(self, x: jax.Array, tokens: Tokens) -> jax.Array:
        """Tokens behind the blocks `[b, l, e]` to velocity `[b, f, h, w, c]`, float32; `tokens` of batch b or 1."""
        velocity = constrain(self.head(x, tokens.time), "batch", None, None)[:, : tokens.rotation.length]
        return unpatchify(velocity, tokens.grid, self.config.patch_size)  # [b, f, h, w, c]


def map_over_batch(run: Callable[..., jax.Array], x: jax.Array, modulation: jax.Array, context: Context) -> jax.Array:
    """`run` of these; on one device, from SEQUENTIAL_BRANCH_MIN_TOKENS tokens on, one sample after the other.

    A block then works in the memory of one. On several devices its weights would travel once for every sample.
    """
    b, length, _ = x.shape
    if b == 1 or length < SEQUENTIAL_BRANCH_MIN_TOKENS or math.prod(current_shape()) > 1:
        return run(x, modulation, context)
    modulation = jnp.broadcast_to(modulation, (b, *modulation.shape[1:]))
    samples = jax.tree.map(partial(split_batch, parts=b), (x, modulation, context))  # [b, 1, ..]
    results = jax.lax.map(lambda sample: run(*sample), samples)  # [b, 1, l, e]
    # No axis that goes may carry a mesh's: its gradient would come back without.
    return constrain(constrain(results, None, None, "tokens", None)[:, 0], "batch", "tokens", None)  # [b, l, e]


class Block(nnx.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        c = config
        self.self_attention = SelfAttention(c, rngs)
        self.norm_cross = LayerNorm(c.dim, c.eps)
        self.cross_attention = CrossAttention(c, rngs)
        self.ffn = MLP(c.dim, c.ffn_dim, c.dim, rngs, param_dtype=c.param_dtype)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, c.dim)) / c.dim**0.5, axes=(None, "embed"))
        self.eps = c.eps

    def __call__(self, x: jax.Array, modulation: jax.Array, context: Context, rotation: Rotation) -> jax.Array:
        """`x` `[b, l, e]`, `modulation` float32 `[b, 6, e]` or `[1, 6, e]`."""
        m = gather(self.modulation[...])[None] + modulation  # [b, 6, e]
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = jnp.split(m, 6, axis=1)  # [b, 1, e] each

        cross = (gather(w[...])[None, None] for w in (self.norm_cross.scale, self.norm_cross.bias))  # [1, 1, e] each
        y = self.self_attention(modulate(x, shift_attn, scale_attn, self.eps), rotation)
        x, y = per_token(partial(norms.gated_layer_norm, eps=self.norm_cross.eps), x, y, gate_attn, *cross)
        y = self.cross_attention(y, context)
        x, y = per_token(partial(norms.added_layer_norm, eps=self.eps), x, y, 1 + scale_ffn, shift_ffn)
        return add_gated(x, self.ffn(y, jax.nn.gelu), gate_ffn)


def quantized(block: Block, format: Format, channel_scales: bool = False, weight_only: bool = False) -> Block:
    """`block` itself, its matrices quantised, with one scale or one for each output."""
    for part in (block.self_attention, block.cross_attention, block.ffn):
        for name, layer in list(vars(part).items()):
            if isinstance(layer, Linear):
                setattr(part, name, QuantizedLinear(layer, format, channel_scales, weight_only))
    return block


class SelfAttention(nnx.Module):
    """Full attention over all tokens, with RMS-normed queries and keys and rotary positions."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        c = config
        self.q, self.k, self.v = (projection(c, rngs) for _ in range(3))
        self.o = projection(c, rngs, axes=("heads", "embed"))
        # Over the whole model dim, before the heads are split.
        self.norm_q, self.norm_k = (RMSNorm(c.dim, c.eps, axes=("heads",)) for _ in range(2))
        self.num_heads = c.num_heads
        self.choice: Attention = c.attention

    def __call__(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """`[b, l, e]` -> `[b, l, e]`."""
        check_heads(self.num_heads, current_shape().ulysses)
        parts = current_shape().ulysses
        q, k, v = apply_all((self.q, self.k, self.v), x, written=(1, 1, parts))  # [b, l, e]
        q, k = normalize_and_rotate(q, self.norm_q, rotation), normalize_and_rotate(k, self.norm_k, rotation)
        q, k, v = (split_heads(y, self.num_heads) for y in (q, k, v))  # [b, l, n, d]
        y = sequence_attention(q, k, v, rotation.length, self.choice).reshape(x.shape)  # [b, l, e]
        return self.o(y, read=parts)


def normalize_and_rotate(x: jax.Array, norm: RMSNorm, rotation: Rotation) -> jax.Array:
    """Queries or keys `[b, l, e]`: `norm` of all channels, then every head rotated."""
    run = partial(norms.rms_norm_rotate, eps=norm.eps, parts=current_shape().ulysses)
    return per_token(run, x, gather(norm.scale[...]), rotation.cos, rotation.sin)


class CrossAttention(nnx.Module):
    """Queries from the video; keys and values from the text and, apart from it, from the images."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        c = config
        self.q, self.k, self.v = (projection(c, rngs) for _ in range(3))
        self.o = projection(c, rngs, axes=("heads", "embed"))
        self.norm_q, self.norm_k = (RMSNorm(c.dim, c.eps, axes=("heads",)) for _ in range(2))
        has_image = c.image_dim is not None
        self.k_image = projection(c, rngs) if has_image else None
        self.v_image = projection(c, rngs) if has_image else None
        self.norm_k_image = RMSNorm(c.dim, c.eps, axes=("heads",)) if has_image else None
        self.num_heads = c.num_heads

    def context(self, text: jax.Array, image: jax.Array | None) -> Context:
        """Keys and values of text tokens `[b, text_len, e]` and image tokens `[b, l, e]`."""
        k, v = self.norm_k(self.k(text)), self.v(text)  # [b, text_len, e]
        if image is None or self.k_image is None or self.v_image is None or self.norm_k_image is None:
            return Context(k, v, None, None)
        return Context(k, v, self.norm_k_image(self.k_image(image)), self.v_image(image))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[b, l, e]` -> `[b, l, e]`; `context` without its layer axis."""
        heads = partial(split_heads, num_heads=self.num_heads)  # [b, l, e] -> [b, l, n, d]
        norm = partial(norms.rms_norm, eps=self.norm_q.eps)
        q = heads(per_token(norm, self.q(x), gather(self.norm_q.scale[...])))
        y = local_attention(q, *(heads(x) for x in context if x is not None))
        return self.o(y.reshape(x.shape))  # [b, l, e]


def projection(config: DiTConfig, rngs: nnx.Rngs, axes: tuple[str, str] = ("embed", "heads")) -> Linear:
    """One of the q, k, v, o layers."""
    return Linear(config.dim, config.dim, rngs, axes=axes, param_dtype=config.param_dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """`[b, l, e]` -> `[b, l, n, d]`."""
    return x.reshape(*x.shape[:2], num_heads, -1)
