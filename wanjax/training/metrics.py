"""How near sampled videos are to the true ones: PSNR and SSIM, over all pixels of the frames compared, in [0, 255]."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def noise_of(clips: Any, shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """The noise of each clip, float32 `[b, ..]`: a function of the clip's number alone, not of the batch it is in."""
    keys = [jax.random.fold_in(jax.random.key(seed), int(clip)) for clip in clips]
    return jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])


def psnr(video: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of uint8 or float videos in [0, 255], any shape."""
    error = np.mean((video.astype(np.float64) - truth) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def ssim(video: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of uint8 or float videos `[F, H, W, 3]` in [0, 255]: mean over frames, colours and places.

    Gaussian windows of 11 x 11 and a deviation of 1.5, where they fit into the frame (Wang et al. 2004).
    """
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            x = np.lib.stride_tricks.sliding_window_view(x, len(window), axis) @ window
        return x

    a, b = video.astype(np.float64), truth.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(similar / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))))


def crossfade(video: np.ndarray) -> np.ndarray:
    """The last frame fading in over the first: float `[F, H, W, 3]`."""
    first, last = video[0].astype(np.float64), video[-1].astype(np.float64)
    time = np.linspace(0, 1, len(video))[:, None, None, None]
    return first + (last - first) * time


def nearest(video: np.ndarray) -> np.ndarray:
    """The first frame for the first half, then the last: uint8 `[F, H, W, 3]`."""
    time = np.linspace(0, 1, len(video))[:, None, None, None]
    return np.where(time < 0.5, video[0], video[-1])
