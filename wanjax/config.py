"""Frozen dataclasses: one per network, one for sampling. They hold sizes and numerics, never a mesh or a path trick.

`dtype` is what activations are computed in, `param_dtype` what the large weights are stored in. Norms, modulation,
RoPE, softmax statistics and solvers are float32 whatever these say.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

# Statistics of the 16 latent channels of the published Wan2.1 VAE (Wan2.1 `wan/modules/vae.py`).
# fmt: off
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Wan2.1 diffusion transformer. The defaults are FLF2V-14B.

    `image_dim` is the width of the CLIP features (None: no image branch, t2v); `image_positions` the length of the
    learned position embedding over the image tokens of both frames (0: none, i2v).
    """

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_channels: int = 36
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = 1280
    image_positions: int = 514
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def task(self) -> Literal["t2v", "i2v", "flf2v"]:
        """What the network was built for, read off its inputs."""
        if self.image_dim is None:
            return "t2v"
        return "flf2v" if self.image_positions else "i2v"


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Wan-VAE: causal 3D convolutional autoencoder, 8x8x4 compression. The defaults are the published one.

    `temporal_downsample[i]` says whether the i-th spatial halving also halves time.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def spatial_factor(self) -> int:
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """umT5 encoder. The defaults are umT5-XXL."""

    vocab_size: int = 256384
    dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP vision tower. The defaults are ViT-H/14 at 224 pixels."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    mlp_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def num_tokens(self) -> int:
        """Class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2
