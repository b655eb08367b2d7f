"""Noise in the shape of encoded clips: every sample a pure function of its seed and number.

Nothing can be learned from it but to remember it. It is for tests, for measuring speed and memory, and as the shortest
example of a `wanjax.data.batch.SampleSource`.
"""

from __future__ import annotations

import numpy as np

from wanjax.conditioning.frames import given_frames, latent_frames, latent_mask, latent_size
from wanjax.conditioning.samples import Encoded
from wanjax.config import WAN_VAE, DiTConfig, TrainConfig


class Synthetic:
    """Samples for a network, as large as the configured video.

    Args:
      config: height, width, frames and seed are used.
      dit: sizes of the features, and whether there are images and an image condition.
      distinct: how many different samples there are, over and over; None: no end of them.
    """

    def __init__(self, config: TrainConfig, dit: DiTConfig, distinct: int | None = None):
        frames = latent_frames(config.frames, WAN_VAE)
        size = latent_size(config.height, config.width, WAN_VAE, dit.patch_size)
        self.shape = (frames, *size, dit.out_channels)
        given = given_frames(dit.task, config.frames)  # [F]
        self.mask = np.asarray(latent_mask(given[None], *size, WAN_VAE))[0]  # [f, h, w, 4]
        self.dit, self.seed, self.distinct = dit, config.seed, distinct

    def __getitem__(self, index: int) -> Encoded:
        """Sample `index`, from 0."""
        number = index if self.distinct is None else index % self.distinct
        rng = np.random.default_rng((self.seed, number))
        c = self.dit
        latents = _normal(rng, self.shape)  # [f, h, w, c]
        text = _normal(rng, (c.text_len, c.text_dim))
        image = None if c.image_dim is None else _normal(rng, (c.image_positions or 257, c.image_dim))
        text[int(rng.integers(1, c.text_len + 1)) :] = 0  # behind the caption
        return Encoded(latents, text, image, self._image_condition(latents))

    def name(self, index: int) -> str:
        """Which of the different samples it is."""
        return f"synthetic-{index if self.distinct is None else index % self.distinct}"

    def _image_condition(self, latents: np.ndarray) -> np.ndarray | None:
        if self.dit.in_channels == self.dit.out_channels:
            return None
        known = self.mask.any(axis=-1, keepdims=True)  # [f, h, w, 1]
        return np.concatenate([self.mask, np.where(known, latents, 0)], axis=-1)  # [f, h, w, 4 + c]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)
