"""The VAE in the published layouts: names and sizes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from wanjax.config import LATENTS_MEAN, LATENTS_STD, VAEConfig
from wanjax.errors import InputError
from wanjax.weights.mapping import (
    CONV2D,
    CONV3D,
    DIFFUSERS_VERSION,
    POINTWISE2D,
    Network,
    Rule,
    Shape,
    Table,
    Transform,
    layer,
    weight,
)

GAMMA3D = Transform(drop=(1, 2, 3))  # [c, 1, 1, 1] -> [c]
GAMMA2D = Transform(drop=(1, 2))  # [c, 1, 1] -> [c]


def _residual(key: str, path: str, parts: tuple[str, str, str, str, str]) -> tuple[Rule, ...]:
    norm1, conv1, norm2, conv2, shortcut = parts
    return (
        *weight(f"{key}.{norm1}.gamma", f"{path}.norm1.scale", GAMMA3D),
        *layer(f"{key}.{conv1}", f"{path}.conv1", CONV3D),
        *weight(f"{key}.{norm2}.gamma", f"{path}.norm2.scale", GAMMA3D),
        *layer(f"{key}.{conv2}", f"{path}.conv2", CONV3D),
        *layer(f"{key}.{shortcut}", f"{path}.shortcut", CONV3D),
    )


def _attention(key: str, path: str) -> tuple[Rule, ...]:
    return (
        *weight(f"{key}.norm.gamma", f"{path}.norm.scale", GAMMA2D),
        *layer(f"{key}.to_qkv", f"{path}.qkv", POINTWISE2D),
        *layer(f"{key}.proj", f"{path}.proj", POINTWISE2D),
    )


def _resample(key: str, path: str) -> tuple[Rule, ...]:
    return (
        *layer(f"{key}.resample.1", f"{path}.conv", CONV2D),
        *layer(f"{key}.time_conv", f"{path}.time_conv", CONV3D),
    )


_DIFFUSERS_RESIDUAL = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
_OFFICIAL_RESIDUAL = ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut")


def diffusers_names(i: int, config: VAEConfig) -> Mapping[str, str]:
    """`{up}` for the decoder's i-th block: a stage has `num_res_blocks + 1` residual blocks, then an upsampler."""
    stage, block = divmod(i, config.num_res_blocks + 2)
    kind = f"resnets.{block}" if block <= config.num_res_blocks else "upsamplers.0"
    return {"up": f"up_blocks.{stage}.{kind}"}


DIFFUSERS = Table(
    (
        *layer("encoder.conv_in", "encoder.conv_in", CONV3D),
        *_residual("encoder.down_blocks.{i}", "encoder.blocks.{i}", _DIFFUSERS_RESIDUAL),
        *_resample("encoder.down_blocks.{i}", "encoder.blocks.{i}"),
        *_residual("encoder.mid_block.resnets.0", "encoder.mid.first", _DIFFUSERS_RESIDUAL),
        *_attention("encoder.mid_block.attentions.0", "encoder.mid.attention"),
        *_residual("encoder.mid_block.resnets.1", "encoder.mid.second", _DIFFUSERS_RESIDUAL),
        *weight("encoder.norm_out.gamma", "encoder.norm_out.scale", GAMMA3D),
        *layer("encoder.conv_out", "encoder.conv_out", CONV3D),
        *layer("quant_conv", "quant_conv", CONV3D),
        *layer("post_quant_conv", "post_quant_conv", CONV3D),
        *layer("decoder.conv_in", "decoder.conv_in", CONV3D),
        *_residual("decoder.mid_block.resnets.0", "decoder.mid.first", _DIFFUSERS_RESIDUAL),
        *_attention("decoder.mid_block.attentions.0", "decoder.mid.attention"),
        *_residual("decoder.mid_block.resnets.1", "decoder.mid.second", _DIFFUSERS_RESIDUAL),
        *_residual("decoder.{up}", "decoder.blocks.{i}", _DIFFUSERS_RESIDUAL),
        *_resample("decoder.{up}", "decoder.blocks.{i}"),
        *weight("decoder.norm_out.gamma", "decoder.norm_out.scale", GAMMA3D),
        *layer("decoder.conv_out", "decoder.conv_out", CONV3D),
    ),
    names=diffusers_names,
)

