"""What networks are built from: one frozen dataclass each. The defaults are the published models'."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wanjax.settings import Config, SettingError, setting

if TYPE_CHECKING:  # JAX takes half a second to import, which `--help` does not need
    from jax.typing import DTypeLike

WIDEST = 2**20
"""Bound of what counts channels, layers and tokens of a network: far from any, near enough to be told from damage."""
Attention = Literal["auto", "reference", "flash", "int8fp8"]
"""Which kernel self-attention takes; see `wanjax.ops.attention.kernel`."""


def file_of_dit(group: str) -> Any:
    """The setting of sampling and of training."""
    what = "the DiT in one file (of two experts that for high noise), in place of the checkpoint's"
    return setting(None, what, group, metavar="FILE")


def file_of_low_dit(group: str) -> Any:
    """Likewise of the other expert."""
    return setting(None, "the expert for low noise in one file", group, metavar="FILE")


# Statistics of the 16 latent channels of the published Wan2.1 VAE (Wan2.1 `wan/modules/vae.py`).
# fmt: off
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclasses.dataclass(frozen=True)
class DiTConfig(Config):
    """Wan diffusion transformer. The defaults are FLF2V-14B.

    `image_dim` is the width of the CLIP features (None: no image branch, t2v); `image_positions` the length of the
    learned position embedding over the image tokens of both frames (0: none, i2v). `model_type` is what the network was
    built for, as checkpoints say it; None: told from its inputs (see `task`). `quantize` is the format that the
    blocks' matrices are stored and multiplied in: of all blocks, or of those from `quantized_layers[0]` to before
    `quantized_layers[1]`, with one scale, or, with `channel_scales`, one for each output. `weight_only` rounds no
    tokens: what training does.
    """

    dim: int = setting(5120, "width of a token", least=1, most=WIDEST)
    ffn_dim: int = setting(13824, "width of the feed-forward", least=1, most=WIDEST)
    num_heads: int = setting(40, "of both attentions", least=1, most=WIDEST)
    num_layers: int = setting(40, "blocks", least=1, most=WIDEST)
    in_channels: int = setting(36, "of the input: noise, mask, latents of the given frames", least=1, most=WIDEST)
    out_channels: int = setting(16, "of the velocity, as many as the latents'", least=1, most=WIDEST)
    patch_size: tuple[int, int, int] = setting((1, 2, 2), "latent frames, rows, columns of a token", least=1, most=64)
    freq_dim: int = setting(256, "sines and cosines of the timestep", least=2, most=WIDEST)
    text_dim: int = setting(4096, "width of the text features", least=1, most=WIDEST)
    text_len: int = setting(512, "tokens of a text", least=1, most=2**16)
    image_dim: int | None = setting(1280, "width of the CLIP features; None: no image branch", least=1, most=WIDEST)
    image_positions: int = setting(514, "learned positions of image tokens; 0: none", least=0, most=WIDEST)
    eps: float = setting(1e-6, "of the norms", least=0, most=1)
    attention: Attention = setting("auto", "kernel of self-attention")
    quantize: Literal["off", "fp8", "int8"] = setting("off", "format of the blocks' matrices")
    quantized_layers: tuple[int, int] | None = setting(None, "the first of those blocks, the one behind them", least=0)
    channel_scales: bool = setting(False, "one scale for each output of these matrices instead of one for all")
    weight_only: bool = setting(False, "8 bits in memory alone: products are of tokens as they are, with gradients")
    model_type: Literal["t2v", "i2v", "flf2v"] | None = setting(None, "task; None: told from the inputs")
    dtype: DTypeLike = setting(np.float32, "of activations")
    param_dtype: DTypeLike = setting(np.float32, "of weights")

    def check_together(self) -> None:
        """See `Config.check_together`."""
        if self.freq_dim % 2:
            raise SettingError(f"freq_dim {self.freq_dim}; even numbers are accepted; use {self.freq_dim + 1}")

    @property
    def stacks(self) -> tuple[tuple[int, int, bool], ...]:
        """Runs of blocks of one kind: the first, the one behind the last, and whether they are quantised."""
        first, stop = self.quantized_layers or (0, self.num_layers)
        runs = ((0, first, False), (first, stop, True), (stop, self.num_layers, False))
        return (
            tuple(run for run in runs if run[0] < run[1]) if self.quantize != "off" else ((0, self.num_layers, False),)
        )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.num_heads

    @property
    def task(self) -> Literal["t2v", "i2v", "flf2v"]:
        """What the network was built for.

        Where it is not said: t2v without image condition, flf2v with positions of two frames, else i2v.
        """
        if self.model_type is not None:
            return self.model_type
        if self.in_channels == self.out_channels and self.image_dim is None:
            return "t2v"
        return "flf2v" if self.image_dim is not None and self.image_positions else "i2v"

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the network can be asked for.

        An flf2v network takes a first frame alone too, as it learned in its first stage. An i2v network without an
        image branch (Wan2.2) takes a last frame too, or alone: mask and latents say all that it is told of the frames.
        """
        if self.task == "i2v" and self.image_dim is None:
            return ("i2v", "flf2v", "last")
        return {"t2v": ("t2v",), "i2v": ("i2v",), "flf2v": ("i2v", "flf2v")}[self.task]


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """Wan-VAE: causal 3D convolutional autoencoder, 8x8x4 compression. The defaults are the published one.

    `temporal_downsample[i]` says whether the i-th spatial halving also halves time.
    """

    dim: int = setting(96, "channels at full size", least=1, most=WIDEST)
    z_dim: int = setting(16, "latent channels", least=1, most=WIDEST)
    dim_mult: tuple[int, ...] = setting((1, 2, 4, 4), "channels by size, in `dim`s", least=1, most=1024, empty=False)
    num_res_blocks: int = setting(2, "residual blocks by size", least=0, most=1024)
    temporal_downsample: tuple[bool, ...] = setting((False, True, True), "which halvings halve time", empty=False)
    latents_mean: tuple[float, ...] = setting(LATENTS_MEAN, "of each latent channel", least=-1e6, most=1e6, empty=False)
    latents_std: tuple[float, ...] = setting(LATENTS_STD, "of each latent channel", above=0, most=1e6, empty=False)
    dtype: DTypeLike = setting(np.float32, "of activations")
    param_dtype: DTypeLike = setting(np.float32, "of weights")

    def check_together(self) -> None:
        """See `Config.check_together`."""
        if len(self.dim_mult) != len(self.temporal_downsample) + 1:
            raise SettingError(
                f"dim_mult of {len(self.dim_mult)} sizes with temporal_downsample of {len(self.temporal_downsample)} "
                "halvings; one size more than halvings is accepted; change one"
            )

    @property
    def spatial_factor(self) -> int:
        """Pixels along the side of a latent cell."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames in a latent frame, but for the first; also the number of mask channels."""
        return 2 ** sum(self.temporal_downsample)

    def size_multiple(self, patch_size: tuple[int, int, int]) -> int:
        """What height and width in pixels are multiples of: latent cells that the DiT's patches cover."""
        return self.spatial_factor * math.lcm(*patch_size[1:])


