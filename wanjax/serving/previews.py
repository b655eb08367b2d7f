"""Previews of latents as files that browsers play."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

SIDE = 320
"""Pixels of the longer side: latents are an eighth of the video's."""


def animation(pictures: np.ndarray, fps: float) -> bytes:
    """Pictures of latent frames, uint8 `[f, h, w, 3]`, as a moving WebP with a video's length; one alone stands still.

    Args:
      pictures: a latent frame each, which stands for four frames.
      fps: frames a second of the video.
    """
    height, width = pictures.shape[1:3]
    times = max(1, SIDE // max(height, width))
    size = (width * times, height * times)
    images = [PIL.Image.fromarray(x).resize(size, PIL.Image.Resampling.BICUBIC) for x in pictures]
    file, duration = io.BytesIO(), round(4000 / fps)
    images[0].save(
        file, "WEBP", quality=70, method=0, save_all=True, append_images=images[1:], duration=duration, loop=0
    )
    return file.getvalue()
