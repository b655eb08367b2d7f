"""CLIP vision tower: the image encoder of Wan2.1 (arXiv 2103.00020; Wan2.1 `wan/modules/clip.py`, ViT-H/14)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.local import local_attention
from sharding.rules import constrain, gather, reshape
from wanjax.config import CLIPConfig
from wanjax.models.layers import LayerNorm, Linear, stack, xavier

normal = jax.nn.initializers.normal(0.02)


class CLIPVision(nnx.Module):
    """Pixels to image features.

    The last block and `norm_post` are in every checkpoint and so are parameters here, but Wan2.1 reads the features
    before them, so they are never run.
    """

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.patch_embedding = PatchEmbedding(c, rngs)
        self.class_embedding = nnx.Param(normal(rngs.params(), (c.dim,), c.param_dtype), axes=("embed",))
        positions = normal(rngs.params(), (c.num_tokens, c.dim), jnp.float32)
        self.position_embedding = nnx.Param(positions, axes=(None, "embed"))
        self.norm_pre = LayerNorm(c.dim, c.eps)
        self.blocks = stack(lambda rngs: Block(c, rngs), c.num_layers, rngs)
        self.norm_post = LayerNorm(c.dim, c.eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Features of the last block but one, without the closing norm.

        Args:
          pixels: `[b, H, W, 3]`, H = W = image_size, normalised as `wanjax.conditioning.images.clip_pixels` does.

        Returns:
          `[b, 1 + n, e]` in the config's dtype: the class token, then the patches row by row.
        """
        c = self.config
        pixels = constrain(pixels, "batch", None, None, None)
        patches = self.patch_embedding(pixels.astype(c.dtype))  # [b, n, e]
        # The class token is row 0 of the positions' table: nothing has to be joined that may be split differently.
        table = gather(self.position_embedding[...])
        table = table.at[0].add(gather(self.class_embedding[...]).astype(table.dtype))  # [1 + n, e]
        x = jnp.pad(patches, ((0, 0), (1, 0), (0, 0))) + table[None].astype(c.dtype)  # [b, 1 + n, e]
        x = self.norm_pre(x)

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            return jax.tree.map(lambda weights: weights[i], self.blocks)(x)

        return jax.lax.fori_loop(0, c.num_layers - 1, step, x)


class PatchEmbedding(nnx.Module):
    """Non-overlapping patches to tokens: a convolution without bias whose stride is its kernel `[p, p, 3, e]`."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        p = config.patch_size
        kernel = xavier(rngs.params(), (3 * p * p, config.dim), config.param_dtype).reshape(p, p, 3, -1)
        self.kernel = nnx.Param(kernel, axes=(None, None, None, "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, H, W, 3]` -> `[b, n, e]`."""
        kernel = gather(self.kernel[...].astype(x.dtype))  # the activations' dtype decides, as in Linear
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, kernel.shape[:2], "VALID", dimension_numbers=dims)
        return reshape(x, (len(x), x.shape[1] * x.shape[2], kernel.shape[-1]))  # [b, n, e]


class Block(nnx.Module):
    """Self-attention and MLP, each behind a layer norm."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.dim, config.eps)
        self.attention = Attention(config, rngs)
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, l, e]` -> `[b, l, e]`."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nnx.Module):
    """Full self-attention."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        c = config
        self.q, self.k, self.v = (
            Linear(c.dim, c.dim, rngs, axes=("embed", "heads"), param_dtype=c.param_dtype) for _ in range(3)
        )
        self.o = Linear(c.dim, c.dim, rngs, axes=("heads", "embed"), param_dtype=c.param_dtype)
        self.num_heads = c.num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, l, e]` -> `[b, l, e]`."""
        b, length, _ = x.shape
        q, k, v = (f(x).reshape(b, length, self.num_heads, -1) for f in (self.q, self.k, self.v))  # [b, l, n, d]
        return self.o(local_attention(q, k, v).reshape(b, length, -1))  # [b, l, e]


class MLP(nnx.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        c = config
        self.fc_in = Linear(c.dim, c.mlp_dim, rngs, axes=("embed", "mlp"), param_dtype=c.param_dtype)
        self.fc_out = Linear(c.mlp_dim, c.dim, rngs, axes=("mlp", "embed"), param_dtype=c.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, l, e]` -> `[b, l, e]`."""
        return self.fc_out(jax.nn.gelu(self.fc_in(x), approximate=False))
