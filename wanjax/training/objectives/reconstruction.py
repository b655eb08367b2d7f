"""Reconstruction: what the VAE learns.

    q(z | video) = N(mean, variance),  z ~ q
    loss = mean |decode(z) - video|^2 + weight KL(q || N(0, 1))

Source: Kingma and Welling (arXiv 1312.6114). Wan's own VAE also learns from perceptual and adversarial losses
(arXiv 2503.20314, section 4.1), which trade fidelity for sharpness and need networks of their own.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.rules import activation_spec, parameter_sharding
from wanjax.conditioning.frames import control_video, latent_frames, to_pixels
from wanjax.config import TrainConfig, VAEConfig
from wanjax.data.samples import Snippet
from wanjax.models.vae import VAE
from wanjax.models.vae_blocks import ResidualBlock
from wanjax.weights import Checkpoint

LOG_VARIANCE = -6.0
"""Of the latents of a random VAE."""


class Drawn(NamedTuple):
    """Snippets with the noise of their latents, `[b, f, h, w, z]`."""

    snippets: Snippet
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The objective of the VAE; an `Objective`.

    config: of the run.
    vae: of the network; its latents' statistics are not those of the network that is being trained.
    """

    config: TrainConfig
    vae: VAEConfig

    @property
    def unit(self) -> str:
        """What `units` counts."""
        return "frames"

    def units(self, batch: Snippet) -> int:
        """Frames of a batch."""
        return batch.given.size

    def make(self, rngs: nnx.Rngs) -> VAE:
        """A random VAE, with hardly any noise in its latents, which would drown all that is to be learned.

        Its residual branches begin at zero, so that it begins as a shallow network.
        """
        model = VAE(self.vae, rngs)
        bias = model.quant_conv.bias
        bias[...] = bias[...].at[self.vae.z_dim :].add(LOG_VARIANCE)
        for _, block in nnx.iter_modules(model):
            if isinstance(block, ResidualBlock):
                block.conv2.kernel[...] = jnp.zeros_like(block.conv2.kernel[...])
        return model

    def load(self) -> VAE:
        """The checkpoint's VAE."""
        assert self.config.checkpoint is not None
        return Checkpoint(self.config.checkpoint).load("vae", self.vae, parameter_sharding)

    def prepare(self, batch: Snippet, key: jax.Array) -> Drawn:
        """Draw the latents' noise."""
        b, frames, height, width, _ = batch.video.shape
        factor = self.vae.spatial_factor
        shape = (b, latent_frames(frames), height // factor, width // factor, self.vae.z_dim)
        spec = activation_spec(shape, "batch", None, None, None, None)
        return Drawn(batch, jax.random.normal(key, shape, jnp.float32, out_sharding=spec))

    def loss(self, model: VAE, drawn: Drawn) -> jax.Array:
        """Squared error and divergence, float32."""
        video = control_video(to_pixels(drawn.snippets.video), drawn.snippets.given)  # [b, F, H, W, 3]
        (mean, log_variance), _ = model.moments(video)  # [b, f, h, w, z] each
        log_variance = jnp.clip(log_variance, -20, 10)  # random weights may give any number
        latents = mean + jnp.exp(log_variance / 2) * drawn.noise
        decoded, _ = model.reconstruct(latents)  # [b, F, H, W, 3]
        error = decoded.astype(jnp.float32) - video
        divergence = (mean * mean + jnp.exp(log_variance) - 1 - log_variance) / 2
        return jnp.mean(error * error) + self.config.kl_weight * jnp.mean(divergence)
