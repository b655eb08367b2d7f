"""Reconstruction: what the VAE learns.

    q(z | video) = N(mean, variance),  z ~ q
    loss = mean |decode(z) - video|^2 + weight KL(q || N(0, 1))

Source: Kingma and Welling (arXiv 1312.6114). Wan's own VAE also learns from perceptual and adversarial losses
(arXiv 2503.20314, section 4.1), which trade fidelity for sharpness and need networks of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding.rules import activation_spec, parameter_sharding
from wanjax.conditioning.encoders import Encoders
from wanjax.conditioning.frames import condition_video, latent_frames, to_pixels
from wanjax.config import TrainConfig, VAEConfig
from wanjax.data.clip import Clips
from wanjax.data.samples import ReconstructionSample, ReconstructionSamples
from wanjax.models.vae import VAE
from wanjax.models.vae_blocks import ResidualBlock
from wanjax.training.data import clips_to_look_at, open_clips
from wanjax.training.export import rounded
from wanjax.training.objectives.base import Data, Objective
from wanjax.weights import Checkpoint
from wanjax.weights.hub import checkpoint_folder
from wanjax.weights.mapping import NetworkName

STATISTICS_CLIPS = 256
"""That the statistics of a VAE's latents are taken from."""
LOG_VARIANCE = -6.0
"""Of the latents of a random VAE."""


class ReconstructionBatch(NamedTuple):
    """Parts of clips with the noise of their latents, `[b, f, h, w, z]`."""

    samples: ReconstructionSample
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Reconstruction(Objective[VAE, ReconstructionSample, ReconstructionBatch]):
    """The objective of the VAE.

    config: of the run.
    vae: of the network; its latents' statistics are not those of the network that is being trained.
    """

    config: TrainConfig
    vae: VAEConfig

    unit: ClassVar = "frames"
    name: ClassVar = "a VAE"

    def units(self, batch: ReconstructionSample) -> int:
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
        return Checkpoint(checkpoint_folder(self.config.checkpoint)).load("vae", self.vae, parameter_sharding)

    def prepare(self, batch: ReconstructionSample, key: jax.Array) -> ReconstructionBatch:
        """Draw the latents' noise."""
        b, frames, height, width, _ = batch.video.shape
        factor = self.vae.spatial_factor
        shape = (b, latent_frames(frames, self.vae), height // factor, width // factor, self.vae.z_dim)
        spec = activation_spec(shape, "batch", None, None, None, None)
        return ReconstructionBatch(batch, jax.random.normal(key, shape, jnp.float32, out_sharding=spec))

    def loss(self, model: VAE, batch: ReconstructionBatch) -> jax.Array:
        """Squared error and divergence, float32."""
        video = condition_video(to_pixels(batch.samples.video), batch.samples.given)  # [b, F, H, W, 3]
        (mean, log_variance), _ = model.moments(video)  # [b, f, h, w, z] each
        log_variance = jnp.clip(log_variance, -20, 10)  # random weights may give any number
        latents = mean + jnp.exp(log_variance / 2) * batch.noise
        decoded, _ = model.reconstruct(latents)  # [b, F, H, W, 3]
        error = decoded.astype(jnp.float32) - video
        divergence = (mean * mean + jnp.exp(log_variance) - 1 - log_variance) / 2
        return jnp.mean(error * error) + self.config.kl_weight * jnp.mean(divergence)

    def open_data(self, config: TrainConfig, encoders: Encoders | None = None) -> Data:
        """Parts of clips."""
        chosen = clips_to_look_at(config, self.name)
        return Data(ReconstructionSamples(chosen.clips, chosen.order(config), config))

    def networks(self, model: VAE) -> dict[NetworkName, Any]:
        """The VAE, with the statistics of its latents."""
        return {"vae": with_statistics(rounded(model), open_clips(self.config).clips)}


def with_statistics(vae: VAE, clips: Clips) -> VAE:
    """The VAE with the mean and deviation of each channel of its latents over some clips, in place of 0 and 1."""
    encode = jax.jit(lambda vae, video: vae.encode(to_pixels(video)))
    numbers = np.linspace(0, len(clips) - 1, STATISTICS_CLIPS).astype(int)
    latents = np.concatenate([np.asarray(encode(vae, clips[int(i)].video[None])) for i in numbers])
    mean, std = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
    raw_mean, raw_std = (np.array(x) for x in (vae.config.latents_mean, vae.config.latents_std))
    mean, std = mean * raw_std + raw_mean, std * raw_std  # those that it had are taken back
    result: VAE = nnx.merge(*nnx.split(vae))  # another tree of the same arrays
    result.config = dataclasses.replace(
        vae.config, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std))
    )
    return result
