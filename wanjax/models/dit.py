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
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sharding.local import local_attention
from sharding.mesh import current_shape
from sharding.rules import constrain, gather, reshape, split_batch
from sharding.ulysses import sequence_attention
from wanjax.config import Attention, DiTConfig, Remat
from wanjax.models.layers import (
    LayerNorm,
    Linear,
    QuantizedLinear,
    RMSNorm,
    normalize,
    rematerialised,
    scan,
    stack,
    xavier,
    zeros,
)
from wanjax.models.rope import Rotation, make_rotation, rotate
from wanjax.ops.quantized import Format

SEQUENTIAL_BRANCH_MIN_TOKENS = 4096
"""Tokens of a sample: from here on one sample saturates a device."""
normal = jax.nn.initializers.normal(0.02)


class Context(NamedTuple):
    """Keys and values of the text and of the images for every block; the image's are None for t2v.

    Shapes `[layers, b, n, l, d]`, as the kernels take them: another order XLA copies at every step. Inside
    a block without the layer axis.
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
            return quantized(block, c.quantize) if is_quantized and c.quantize != "off" else block

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
          latents: noise and control branch `[b, f, h, w, in_channels]`; h and w divisible by the patch.
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
    return constrain(jax.lax.map(lambda sample: run(*sample), samples)[:, 0], "batch", "tokens", None)  # [b, l, e]


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

        y = self.self_attention(modulate(x, shift_attn, scale_attn, self.eps), rotation)
        x = add_gated(x, y, gate_attn)
        x = x + self.cross_attention(self.norm_cross(x), context)
        y = self.ffn(modulate(x, shift_ffn, scale_ffn, self.eps), jax.nn.gelu)
        return add_gated(x, y, gate_ffn)


def quantized(block: Block, format: Format) -> Block:
    """`block` itself, its matrices quantised."""
    for part in (block.self_attention, block.cross_attention, block.ffn):
        for name, layer in list(vars(part).items()):
            if isinstance(layer, Linear):
                setattr(part, name, QuantizedLinear(layer, format))
    return block


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Layer norm without parameters, then scale and shift; float32 inside, returned in the dtype of `x`."""
    return (normalize(x, eps) * (1 + scale) + shift).astype(x.dtype)


def add_gated(x: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
    """`x + gate * y`, summed in float32 because the gate is float32."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


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
        q = rotate(split_heads(self.norm_q(self.q(x)), self.num_heads), rotation)  # [b, l, n, d]
        k = rotate(split_heads(self.norm_k(self.k(x)), self.num_heads), rotation)
        v = split_heads(self.v(x), self.num_heads)
        return self.o(sequence_attention(q, k, v, rotation.length, self.choice).reshape(x.shape))  # [b, l, e]


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
        k = split_heads(self.norm_k(self.k(text)), self.num_heads).swapaxes(1, 2)  # [b, n, text_len, d]
        v = split_heads(self.v(text), self.num_heads).swapaxes(1, 2)  # [b, n, text_len, d]
        if image is None or self.k_image is None or self.v_image is None or self.norm_k_image is None:
            return Context(k, v, None, None)
        k_image = split_heads(self.norm_k_image(self.k_image(image)), self.num_heads).swapaxes(1, 2)  # [b, n, l, d]
        v_image = split_heads(self.v_image(image), self.num_heads).swapaxes(1, 2)  # [b, n, l, d]
        return Context(k, v, k_image, v_image)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[b, l, e]` -> `[b, l, e]`; `context` without its layer axis."""
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)  # [b, l, n, d]
        y = local_attention(q, context.k.swapaxes(1, 2), context.v.swapaxes(1, 2))  # [b, l, n, d]
        if context.k_image is not None and context.v_image is not None:
            y = y + local_attention(q, context.k_image.swapaxes(1, 2), context.v_image.swapaxes(1, 2))
        return self.o(y.reshape(x.shape))  # [b, l, e]


