"""What sampling gives."""

from __future__ import annotations

import base64
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from wanjax import media
from wanjax.sampling.request import Request


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A video and how it came to be. A notebook shows it as a player.

    latents: `[1, f, h, w, c]` float32, normalised.
    video: uint8 `[F, H, W, 3]`; no frames where it was not decoded.
    fps: frames a second.
    seconds: by stage.
    evaluations: DiT forward passes; running only one branch of guidance counts 0.5.
    """

    latents: np.ndarray
    video: np.ndarray
    fps: float
    seconds: dict[str, float]
    evaluations: float

    def save(self, path: str | Path) -> Path:
        """Write the video: `.mp4`, `.gif`, `.npy` (uint8 `[F, H, W, 3]`) or a folder for `.png` files.

        Raises:
          InputError: the path cannot be written.
          OSError: the disk is full or fails.
        """
        media.write_video(path, self.video, self.fps)
        return Path(path)

    def __repr__(self) -> str:
        frames, height, width, _ = self.video.shape
        return f"Result({frames} frames of {width}x{height} at {self.fps:g} fps, {sum(self.seconds.values()):.1f} s)"

    def _repr_html_(self) -> str | None:
        """The video as a player, for notebooks; the file is inside."""
        if not len(self.video):
            return None
        with tempfile.TemporaryDirectory() as folder:
            data = self.save(Path(folder) / "video.mp4").read_bytes()
        source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        return f'<video controls loop autoplay muted src="{source}"></video>'


def given_psnr(request: Request, result: Result) -> dict[int, float]:
    """How well the video shows each given picture, dB, by its frame: a flash or a jump there is seen in it."""
    indices = np.flatnonzero(request.given)
    shown = result.video[indices].astype(np.float64) / 255  # [k, H, W, 3]
    pictures = np.clip((request.frames.astype(np.float64) + 1) / 2, 0, 1)
    errors = np.mean((shown - pictures) ** 2, axis=(1, 2, 3))
    psnr = -10 * np.log10(np.maximum(errors, 1e-10))
    return {int(i): float(x) for i, x in zip(indices, psnr, strict=True)}
