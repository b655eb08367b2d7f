"""The blocks of the Wan-VAE: causal in time, streamed through an explicit cache (Wan2.1 `wan/modules/vae.py`).

Every block maps `(x, cache) -> (x, cache)` on `x [b, f, h, w, c]`, one chunk of consecutive frames. `cache` holds what
the block must remember of earlier frames, and is None at the start of the clip. Chunks may be of any length that the
temporal strides divide (the clip's first frame apart, which is never strided): the result does not depend on it.

On a mesh `x` and `cache` are split over batch, height and width, as the network's input was, and stay so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.halo import Padding, to_whole_frames, windowed
from sharding.rules import gather, repeat, reshape
from wanjax.config import VAEConfig
from wanjax.models.layers import Linear
from wanjax.ops.attention import reference_forward
from wanjax.ops.conv import conv2d

Cache = jax.Array | tuple["Cache", ...] | None
kernel_init = jax.nn.initializers.lecun_normal()


def bias_init(key: jax.Array, dim: int, kernel: jax.Array) -> jax.Array:
    """Small numbers, not zeros: a grey frame would become all zeros, and the norms' gradients have no bound there."""
    bound = math.prod(kernel.shape[:-1]) ** -0.5
    return jax.random.uniform(key, (dim,), kernel.dtype, -bound, bound)


class Block(Protocol):
    """What the networks are chained from."""

    def __call__(self, x: jax.Array, cache: Cache, /) -> tuple[jax.Array, Cache]:
        """One chunk of frames and the cache from the chunk before, to the same for the next."""
        ...


