"""What is given to the model: task -> given pixel frames -> mask and condition video -> image condition.

A task is nothing but the set of pixel frames that are given: none (t2v), the first (i2v), the first and the last
(flf2v), the last (last), the first few (continuation), any (interpolation). One network learns them all, because the 20
channels beside the noise say which frames are given (mask, 4) and what is in them (VAE latent, 16).

The VAE compresses pixel frames 1 + 4 + 4 + .. into latent frames, so the four mask channels of a latent frame are the
flags of its four pixel frames; the first latent frame has only one, which is repeated.

Source: Wan (arXiv 2503.20314, section 5.1), Wan2.1 `wan/first_last_frame2video.py` (there for 81 frames only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.config import VAEConfig
from wanjax.errors import InputError

Task = Literal["t2v", "i2v", "flf2v", "last", "continuation", "interpolation"]


def latent_frames(frames: int, vae: VAEConfig) -> int:
    """Latent frames of a video of `frames` pixel frames, 4 n + 1 of them with the published VAE.

    Raises:
      InputError: another number of frames.
    """
    n = vae.temporal_factor
    if frames < 1 or (frames - 1) % n:
        below = max(1, (frames - 1) // n * n + 1)
        raise InputError(
            f"{frames} frames: accepted are {n}n+1 (1, {1 + n}, .. {1 + 20 * n}, ..); use {below} or {below + n}"
        )
    return (frames - 1) // n + 1


def latent_size(height: int, width: int, vae: VAEConfig, patch_size: tuple[int, int, int]) -> tuple[int, int]:
    """Latent height and width of a video of `height` x `width` pixels.

    Raises:
      InputError: unless both are positive multiples of what VAE and patches divide, 16 for published networks.
    """
    step = vae.size_multiple(patch_size)
    if height < 1 or width < 1 or height % step or width % step:
        near = [max(1, round(side / step)) * step for side in (height, width)]
        raise InputError(
            f"height {height}, width {width}: accepted are multiples of {step}; use {near[0]} and {near[1]}"
        )
    return height // vae.spatial_factor, width // vae.spatial_factor


def given_frames(task: Task, frames: int, *, count: int = 1, indices: Sequence[int] = ()) -> np.ndarray:
    """Which pixel frames `task` gives: bool `[F]`, on the host. Stack several for a batch of mixed tasks.

    Args:
      task: t2v, i2v, flf2v, last, continuation or interpolation.
      frames: length of the video.
      count: continuation only: how many frames at the start, 1 to F - 1.
      indices: interpolation only: which frames, 0 to F - 1 (or from -F, counted from the end).

    Raises:
      InputError: wrong count or index, or an unknown task.
    """
    if task == "continuation" and not 1 <= count < frames:
        raise InputError(f"continuation from {count} of {frames} frames: accepted are 1 to {frames - 1}; change count")
    if any(not -frames <= i < frames for i in indices):
        raise InputError(
            f"frame indices {list(indices)}: accepted are 0 to {frames - 1} (or -{frames} to -1); change them"
        )
    which: dict[str, Sequence[int]] = {
        "t2v": (),
        "i2v": (0,),
        "flf2v": (0, -1),
        "last": (-1,),
        "continuation": range(count),
        "interpolation": indices,
    }
    if task not in which:
        raise InputError(f"task {task!r}: accepted are {', '.join(which)}; choose one of these")
    given = np.zeros(frames, bool)  # [F]
    given[list(which[task])] = True
    return given


def latent_mask(given: jax.Array | np.ndarray, height: int, width: int, vae: VAEConfig) -> jax.Array:
    """The mask channels, one for each pixel frame of a latent frame: float32 `[b, f, h, w, 4]`, 1 = given.

    Args:
      given: bool `[b, F]`, see `given_frames`.
      height, width: of the latents.
      vae: that makes the latents.

    Raises:
      InputError: unless F is 4 n + 1.
    """
    b, frames = given.shape
    f, n = latent_frames(frames, vae), vae.temporal_factor
    # Of each latent frame: the first frame n times, then n by n. Chosen by a product, which is exact for ones
    # and zeros and keeps the sharding of a single sample: a slice of one element has none, from JAX 0.12 on.
    chosen = np.maximum(np.arange(f * n) - (n - 1), 0).reshape(f, n)
    choice = np.arange(frames)[:, None, None] == chosen  # [F, f, 4]
    flags = jnp.einsum("bF,Ffk->bfk", jnp.asarray(given).astype(jnp.float32), choice.astype(np.float32))  # [b, f, 4]
    return jnp.broadcast_to(flags[:, :, None, None], (b, f, height, width, n))  # [b, f, h, w, 4]


def to_pixels(video: jax.Array) -> jax.Array:
    """uint8 to float32 in [-1, 1], any shape."""
    return video.astype(jnp.float32) / 127.5 - 1  # 8 bits do not hold what lies between


def to_uint8(video: jax.Array) -> jax.Array:
    """What the VAE decoded, in [-1, 1], to uint8, any shape."""
    return jnp.round((video.astype(jnp.float32) + 1) * 127.5).astype(jnp.uint8)


def condition_video(video: jax.Array, given: jax.Array | np.ndarray) -> jax.Array:
    """The condition video from a whole one: its given frames, zeros (mid-grey) elsewhere; what goes into the VAE.

    Args:
      video: `[b, F, H, W, 3]` in [-1, 1].
      given: bool `[b, F]`, or `[1, F]` for the same frames in every sample.
    """
    return jnp.where(jnp.asarray(given)[:, :, None, None, None], video, 0)


def join_image_condition(mask: jax.Array, latents: jax.Array) -> jax.Array:
    """What stands beside the noise in the DiT's input, which is [noise 16 | mask 4 | latent 16].

    Args:
      mask: `[b, f, h, w, 4]`, see `latent_mask`.
      latents: `[b, f, h, w, 16]`, the condition video's latents, normalised.

    Returns:
      `[b, f, h, w, 20]` in the dtype of `latents` (0 and 1 are exact in every dtype).
    """
    # Concatenation wants both sharded alike: adding zeros gives the mask the sharding of the latents.
    mask = mask.astype(latents.dtype) + jnp.zeros_like(latents[..., :1])
    return jnp.concatenate([mask, latents], axis=-1)  # [b, f, h, w, 20]