OFFICIAL = Table((
    *layer("encoder.conv1", "encoder.conv_in", CONV3D),
    *_residual("encoder.downsamples.{i}", "encoder.blocks.{i}", _OFFICIAL_RESIDUAL),
    *_resample("encoder.downsamples.{i}", "encoder.blocks.{i}"),
    *_residual("encoder.middle.0", "encoder.mid.first", _OFFICIAL_RESIDUAL),
    *_attention("encoder.middle.1", "encoder.mid.attention"),
    *_residual("encoder.middle.2", "encoder.mid.second", _OFFICIAL_RESIDUAL),
    *weight("encoder.head.0.gamma", "encoder.norm_out.scale", GAMMA3D),
    *layer("encoder.head.2", "encoder.conv_out", CONV3D),
    *layer("conv1", "quant_conv", CONV3D),
    *layer("conv2", "post_quant_conv", CONV3D),
    *layer("decoder.conv1", "decoder.conv_in", CONV3D),
    *_residual("decoder.middle.0", "decoder.mid.first", _OFFICIAL_RESIDUAL),
    *_attention("decoder.middle.1", "decoder.mid.attention"),
    *_residual("decoder.middle.2", "decoder.mid.second", _OFFICIAL_RESIDUAL),
    *_residual("decoder.upsamples.{i}", "decoder.blocks.{i}", _OFFICIAL_RESIDUAL),
    *_resample("decoder.upsamples.{i}", "decoder.blocks.{i}"),
    *weight("decoder.head.0.gamma", "decoder.norm_out.scale", GAMMA3D),
    *layer("decoder.head.2", "decoder.conv_out", CONV3D),
))  # fmt: skip


def read_diffusers(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> VAEConfig:
    """Sizes from `vae/config.json`.

    Raises:
      InputError: the VAE is not that of Wan2.1 (Wan2.2's residual one, patchified input, attention outside the middle).
    """
    for name, accepted in (("is_residual", False), ("patch_size", None), ("attn_scales", [])):
        if settings.get(name, accepted) != accepted:
            raise InputError(f"VAE with {name} = {settings[name]}; only {accepted} (Wan2.1) is accepted.")
    if settings.get("decoder_base_dim") not in (None, settings["base_dim"]):
        raise InputError(f"VAE with decoder_base_dim = {settings['decoder_base_dim']}; only base_dim is accepted.")
    return VAEConfig(
        dim=settings["base_dim"],
        z_dim=settings["z_dim"],
        dim_mult=tuple(settings["dim_mult"]),
        num_res_blocks=settings["num_res_blocks"],
        temporal_downsample=tuple(settings["temperal_downsample"]),
        latents_mean=tuple(settings["latents_mean"]),
        latents_std=tuple(settings["latents_std"]),
    )


def read_official(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> VAEConfig:
    """Sizes from the shapes; the latents' mean and standard deviation are the published constants.

    With another number of latent channels than the published one there are none: 0 and 1.
    """
    dim = shapes["encoder.conv1.weight"][0]
    stages: list[list[int]] = [[]]  # widths of the residual blocks of every stage
    temporal = []
    for i in itertools.count():
        name = f"encoder.downsamples.{i}"
        if f"{name}.residual.6.weight" in shapes:
            stages[-1].append(shapes[f"{name}.residual.6.weight"][0])
        elif f"{name}.resample.1.weight" in shapes:
            temporal.append(f"{name}.time_conv.weight" in shapes)
            stages.append([])
        else:
            break
    z_dim = shapes["conv2.weight"][0]
    published = z_dim == len(LATENTS_MEAN)
    return VAEConfig(
        dim=dim,
        z_dim=z_dim,
        dim_mult=tuple(widths[-1] // dim for widths in stages),
        num_res_blocks=len(stages[0]),
        temporal_downsample=tuple(temporal),
        latents_mean=LATENTS_MEAN if published else (0.0,) * z_dim,
        latents_std=LATENTS_STD if published else (1.0,) * z_dim,
    )


def write_diffusers(config: VAEConfig) -> dict[str, Any]:
    """`vae/config.json`."""
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attn_scales": [],
        "base_dim": config.dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "scale_factor_spatial": config.spatial_factor,
        "scale_factor_temporal": config.temporal_factor,
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def build(config: VAEConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The network with random weights."""
    from wanjax.models.vae import VAE  # here: a checkpoint is converted without any model

    return VAE(config, rngs)


NETWORK = Network(
    build=build,
    tables={"diffusers": DIFFUSERS, "official": OFFICIAL},
    read={"diffusers": read_diffusers, "official": read_official},
    write={"diffusers": write_diffusers},
    folder="vae",
    stems={"diffusers": "diffusion_pytorch_model", "official": "Wan2.1_VAE"},
)
