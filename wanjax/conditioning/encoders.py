"""The conditioning encoder, the only one: what umT5, CLIP and the VAE make of captions and given frames for the DiT.

    encoders = Encoders.from_checkpoint(checkpoint, dit, dtype)
    encoded  = encoders(batch)               # training, latent caches, validation: a batch of clips in one program
    encoders.text(ids, mask)                 # sampling: one stage after the other, the VAE a few frames at a time
    encoders.images(pixels)
    encoders.image_condition(frames, given)

Both go through the functions below, so that a network sees in sampling what it saw in training. Encoders run
data-parallel with their weights split over the devices; the VAE splits the pictures too (arXiv 2503.20314, 4.3).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sharding.rules import constrain, replicate
from sharding.xla_options import VAE_OPTIONS
from wanjax.conditioning.frames import condition_video, join_image_condition, latent_mask, to_pixels
from wanjax.conditioning.samples import Encoded, PixelSample
from wanjax.conditioning.text import Tokenizer, encode_text
from wanjax.config import CLIPConfig, DiTConfig, TrainConfig, UMT5Config, VAEConfig
from wanjax.errors import InputError
from wanjax.models.clip import CLIPVision
from wanjax.models.umt5 import UMT5Encoder
from wanjax.models.vae import VAE
from wanjax.models.vae_blocks import Cache
from wanjax.weights import Checkpoint
from wanjax.weights.hub import checkpoint_folder
from wanjax.weights.networks import Networks


def encoder_configs(
    checkpoint: Checkpoint, dit: DiTConfig, dtype: DTypeLike
) -> tuple[VAEConfig, UMT5Config, CLIPConfig | None]:
    """VAE, umT5 and CLIP of a checkpoint; no CLIP for a DiT that takes none of its features.

    Args:
      checkpoint: that has them.
      dit: the network that takes what they make.
      dtype: of umT5 and CLIP. The VAE is float32, as in the official code: it is 1% of the work and shows every error.

    Raises:
      InputError: the checkpoint lacks one, or one makes what the DiT does not take.
    """
    vae = checkpoint.config("vae")
    umt5 = checkpoint.config("umt5", dtype=dtype, param_dtype=dtype)
    clip = None if dit.image_dim is None else checkpoint.config("clip", dtype=dtype, param_dtype=dtype)
    made = {
        "latent channels": (dit.out_channels, vae.z_dim),
        "text features": (dit.text_dim, umt5.dim),
        "image features": (dit.image_dim, clip.dim if clip else None),
        "image tokens": (dit.image_positions, 2 * clip.num_tokens if clip and dit.image_positions else 0),
    }
    if dit.in_channels != dit.out_channels:
        made["input channels"] = (dit.in_channels, 2 * vae.z_dim + vae.temporal_factor)
    for name, (ours, theirs) in made.items():
        if ours != theirs:
            raise InputError(
                f"encoders {checkpoint.path} make {theirs} {name}, the network takes {ours}; "
                "the encoders that it was made for are needed; give another --encoders"
            )
    return vae, umt5, clip


class Encoders:
    """umT5, CLIP and VAE as one encoder of all that the DiT sees beside the noise, on the ambient mesh.

    Args:
      networks: with "vae", "umt5" and, for a network with images, "clip".
      dit: the network that takes the results.
      tokenizer: the checkpoint's.
      run: calls compiled functions: `run(function, *arguments)`.
    """

    def __init__(
        self,
        networks: Networks,
        dit: DiTConfig,
        tokenizer: Tokenizer,
        run: Callable[..., Any] = lambda function, *arguments: function(*arguments),
    ):
        self.networks, self.dit, self.tokenizer, self.run = networks, dit, tokenizer, run
        if "umt5" in networks.configs:
            tokenizer.check(networks.configs["umt5"].vocab_size)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, dit: DiTConfig, dtype: DTypeLike) -> Encoders:
        """The encoders of a checkpoint, which stay on the devices.

        Raises:
          InputError: as `encoder_configs`, `Tokenizer` and `Networks`.
        """
        vae, umt5, clip = encoder_configs(checkpoint, dit, dtype)
        tokenizer = Tokenizer(checkpoint.tokenizer, dit.text_len)
        return cls(Networks(checkpoint, {"vae": vae, "umt5": umt5, "clip": clip}), dit, tokenizer)

    @property
    def clip(self) -> CLIPConfig | None:
        """Configuration of CLIP; None for a network without images."""
        return self.networks.configs.get("clip")

    @property
    def image_count(self) -> int:
        """How many images' features the network takes: 2 (first and last frame), 1 (first), 0."""
        return 0 if self.clip is None else 2 if self.dit.image_positions else 1

    @property
    def has_image_condition(self) -> bool:
        """Whether the network takes an image condition."""
        return self.dit.in_channels != self.dit.out_channels

    def __call__(self, batch: PixelSample) -> Encoded:
        """Encode a batch that is on the mesh, in one program."""
        clip = None if self.clip is None else self.networks["clip"]
        return encode_batch(self.networks["vae"], self.networks["umt5"], clip, self.has_image_condition, batch)

    def empty_text(self) -> jax.Array:
        """Features `[l, text_dim]` of the empty caption, which stands for captions that are dropped."""
        return text_features(self.networks["umt5"], *self.tokenizer([""]))[0]

    def text(self, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        """Text features `[b, l, text_dim]`, whole on every device; umT5 has then done its part.

        Args:
          ids, mask: `[b, l]`, from the tokenizer.
        """
        features = jax.block_until_ready(self.run(text_features, self.networks["umt5"], ids, mask))
        self.networks.release("umt5")
        return features

    def images(self, pixels: np.ndarray) -> jax.Array:
        """CLIP features `[1, l, image_dim]` of the given frames, whole on every device; CLIP has then done its part.

        To a network that takes two, a frame that is not given has features of zero, as it learned in training.

        Args:
          pixels: `[k, s, s, 3]`, see `wanjax.conditioning.images.clip_pixels`.
        """
        features = self.run(image_features, self.networks["clip"], pixels)  # [k, tokens, image_dim]
        features = features.reshape(1, -1, features.shape[-1])  # [1, k tokens, image_dim]
        missing = max(self.dit.image_positions - features.shape[1], 0)
        features = jax.block_until_ready(jnp.pad(features, ((0, 0), (0, missing), (0, 0))))
        self.networks.release("clip")
        return features

    def image_condition(
        self, frames: np.ndarray, given: np.ndarray, size: tuple[int, int], tick: Callable[[], None] = lambda: None
    ) -> jax.Array:
        """The image condition `[1, f, h, w, 4 + c]` of one video, whole on every device. The VAE stays.

        Only a chunk of frames is on the devices at a time.

        Args:
          frames: the given ones, `[k, H, W, 3]` in about [-1, 1].
          given: bool `[F]`, which they are.
          size: H and W.
          tick: called once a latent frame.
        """
        pixels = iter(frames)
        blank = np.zeros((*size, 3), np.float32)
        known = self.latents((next(pixels) if is_given else blank for is_given in given), tick)
        h, w = known.shape[2:4]
        return join_image_condition(latent_mask(given[None], h, w, self.networks.configs["vae"]), known)

    def latents(self, frames: Iterable[np.ndarray], tick: Callable[[], None] = lambda: None) -> jax.Array:
        """Latents `[1, f, h, w, c]` of a video, whole on every device, a chunk of frames at a time. The VAE stays.

        Args:
          frames: 4 n + 1 of `[H, W, 3]`.
          tick: called once a latent frame.
        """
        factor = self.networks.configs["vae"].temporal_factor
        frames, latents, cache = iter(frames), [], None
        while chunk := list(itertools.islice(frames, factor if latents else 1)):
            part, cache = self.run(encode_chunk, self.networks["vae"], np.stack(chunk)[None], cache)
            latents.append(part)
            tick()
        return jnp.concatenate(latents, axis=1)


def open_encoders(config: TrainConfig, dit: DiTConfig) -> Encoders:
    """The encoders of a run, on the ambient mesh.

    Raises:
      InputError: no checkpoint is said to have them; or as `Encoders.from_checkpoint`.
    """
    folder = config.encoders or config.checkpoint
    if folder is None:
        raise InputError("no encoders; a checkpoint with vae, umT5 and CLIP is needed; give --encoders")
    return Encoders.from_checkpoint(Checkpoint(checkpoint_folder(folder)), dit, jnp.dtype(config.dtype))


@functools.partial(jax.jit, static_argnames="has_image_condition")
def encode_batch(
    vae: VAE, umt5: UMT5Encoder, clip: CLIPVision | None, has_image_condition: bool, batch: PixelSample
) -> Encoded:
    """Latents, text and image features and image condition of a batch; the loss does not go back through any of it."""
    video = to_pixels(batch.video)  # [b, F, H, W, 3]
    latents = vae.encode(video)  # [b, f, h, w, c]
    image_condition = None
    if has_image_condition:
        known = vae.encode(condition_video(video, batch.given))
        h, w = latents.shape[2:4]
        image_condition = join_image_condition(latent_mask(batch.given, h, w, vae.config), known)  # [b, f, h, w, 4 + c]
    image = None
    if clip is not None and batch.clip is not None:
        # One image of every clip at a time, for the memory of one.
        images = [clip(batch.clip[:, i]) for i in range(batch.clip.shape[1])]  # [b, tokens, image_dim] each
        images = [jnp.where(batch.has_image[:, i, None, None], x, 0) for i, x in enumerate(images)]
        image = jnp.concatenate(images, axis=1)  # [b, l, image_dim]
    features = encode_text(umt5, batch.ids, batch.mask)
    return Encoded(latents, constrain(features, "batch", None, None), image, image_condition)


@jax.jit
def text_features(umt5: UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """`encode_text`, whole on every device."""
    return replicate(encode_text(umt5, ids, mask))


@jax.jit
def image_features(clip: CLIPVision, pixels: jax.Array) -> jax.Array:
    """CLIP's features of pictures `[k, s, s, 3]`, whole on every device: `[k, tokens, image_dim]`."""
    return replicate(clip(pixels))


@functools.partial(jax.jit, donate_argnames="cache", compiler_options=VAE_OPTIONS)
def encode_chunk(vae: VAE, frames: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """`VAE.encode_chunk`, the latents whole on every device."""
    latents, cache = vae.encode_chunk(frames, cache)
    return replicate(latents), cache