def chain(blocks: Sequence[Block], x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Applies blocks in order. The cache is the tuple of theirs."""
    old = cache if isinstance(cache, tuple) else (None,) * len(blocks)
    new = []
    for block, c in zip(blocks, old, strict=True):
        x, c = block(x, c)
        new.append(c)
    return x, tuple(new)


def conv(x: jax.Array, kernel: jax.Array, time_stride: int = 1, space_stride: int = 1) -> jax.Array:
    """3D convolution: valid in time, padded with zeros in space so that the size is divided by `space_stride`.

    All the spatial padding of the VAE happens here. A stride of 2 pads below and on the right only.

    Args:
      x: `[b, f, h, w, c]`.
      kernel: `[kt, kh, kw, c, out]`, cast to the dtype of `x`.
      time_stride, space_stride: strides.

    Returns:
      `[b, (f - kt) // time_stride + 1, h / space_stride, w / space_stride, out]`.
    """
    strides = (time_stride, space_stride)
    above, left = (k - space_stride for k in kernel.shape[1:3])
    padding = ((above // 2, above - above // 2), (left // 2, left - left // 2))

    def convolve(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
        taps, conv3d = (functools.partial(form, strides=strides, padding=padding) for form in (_taps, _conv3d))
        return jax.lax.platform_dependent(x, kernel, cpu=taps, default=conv3d)

    return windowed(convolve, x, kernel.astype(x.dtype), padding)


def _conv3d(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides[0], strides[1], strides[1]),
        [(0, 0), *padding],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )  # [b, f, h, w, c]


def _taps(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    """The same as a sum of 2D convolutions over the kernel's frames: on a CPU, XLA runs those twice as fast."""
    b, f, *_ = x.shape
    kt = kernel.shape[0]
    frames = (f - kt) // strides[0] + 1
    y = jnp.float32(0)  # the partial sums are rounded once, as in the 3D form
    for i in range(kt):
        tap = x[:, i : i + (frames - 1) * strides[0] + 1 : strides[0]]  # [b, frames, h, w, c]
        tap = tap.reshape(b * frames, *tap.shape[2:])  # [b * frames, h, w, c]
        y += conv2d(tap, kernel[i], strides[1], padding)  # [b * frames, h, w, out]
    return y.astype(x.dtype).reshape(b, frames, *y.shape[1:])  # [b, frames, h, w, out]


def _zeros(x: jax.Array, frames: int) -> jax.Array:
    """Zeros like `frames` frames of `x`, split as it is."""
    b, _, h, w, c = x.shape
    return jnp.zeros((b, frames, h, w, c), x.dtype, device=jax.typeof(x).sharding)


class Norm(nnx.Module):
    """Each position's channels scaled to length sqrt(c), times `scale`. In float32, returned in the dtype of `x`."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps the shape `[b, f, h, w, c]`."""
        x32 = x.astype(jnp.float32)  # bf16 squares lose the small channels
        ones = jnp.ones(x.shape[-1:], jnp.float32)
        # As a product, not a reduction: XLA on a CPU then sums in the same order whatever the number of frames, so
        # that chunks give the whole clip's bits. On a TPU both compile to the same program.
        squares = jnp.einsum("...c,c->...", x32 * x32, ones, precision="highest")[..., None]  # [b, f, h, w, 1]
        length = jnp.sqrt(jnp.maximum(squares, 1e-24))  # in this order its gradient at zero is a number
        return (x32 / length * x.shape[-1] ** 0.5 * gather(self.scale[...])).astype(x.dtype)


class Conv(nnx.Module):
    """3D convolution, causal in time: what lies before the clip is zeros.

    The cache is the last `kt - time_stride` frames of the input: all that later frames can still see.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        size: tuple[int, int, int],
        config: VAEConfig,
        rngs: nnx.Rngs,
        *,
        time_stride: int = 1,
    ):
        kernel = kernel_init(rngs.params(), (*size, in_dim, out_dim), config.param_dtype)
        self.kernel = nnx.Param(kernel, axes=(None, None, None, "mlp", "embed"))
        self.bias = nnx.Param(bias_init(rngs.params(), out_dim, kernel), axes=("embed",))
        self.time_stride = time_stride

    def __call__(self, x: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
        """`[b, F, h, w, c]` to `[b, f, h, w, out]`."""
        f = x.shape[1]
        kernel = gather(self.kernel[...].astype(x.dtype))  # the activations' dtype, and before it travels
        keep = kernel.shape[0] - self.time_stride
        skip = max(0, keep + 1 - f) if cache is None else 0  # taps of the first frames that meet nothing but zeros
        past = _zeros(x, keep) if cache is None else cache
        assert isinstance(past, jax.Array)
        x = jnp.concatenate([past, x], axis=1)  # [b, keep + f, h, w, c]
        y = conv(x[:, skip:], kernel[skip:], self.time_stride)  # [b, f, h, w, out]
        return y + gather(self.bias[...].astype(x.dtype)), x[:, x.shape[1] - keep :]


class FrameConv(nnx.Module):
    """2D convolution of every frame. Kernel `[kh, kw, in, out]`."""

    def __init__(self, in_dim: int, out_dim: int, config: VAEConfig, rngs: nnx.Rngs, *, stride: int):
        kernel = kernel_init(rngs.params(), (3, 3, in_dim, out_dim), config.param_dtype)
        self.kernel = nnx.Param(kernel, axes=(None, None, "mlp", "embed"))
        self.bias = nnx.Param(bias_init(rngs.params(), out_dim, kernel), axes=("embed",))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, f, h, w, c]` to `[b, f, h / stride, w / stride, out]`."""
        kernel = gather(self.kernel[...].astype(x.dtype))[None]
        y = conv(x, kernel, space_stride=self.stride)  # [b, f, h / stride, w / stride, out]
        return y + gather(self.bias[...].astype(x.dtype))


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU, 3x3x3 convolution; the shortcut is pointwise where the channels change."""

    def __init__(self, in_dim: int, out_dim: int, config: VAEConfig, rngs: nnx.Rngs):
        self.norm1 = Norm(in_dim)
        self.conv1 = Conv(in_dim, out_dim, (3, 3, 3), config, rngs)
        self.norm2 = Norm(out_dim)
        self.conv2 = Conv(out_dim, out_dim, (3, 3, 3), config, rngs)
        self.shortcut = Conv(in_dim, out_dim, (1, 1, 1), config, rngs) if in_dim != out_dim else None

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`[b, f, h, w, c]` to `[b, f, h, w, out]`."""
        cache1, cache2 = cache if isinstance(cache, tuple) else (None, None)
        y, cache1 = self.conv1(jax.nn.silu(self.norm1(x)), cache1)
        y, cache2 = self.conv2(jax.nn.silu(self.norm2(y)), cache2)
        shortcut = x if self.shortcut is None else self.shortcut(x)[0]
        return shortcut + y, (cache1, cache2)


class AttentionBlock(nnx.Module):
    """Single-head self-attention within each frame. Remembers nothing."""

    def __init__(self, dim: int, config: VAEConfig, rngs: nnx.Rngs):
        self.norm = Norm(dim)
        self.qkv = Linear(dim, 3 * dim, rngs, axes=("mlp", "embed"), param_dtype=config.param_dtype)
        self.proj = Linear(dim, dim, rngs, axes=("mlp", "embed"), param_dtype=config.param_dtype)

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Keeps the shape `[b, f, h, w, c]`."""
        q, kv = jnp.split(self.qkv(self.norm(x)), [x.shape[-1]], axis=-1)  # [b, f, h, w, c], [b, f, h, w, 2 c]
        return x + self.proj(to_whole_frames(_attend, q, kv)), None


def _attend(q: jax.Array, kv: jax.Array) -> jax.Array:
    """Attention within each frame, of queries `[b, f, h, w, c]` to keys and values `[b, f, h', w', 2 c]`."""
    b, f, *_, c = q.shape
    k, v = jnp.split(kv.reshape(b * f, 1, -1, 2 * c), 2, axis=-1)  # [b * f, 1, l, c]
    # The head is too wide for the fused kernels, and it is little.
    y, _ = reference_forward(q.reshape(b * f, 1, -1, c), k, v, None, q.dtype)  # [b * f, 1, l, c]
    return y.reshape(q.shape)  # [b, f, h, w, c]


class Mid(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int, config: VAEConfig, rngs: nnx.Rngs):
        self.first = ResidualBlock(dim, dim, config, rngs)
        self.attention = AttentionBlock(dim, config, rngs)
        self.second = ResidualBlock(dim, dim, config, rngs)

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Keeps the shape `[b, f, h, w, c]`."""
        return chain([self.first, self.attention, self.second], x, cache)


class Downsample(nnx.Module):
    """Halves height and width, then, if `temporal`, the number of frames; the clip's first frame stays a frame."""

    def __init__(self, dim: int, config: VAEConfig, rngs: nnx.Rngs, *, temporal: bool):
        self.conv = FrameConv(dim, dim, config, rngs, stride=2)
        self.time_conv = Conv(dim, dim, (3, 1, 1), config, rngs, time_stride=2) if temporal else None

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`[b, F, h, w, c]` to `[b, f, h / 2, w / 2, c]`."""
        x = self.conv(x)  # [b, f, h / 2, w / 2, c]
        if self.time_conv is None:
            return x, None
        if cache is not None:
            return self.time_conv(x, cache)
        first, rest = x[:, :1], x[:, 1:]
        if rest.shape[1] == 0:
            return first, first
        y, cache = self.time_conv(rest, first)
        return jnp.concatenate([first, y], axis=1), cache  # [b, 1 + (f - 1) / 2, h / 2, w / 2, c]


class Upsample(nnx.Module):
    """Doubles, if `temporal`, the number of frames, then height and width; the clip's first frame stays one frame.

    To the temporal convolution the first frame is as unseen as what lies before the clip: zeros.
    """

    def __init__(self, dim: int, config: VAEConfig, rngs: nnx.Rngs, *, temporal: bool):
        self.time_conv = Conv(dim, 2 * dim, (3, 1, 1), config, rngs) if temporal else None
        self.conv = FrameConv(dim, dim // 2, config, rngs, stride=1)

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`[b, f, h, w, c]` to `[b, F, 2 h, 2 w, c / 2]`."""
        if self.time_conv is not None:
            x, cache = self._double_frames(self.time_conv, x, cache)  # [b, 2 f, h, w, c]
        x = repeat(repeat(x, 2, axis=2), 2, axis=3)  # [b, f, 2 h, 2 w, c]
        return self.conv(x), cache  # [b, f, 2 h, 2 w, c / 2]

    def _double_frames(self, time_conv: Conv, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        b, _, h, w, c = x.shape
        first, rest = (x[:, :1], x[:, 1:]) if cache is None else (x[:, :0], x)
        if cache is None:
            cache = _zeros(x, 2)
        if rest.shape[1] == 0:
            return first, cache
        y, cache = time_conv(rest, cache)  # [b, f, h, w, 2 c]
        pairs = jnp.stack(jnp.split(y, 2, axis=-1), axis=2)  # [b, f, 2, h, w, c]
        rest = reshape(pairs, (b, 2 * y.shape[1], h, w, c), like=x)  # [b, 2 f, h, w, c]
        return jnp.concatenate([first, rest], axis=1), cache  # [b, 2 f, h, w, c]