def projection(config: DiTConfig, rngs: nnx.Rngs, axes: tuple[str, str] = ("embed", "heads")) -> Linear:
    """One of the q, k, v, o layers."""
    return Linear(config.dim, config.dim, rngs, axes=axes, param_dtype=config.param_dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """`[b, l, e]` -> `[b, l, n, d]`."""
    return x.reshape(*x.shape[:2], num_heads, -1)


class MLP(nnx.Module):
    """Two linear layers with an activation between them. GELU is the tanh form, as `jax.nn.gelu` defaults to."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, rngs: nnx.Rngs, *, param_dtype, init=xavier):
        self.fc_in = Linear(in_dim, hidden, rngs, axes=("embed", "mlp"), param_dtype=param_dtype, init=init)
        self.fc_out = Linear(hidden, out_dim, rngs, axes=("mlp", "embed"), param_dtype=param_dtype, init=init)

    def __call__(self, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`[.., in_dim]` -> `[.., out_dim]`."""
        return self.fc_out(activation(self.fc_in(x)))


class ImageEmbedding(nnx.Module):
    """CLIP features of the given frames to image tokens. Exact GELU; layer norms with eps 1e-5."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        c, width = config, config.image_dim
        assert width is not None
        self.norm_in = LayerNorm(width, 1e-5)
        self.fc_in = Linear(width, width, rngs, axes=("embed", "mlp"), param_dtype=c.param_dtype)
        self.fc_out = Linear(width, c.dim, rngs, axes=("mlp", "embed"), param_dtype=c.param_dtype)
        self.norm_out = LayerNorm(c.dim, 1e-5)
        positions = jnp.zeros((c.image_positions, width), jnp.float32)
        self.positions = nnx.Param(positions, axes=(None, "embed")) if c.image_positions else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, l, image_dim]` -> `[b, l, e]`; one frame alone takes the first half of the positions."""
        if self.positions is not None:
            x = x + gather(self.positions[...])[None, : x.shape[1]].astype(x.dtype)
        x = jax.nn.gelu(self.fc_in(self.norm_in(x)), approximate=False)
        return self.norm_out(self.fc_out(x))  # [b, l, e]


class PatchEmbedding(nnx.Module):
    """Non-overlapping patches to tokens: upstream's convolution whose stride is its kernel, as a matrix product."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        c = config
        fan_in = int(np.prod(c.patch_size)) * c.in_channels
        kernel = xavier(rngs.params(), (fan_in, c.dim), c.param_dtype).reshape(*c.patch_size, c.in_channels, c.dim)
        self.kernel = nnx.Param(kernel, axes=(None, None, None, None, "embed"))
        self.bias = nnx.Param(jnp.zeros((c.dim,), c.param_dtype), axes=("embed",))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[int, int, int]]:
        """`[b, f, h, w, c]` -> tokens `[b, l, e]` in (f, h, w) order, and the grid of patches.

        Zero tokens are added until the mesh divides them; attention masks them.
        """
        kernel = self.kernel[...].astype(x.dtype)
        x, grid = patchify(x, kernel.shape[:3])  # [b, l, pt * ph * pw * c]
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % current_shape().sequence), (0, 0)))  # [b, l, ..]
        x = constrain(x, "batch", "tokens", None)
        kernel = gather(kernel.reshape(-1, kernel.shape[-1]), x)  # [pt * ph * pw * c, e]
        return x @ kernel + gather(self.bias[...].astype(x.dtype)), grid  # [b, l, e]


class Head(nnx.Module):
    """Tokens to patches of velocity, modulated by the time embedding itself (not its projection)."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        c = config
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, c.dim)) / c.dim**0.5, axes=(None, "embed"))
        out_dim = int(np.prod(c.patch_size)) * c.out_channels
        self.linear = Linear(c.dim, out_dim, rngs, axes=("embed", None), param_dtype=c.param_dtype, init=zeros)
        self.eps = c.eps

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """`x` `[b, l, e]`, `time` float32 `[b, e]` -> `[b, l, pt * ph * pw * c]`, float32."""
        shift, scale = jnp.split(gather(self.modulation[...])[None] + time[:, None], 2, axis=1)  # [b, 1, e]
        return self.linear(modulate(x, shift, scale, self.eps)).astype(jnp.float32)  # solvers work in float32


def patchify(x: jax.Array, patch: tuple[int, ...]) -> tuple[jax.Array, tuple[int, int, int]]:
    """`[b, f, h, w, c]` -> `[b, l, pt * ph * pw * c]` in (f, h, w) order, and the grid of patches."""
    b, c, (pt, ph, pw) = x.shape[0], x.shape[-1], patch
    f, h, w = grid = (x.shape[1] // pt, x.shape[2] // ph, x.shape[3] // pw)
    x = reshape(x, (b, f, pt, h, ph, w, pw, c)).transpose(0, 1, 3, 5, 2, 4, 6, 7)  # [b, f, h, w, pt, ph, pw, c]
    return reshape(x, (b, f * h * w, pt * ph * pw * c)), grid  # [b, l, ..]


def unpatchify(x: jax.Array, grid: tuple[int, int, int], patch: tuple[int, ...]) -> jax.Array:
    """`[b, l, pt * ph * pw * c]` -> `[b, f, h, w, c]`."""
    b, (f, h, w), (pt, ph, pw) = x.shape[0], grid, patch
    c = x.shape[-1] // (pt * ph * pw)
    x = reshape(x, (b, f, h, w, pt, ph, pw, c)).transpose(0, 1, 4, 2, 5, 3, 6, 7)  # [b, f, pt, h, ph, w, pw, c]
    return reshape(x, (b, f * pt, h * ph, w * pw, c))  # [b, f, h, w, c]


def timestep_features(timestep: jax.Array, dim: int) -> jax.Array:
    """Cosines, then sines, of the timestep at `dim / 2` frequencies: `[b]` -> `[b, dim]`, float32.

    The reference uses float64. Here the frequency, in turns, is split so that its product with the timestep's integer
    part is exact in float32; dropping whole turns then leaves an angle that is good to 1e-6.
    """
    turns = 10000.0 ** -(np.arange(dim // 2) / (dim // 2)) / (2 * np.pi)
    high = np.round(turns * 2.0**16) / 2.0**16  # 14 bits at most, and 10 for the integer part: 24 in all
    timestep = timestep.astype(jnp.float32)[:, None]  # [b, 1]
    whole = jnp.floor(timestep)
    exact = whole * high.astype(np.float32)[None]  # [b, dim / 2]
    rest = (timestep - whole) * high.astype(np.float32)[None] + timestep * (turns - high).astype(np.float32)[None]
    angle = 2 * np.pi * (exact - jnp.floor(exact) + rest)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)  # [b, dim]
