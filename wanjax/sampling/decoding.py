"""From latents to frames."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sharding.rules import replicate
from sharding.xla_options import VAE_OPTIONS
from wanjax.conditioning.frames import to_uint8
from wanjax.models.vae import VAE
from wanjax.models.vae_blocks import Cache


def decode_video(
    vae: VAE, latents: jax.Array, run: Callable[..., Any], tick: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Latents `[1, f, h, w, c]` to uint8 frames `[F, H, W, 3]` on the host, a latent frame at a time.

    Args:
      vae: on the ambient mesh.
      latents: normalised.
      run: calls compiled functions: `run(function, *arguments)`.
      tick: called once a latent frame.
    """
    chunks, cache = [], None
    for i in range(latents.shape[1]):
        frames, cache = run(decode_chunk, vae, latents[:, i : i + 1], cache)
        chunks.append(np.asarray(frames))
        tick()
    return np.concatenate(chunks)


@functools.partial(jax.jit, donate_argnames="cache", compiler_options=VAE_OPTIONS)
def decode_chunk(vae: VAE, latents: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """`VAE.decode_chunk` of one video, as uint8 `[F, H, W, 3]`, whole on every device."""
    video, cache = vae.decode_chunk(latents, cache)
    return replicate(to_uint8(video[0])), cache


@jax.jit
def decode_batch(vae: VAE, latents: jax.Array) -> jax.Array:
    """Latents `[b, f, h, w, c]` to uint8 videos `[b, F, H, W, 3]`, the whole of them on every device."""
    return replicate(to_uint8(vae.decode(latents)))
