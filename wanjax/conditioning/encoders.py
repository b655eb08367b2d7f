"""From clips in pixels to what the DiT learns from: VAE, umT5 and CLIP, on the mesh.

The same function runs before training (`wanjax.training.latent_cache`) and during it, so both give the same numbers.
The encoders run data-parallel with their weights split over the devices; the VAE splits the pictures too (arXiv
2503.20314, 4.3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.rules import constrain, parameter_sharding
from wanjax.conditioning import text
from wanjax.conditioning.frames import control_branch, control_video, latent_mask, to_pixels
from wanjax.config import CLIPConfig, DiTConfig, TrainConfig
from wanjax.data.batch import Encoded, Pixels
from wanjax.errors import InputError
from wanjax.models.clip import CLIPVision
from wanjax.models.umt5 import UMT5Encoder
from wanjax.models.vae import VAE
from wanjax.weights import Checkpoint


class Networks(NamedTuple):
    """The encoders; `clip` is None for a network without images."""

    vae: VAE
    umt5: UMT5Encoder
    clip: CLIPVision | None


class Encoders:
    """The encoders of a checkpoint, loaded onto the ambient mesh.

    Attributes:
      tokenizer: the checkpoint's.
      clip: configuration of its CLIP; None for a network without images.

    Args:
      config: `encoders` (or `checkpoint`) and `dtype` are used.
      dit: the network that will learn from the results.

    Raises:
      InputError: the checkpoint lacks an encoder, or one does not fit the network.
    """

    def __init__(self, config: TrainConfig, dit: DiTConfig):
        folder = config.encoders or config.checkpoint
        if folder is None:
            raise InputError("no encoders; a checkpoint with vae, umT5 and CLIP is needed; give --encoders")
        checkpoint, dtype = Checkpoint(folder), jnp.dtype(config.dtype)
        self.dit, self.path = dit, folder
        self.tokenizer = text.Tokenizer(checkpoint.tokenizer_dir, dit.text_len)
        vae = checkpoint.config("vae")  # float32 as in sampling
        umt5 = checkpoint.config("umt5", dtype=dtype, param_dtype=dtype)
        self.clip: CLIPConfig | None = None
        if dit.image_dim is not None:
            self.clip = checkpoint.config("clip", dtype=dtype, param_dtype=dtype)
        self._check(vae.z_dim, umt5.dim, self.clip.dim if self.clip else None)
        self.networks = Networks(
            checkpoint.load("vae", vae, parameter_sharding),
            checkpoint.load("umt5", umt5, parameter_sharding),
            checkpoint.load("clip", self.clip, parameter_sharding) if self.clip else None,
        )

    def _check(self, *given: int | None) -> None:
        wanted = (self.dit.out_channels, self.dit.text_dim, self.dit.image_dim)
        names = ("latent channels", "text features", "image features")
        for name, ours, theirs in zip(names, wanted, given, strict=True):
            if ours != theirs:
                raise InputError(
                    f"encoders {self.path} make {theirs} {name}, the network takes {ours}; "
                    "the encoders that it was made for are needed; give another --encoders"
                )

    @property
    def images(self) -> int:
        """How many images' features the network takes: 2, 1 (i2v), 0."""
        return 0 if self.clip is None else 2 if self.dit.image_positions else 1

    def __call__(self, batch: Pixels) -> Encoded:
        """Encode a batch that is on the mesh."""
        return _encode(self.networks, self.dit.in_channels != self.dit.out_channels, batch)

    def empty_text(self) -> Any:
        """Features `[l, text_dim]` of the empty caption, which stands for captions that are dropped."""
        return _encode_text(self.networks.umt5, *self.tokenizer([""]))[0]


@jax.jit
def _encode_text(umt5: UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return text.encode_text(umt5, ids, mask)


def encode(networks: Networks, has_control: bool, batch: Pixels) -> Encoded:
    """Latents, text and image features and control branch of a batch; the loss does not go back through any of it."""
    vae, umt5, clip = networks
    video = to_pixels(batch.video)  # [b, F, H, W, 3]
    latents = vae.encode(video)  # [b, f, h, w, c]
    control = None
    if has_control:
        known = vae.encode(control_video(video, batch.given))
        mask = latent_mask(batch.given, *latents.shape[2:4])
        control = control_branch(mask, known)  # [b, f, h, w, 4 + c]
    image = None
    if clip is not None and batch.clip is not None:
        images = [clip(batch.clip[:, i]) for i in range(batch.clip.shape[1])]  # [b, tokens, image_dim] each
        images = [jnp.where(batch.has_image[:, i, None, None], x, 0) for i, x in enumerate(images)]
        image = jnp.concatenate(images, axis=1)  # [b, l, image_dim]
    return Encoded(
        latents, constrain(text.encode_text(umt5, batch.ids, batch.mask), "batch", None, None), image, control
    )


_encode = jax.jit(encode, static_argnums=1)
