"""What stands before and behind the DiT's blocks: patches, image features, the timestep, and the head.

Source: Wan2.1 `wan/modules/model.py`. The tensors have the shapes of `wanjax.models.dit`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding.rules import constrain, gather, reshape, token_padding
from wanjax.config import DiTConfig
from wanjax.models.layers import LayerNorm, Linear, modulate, xavier, zeros


class MLP(nnx.Module):
    """Two linear layers with an activation between them. GELU is the tanh form, as `jax.nn.gelu` defaults to."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, rngs: nnx.Rngs, *, param_dtype, init=xavier):
        self.fc_in = Linear(in_dim, hidden, rngs, axes=("embed", "mlp"), param_dtype=param_dtype, init=init)
        self.fc_out = Linear(hidden, out_dim, rngs, axes=("mlp", "embed"), param_dtype=param_dtype, init=init)

    def __call__(self, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`[.., in_dim]` -> `[.., out_dim]`."""
        return self.fc_out(self.fc_in(x, activation))


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
        x = jnp.pad(x, ((0, 0), (0, token_padding(x.shape[1])), (0, 0)))  # [b, l, ..]
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