def check_network(config: DiTConfig | VAEConfig | UMT5Config | CLIPConfig) -> None:
    """Whether the numbers of a network fit one another, as they have to where it is built.

    Raises:
      SettingError: a DiT's width does not divide into heads of an even width, for rotary positions; or a VAE has not
        one mean and deviation for each latent channel.
    """
    if isinstance(config, VAEConfig) and not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
        raise SettingError(
            f"z_dim {config.z_dim} with {len(config.latents_mean)} means and {len(config.latents_std)} deviations of "
            "latents; one of each for every channel is accepted; change them"
        )
    if isinstance(config, DiTConfig) and config.dim % (2 * config.num_heads):
        raise SettingError(
            f"dim {config.dim} with num_heads {config.num_heads}; a multiple of {2 * config.num_heads} is accepted; "
            "change one of them"
        )


WAN_VAE = VAEConfig()
"""The published VAE: what geometry is taken from where no checkpoint is at hand yet."""


@dataclasses.dataclass(frozen=True)
class UMT5Config(Config):
    """umT5 encoder. The defaults are umT5-XXL."""

    vocab_size: int = setting(256384, "tokens that it knows", least=1, most=2**24)
    dim: int = setting(4096, "width of a token", least=1, most=WIDEST)
    ffn_dim: int = setting(10240, "width of the feed-forward", least=1, most=WIDEST)
    num_heads: int = setting(64, "of attention", least=1, most=WIDEST)
    head_dim: int = setting(64, "channels of a head", least=1, most=WIDEST)
    num_layers: int = setting(24, "blocks", least=1, most=WIDEST)
    num_buckets: int = setting(32, "distances that have a bias of their own", least=4, most=WIDEST)
    max_distance: int = setting(128, "beyond which all distances are one", least=2, most=WIDEST)
    eps: float = setting(1e-6, "of the norms", least=0, most=1)
    dtype: DTypeLike = setting(np.float32, "of activations")
    param_dtype: DTypeLike = setting(np.float32, "of weights")


@dataclasses.dataclass(frozen=True)
class CLIPConfig(Config):
    """CLIP vision tower. The defaults are ViT-H/14 at 224 pixels."""

    image_size: int = setting(224, "pixels of a side", least=1, most=2**14)
    patch_size: int = setting(14, "pixels of a side of a token", least=1, most=2**14)
    dim: int = setting(1280, "width of a token", least=1, most=WIDEST)
    mlp_dim: int = setting(5120, "width of the feed-forward", least=1, most=WIDEST)
    num_heads: int = setting(16, "of attention", least=1, most=WIDEST)
    num_layers: int = setting(32, "blocks", least=1, most=WIDEST)
    eps: float = setting(1e-5, "of the norms", least=0, most=1)
    dtype: DTypeLike = setting(np.float32, "of activations")
    param_dtype: DTypeLike = setting(np.float32, "of weights")

    def check_together(self) -> None:
        """See `Config.check_together`."""
        if self.image_size < self.patch_size:
            raise SettingError(
                f"image_size {self.image_size} with patch_size {self.patch_size}; a smaller patch is accepted; "
                "change one"
            )

    @property
    def num_tokens(self) -> int:
        """Class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2
