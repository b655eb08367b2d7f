"""Wan-VAE: causal 3D autoencoder, 8x8 in space and 4 in time (arXiv 2503.20314, 4.1; Wan2.1 `wan/modules/vae.py`).

    latents = vae.encode(video)        # [b, 1 + 4 n, H, W, 3] -> [b, 1 + n, H / 8, W / 8, 16]
    video = vae.decode(latents)

A clip is a first frame and groups of four; a group becomes one latent frame. Both directions run through time one group
at a time and carry, from group to group, the few frames of every layer that later ones still see: memory does not grow
with the length of the clip, and the result is that of the whole clip at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.rules import constrain, split_pictures
from wanjax.config import VAEConfig
from wanjax.errors import InputError
from wanjax.models.vae_blocks import Cache, Conv, Downsample, Mid, Norm, ResidualBlock, Upsample, chain

Step = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]


class Encoder(nnx.Module):
    """Frames `[b, F, H, W, 3]` to features `[b, f, h, w, 2 z]`: what the mean and the log variance are made from."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv_in = Conv(3, widths[0], (3, 3, 3), config, rngs)
        self.blocks = nnx.List([])
        for i, (in_dim, out_dim) in enumerate(itertools.pairwise(widths)):
            for j in range(config.num_res_blocks):
                self.blocks.append(ResidualBlock(out_dim if j else in_dim, out_dim, config, rngs))
            if i < len(config.temporal_downsample):
                self.blocks.append(Downsample(out_dim, config, rngs, temporal=config.temporal_downsample[i]))
        self.mid = Mid(widths[-1], config, rngs)
        self.norm_out = Norm(widths[-1])
        self.conv_out = Conv(widths[-1], 2 * config.z_dim, (3, 3, 3), config, rngs)

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`[b, F, H, W, 3]` to `[b, f, h, w, 2 z]`."""
        return chain([self.conv_in, *self.blocks, self.mid, self._head], x, cache)

    def _head(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return self.conv_out(jax.nn.silu(self.norm_out(x)), cache)


class Decoder(nnx.Module):
    """Latent frames `[b, f, h, w, z]` to frames `[b, F, H, W, 3]`, not yet clamped."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        widths = [config.dim * m for m in config.dim_mult[::-1]]
        temporal = config.temporal_downsample[::-1]
        self.conv_in = Conv(config.z_dim, widths[0], (3, 3, 3), config, rngs)
        self.mid = Mid(widths[0], config, rngs)
        self.blocks = nnx.List([])
        for i, out_dim in enumerate(widths):
            in_dim = widths[i - 1] // 2 if i else out_dim  # an upsampling halves the channels
            for j in range(config.num_res_blocks + 1):
                self.blocks.append(ResidualBlock(out_dim if j else in_dim, out_dim, config, rngs))
            if i < len(temporal):
                self.blocks.append(Upsample(out_dim, config, rngs, temporal=temporal[i]))
        self.norm_out = Norm(widths[-1])
        self.conv_out = Conv(widths[-1], 3, (3, 3, 3), config, rngs)

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`[b, f, h, w, z]` to `[b, F, H, W, 3]`."""
        return chain([self.conv_in, self.mid, *self.blocks, self._head], x, cache)

    def _head(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return self.conv_out(jax.nn.silu(self.norm_out(x)), cache)


class VAE(nnx.Module):
    """Videos to normalised latents and back. Deterministic: encoding returns the mean.

    On a mesh every device stores a part of the weights, gathers a layer's when it comes to it, and works on its part of
    every frame (`sharding.rules.pictures_spec`): convolutions exchange a row or column with their neighbours
    (`sharding.halo`), only the attention sees whole frames. Callers may lay out what they give in any way; latents
    are split over the batch only, videos over height and width too.
    """

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        z = config.z_dim
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.quant_conv = Conv(2 * z, 2 * z, (1, 1, 1), config, rngs)
        self.post_quant_conv = Conv(z, z, (1, 1, 1), config, rngs)
        self.decoder = Decoder(config, rngs)

    def encode(self, video: jax.Array) -> jax.Array:
        """Encodes a clip.

        Args:
          video: `[b, F, H, W, 3]` in [-1, 1], `F = 1 + 4 n`, `H` and `W` multiples of 8.

        Returns:
          Normalised latents `[b, 1 + n, H / 8, W / 8, z]`, float32.

        Raises:
          InputError: the clip has another shape.
        """
        check_video(video.shape, self.config)
        return _stream(self.encode_chunk, video, self.config.temporal_factor, 1)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes a clip.

        Args:
          latents: normalised latents `[b, 1 + n, h, w, z]`.

        Returns:
          `[b, 1 + 4 n, 8 h, 8 w, 3]`, clamped to [-1, 1], in the configuration's dtype.

        Raises:
          InputError: the latents have another shape.
        """
        check_latents(latents.shape, self.config)
        return _stream(self.decode_chunk, latents, 1, self.config.temporal_factor)

    def encode_chunk(self, frames: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
        """Encodes the next frames of a clip.

        Args:
          frames: `[b, F, H, W, 3]` in [-1, 1]: `1 + 4 n` frames at the start of a clip, then `4 n` (`n >= 1`).
          cache: what the previous call returned; None at the start.

        Returns:
          Normalised latents `[b, f, h, w, z]`, float32, and the cache for the next call.

        Raises:
          InputError: the frames have another shape.
        """
        (mean, _), cache = self.moments(frames, cache)
        latents = (mean - self._shift()) / self._scale()
        return constrain(latents, "batch", None, None, None, None), cache

    def moments(self, frames: jax.Array, cache: Cache = None) -> tuple[tuple[jax.Array, jax.Array], Cache]:
        """Mean and log variance of the next latents `[b, f, h, w, z]`, not normalised, float32; see `encode_chunk`."""
        check_video(frames.shape, self.config, first=1 if cache is None else 0)
        height, width = (n // self.config.spatial_factor for n in frames.shape[2:4])
        frames = split_pictures(frames.astype(self.config.dtype), (height, width))
        x, cache = self.encoder(frames, cache)
        moments, _ = self.quant_conv(x)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)  # the solver's dtype
        return (mean, log_variance), cache

    def decode_chunk(self, latents: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
        """Decodes the next latent frames of a clip.

        Args:
          latents: normalised latents `[b, f, h, w, z]`, any number of frames.
          cache: what the previous call returned; None at the start.

        Returns:
          `[b, F, H, W, 3]` in [-1, 1], `F = 1 + 4 (f - 1)` at the start of a clip, then `4 f`; and the cache for the
          next call.

        Raises:
          InputError: the latents have another shape.
        """
        check_latents(latents.shape, self.config)
        height, width = latents.shape[2:4]
        latents = split_pictures(latents, (height, width))
        raw = latents.astype(jnp.float32) * self._scale() + self._shift()  # in float32: it undoes a float32 division
        video, cache = self.reconstruct(raw, cache)
        return jnp.clip(video, -1, 1), cache

    def reconstruct(self, raw: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
        """The next frames from latents that are not normalised; they are not clamped. See `decode_chunk`."""
        x, _ = self.post_quant_conv(raw.astype(self.config.dtype))
        return self.decoder(x, cache)

    def _shift(self) -> jax.Array:
        return jnp.asarray(self.config.latents_mean, jnp.float32)

    def _scale(self) -> jax.Array:
        return jnp.asarray(self.config.latents_std, jnp.float32)


def _stream(step: Step, x: jax.Array, size: int, out_size: int) -> jax.Array:
    """Runs `step` over the first frame of `x`, then over chunks of `size` frames that give `out_size` each.

    The output is written in place, so that the loop holds the output, one chunk's activations and the cache.
    """
    first, cache = step(x[:, :1], None)
    chunks = (x.shape[1] - 1) // size
    if not chunks:  # a loop of no rounds is traced all the same, and could not slice
        return first
    out = jnp.pad(first, ((0, 0), (0, chunks * out_size), (0, 0), (0, 0), (0, 0)))  # [b, f, h, w, c]

    def body(carry: tuple[Cache, jax.Array], i: jax.Array) -> tuple[tuple[Cache, jax.Array], None]:
        cache, out = carry
        y, cache = step(jax.lax.dynamic_slice_in_dim(x, 1 + i * size, size, axis=1), cache)
        return (cache, jax.lax.dynamic_update_slice_in_dim(out, y, 1 + i * out_size, axis=1)), None

    return jax.lax.scan(body, (cache, out), jnp.arange(chunks))[0][1]


def check_video(shape: tuple[int, ...], config: VAEConfig, first: int = 1) -> None:
    """Refuses a video that the VAE cannot encode. `first`: 1 with a clip's first frame, 0 for later chunks.

    Raises:
      InputError: not `[b, F, H, W, 3]`, or a number of frames or a size that the VAE does not divide.
    """
    if len(shape) != 5 or shape[-1] != 3:
        raise InputError(f"A video of shape {shape} was given; the VAE takes [batch, frames, height, width, 3].")
    _, frames, height, width, _ = shape
    t, s = config.temporal_factor, config.spatial_factor
    if frames < (first or t) or (frames - first) % t:
        accepted = f"{t}n+1 frames ({1}, {1 + t}, {1 + 2 * t}, ..)" if first else f"{t}n frames after the first chunk"
        raise InputError(f"A video of {frames} frames was given; the VAE takes {accepted}: cut or repeat frames.")
    if not height or not width or height % s or width % s:
        raise InputError(f"Frames of {width}x{height} were given; the VAE takes multiples of {s}: resize or crop them.")


def check_latents(shape: tuple[int, ...], config: VAEConfig) -> None:
    """Refuses latents that the VAE cannot decode.

    Raises:
      InputError: not `[b, f, h, w, z]`.
    """
    if len(shape) != 5 or shape[-1] != config.z_dim or 0 in shape:
        raise InputError(
            f"Latents of shape {shape} were given; the VAE takes [batch, frames, height, width, {config.z_dim}]."
        )
