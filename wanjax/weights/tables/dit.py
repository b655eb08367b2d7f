"""The diffusion transformer in the published layouts: names and sizes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from wanjax.config import DiTConfig
from wanjax.errors import InputError
from wanjax.ops.quantized import DTYPES
from wanjax.weights.mapping import (
    CONV3D,
    DIFFUSERS_VERSION,
    Network,
    Shape,
    Table,
    Transform,
    layer,
    norm,
    projection,
    weight,
)
from wanjax.weights.tensors import TensorInfo

LEADING1 = Transform(drop=(0,))  # [1, n, e] -> [n, e]

DIFFUSERS = Table((
    *layer("patch_embedding", "patch_embedding", CONV3D),
    *layer("condition_embedder.text_embedder.linear_1", "text_embedding.fc_in"),
    *layer("condition_embedder.text_embedder.linear_2", "text_embedding.fc_out"),
    *layer("condition_embedder.time_embedder.linear_1", "time_embedding.fc_in"),
    *layer("condition_embedder.time_embedder.linear_2", "time_embedding.fc_out"),
    *layer("condition_embedder.time_proj", "time_projection"),
    *norm("condition_embedder.image_embedder.norm1", "image_embedding.norm_in", bias=True),
    *layer("condition_embedder.image_embedder.ff.net.0.proj", "image_embedding.fc_in"),
    *layer("condition_embedder.image_embedder.ff.net.2", "image_embedding.fc_out"),
    *norm("condition_embedder.image_embedder.norm2", "image_embedding.norm_out", bias=True),
    *weight("condition_embedder.image_embedder.pos_embed", "image_embedding.positions", LEADING1),
    *projection("blocks.{i}.attn1.to_q", "blocks.self_attention.q"),
    *projection("blocks.{i}.attn1.to_k", "blocks.self_attention.k"),
    *projection("blocks.{i}.attn1.to_v", "blocks.self_attention.v"),
    *projection("blocks.{i}.attn1.to_out.0", "blocks.self_attention.o"),
    *norm("blocks.{i}.attn1.norm_q", "blocks.self_attention.norm_q"),
    *norm("blocks.{i}.attn1.norm_k", "blocks.self_attention.norm_k"),
    *norm("blocks.{i}.norm2", "blocks.norm_cross", bias=True),
    *projection("blocks.{i}.attn2.to_q", "blocks.cross_attention.q"),
    *projection("blocks.{i}.attn2.to_k", "blocks.cross_attention.k"),
    *projection("blocks.{i}.attn2.to_v", "blocks.cross_attention.v"),
    *projection("blocks.{i}.attn2.to_out.0", "blocks.cross_attention.o"),
    *norm("blocks.{i}.attn2.norm_q", "blocks.cross_attention.norm_q"),
    *norm("blocks.{i}.attn2.norm_k", "blocks.cross_attention.norm_k"),
    *projection("blocks.{i}.attn2.add_k_proj", "blocks.cross_attention.k_image"),
    *projection("blocks.{i}.attn2.add_v_proj", "blocks.cross_attention.v_image"),
    *norm("blocks.{i}.attn2.norm_added_k", "blocks.cross_attention.norm_k_image"),
    *projection("blocks.{i}.ffn.net.0.proj", "blocks.ffn.fc_in"),
    *projection("blocks.{i}.ffn.net.2", "blocks.ffn.fc_out"),
    *weight("blocks.{i}.scale_shift_table", "blocks.modulation", LEADING1),
    *weight("scale_shift_table", "head.modulation", LEADING1),
    *layer("proj_out", "head.linear"),
))  # fmt: skip

OFFICIAL = Table((
    *layer("patch_embedding", "patch_embedding", CONV3D),
    *layer("text_embedding.0", "text_embedding.fc_in"),
    *layer("text_embedding.2", "text_embedding.fc_out"),
    *layer("time_embedding.0", "time_embedding.fc_in"),
    *layer("time_embedding.2", "time_embedding.fc_out"),
    *layer("time_projection.1", "time_projection"),
    *norm("img_emb.proj.0", "image_embedding.norm_in", bias=True),
    *layer("img_emb.proj.1", "image_embedding.fc_in"),
    *layer("img_emb.proj.3", "image_embedding.fc_out"),
    *norm("img_emb.proj.4", "image_embedding.norm_out", bias=True),
    *weight("img_emb.emb_pos", "image_embedding.positions", LEADING1),
    *projection("blocks.{i}.self_attn.q", "blocks.self_attention.q"),
    *projection("blocks.{i}.self_attn.k", "blocks.self_attention.k"),
    *projection("blocks.{i}.self_attn.v", "blocks.self_attention.v"),
    *projection("blocks.{i}.self_attn.o", "blocks.self_attention.o"),
    *norm("blocks.{i}.self_attn.norm_q", "blocks.self_attention.norm_q"),
    *norm("blocks.{i}.self_attn.norm_k", "blocks.self_attention.norm_k"),
    *norm("blocks.{i}.norm3", "blocks.norm_cross", bias=True),
    *projection("blocks.{i}.cross_attn.q", "blocks.cross_attention.q"),
    *projection("blocks.{i}.cross_attn.k", "blocks.cross_attention.k"),
    *projection("blocks.{i}.cross_attn.v", "blocks.cross_attention.v"),
    *projection("blocks.{i}.cross_attn.o", "blocks.cross_attention.o"),
    *norm("blocks.{i}.cross_attn.norm_q", "blocks.cross_attention.norm_q"),
    *norm("blocks.{i}.cross_attn.norm_k", "blocks.cross_attention.norm_k"),
    *projection("blocks.{i}.cross_attn.k_img", "blocks.cross_attention.k_image"),
    *projection("blocks.{i}.cross_attn.v_img", "blocks.cross_attention.v_image"),
    *norm("blocks.{i}.cross_attn.norm_k_img", "blocks.cross_attention.norm_k_image"),
    *projection("blocks.{i}.ffn.0", "blocks.ffn.fc_in"),
    *projection("blocks.{i}.ffn.2", "blocks.ffn.fc_out"),
    *weight("blocks.{i}.modulation", "blocks.modulation", LEADING1),
    *weight("head.modulation", "head.modulation", LEADING1),
    *layer("head.head", "head.linear"),
))  # fmt: skip


def read_diffusers(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> DiTConfig:
    """Sizes from `transformer/config.json`.

    Raises:
      InputError: the transformer is not that of Wan2.1.
    """
    for name, accepted in (("qk_norm", "rms_norm_across_heads"), ("cross_attn_norm", True)):
        if settings.get(name, accepted) != accepted:
            raise InputError(f"Transformer with {name} = {settings[name]}; only {accepted} (Wan2.1) is accepted.")
    has_image = settings.get("image_dim") is not None
    return DiTConfig(
        dim=settings["num_attention_heads"] * settings["attention_head_dim"],
        ffn_dim=settings["ffn_dim"],
        num_heads=settings["num_attention_heads"],
        num_layers=settings["num_layers"],
        in_channels=settings["in_channels"],
        out_channels=settings["out_channels"],
        patch_size=tuple(settings["patch_size"]),
        freq_dim=settings["freq_dim"],
        text_dim=settings["text_dim"],
        image_dim=settings["image_dim"] if has_image else None,
        image_positions=(settings.get("pos_embed_seq_len") or 0) if has_image else 0,
        eps=settings["eps"],
    )


def read_official(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> DiTConfig:
    """Sizes from `config.json`, and from the shapes what it does not say: text and image widths, positions, patch."""
    has_image = "img_emb.proj.0.weight" in shapes
    _, _, pt, ph, pw = shapes["patch_embedding.weight"]
    config = DiTConfig(
        dim=settings["dim"],
        ffn_dim=settings["ffn_dim"],
        num_heads=settings["num_heads"],
        num_layers=settings["num_layers"],
        in_channels=settings["in_dim"],
        out_channels=settings["out_dim"],
        patch_size=(pt, ph, pw),
        freq_dim=settings["freq_dim"],
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=settings["text_len"],
        image_dim=shapes["img_emb.proj.0.weight"][0] if has_image else None,
        image_positions=shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else 0,
        eps=settings["eps"],
    )
    return with_model_type(config, settings.get("model_type"))


def with_model_type(config: DiTConfig, said: Any) -> DiTConfig:
    """The configuration with what an official `config.json` says of the task, where that is not what the inputs say.

    Raises:
      InputError: it says something that is not Wan's, or that frames are given to a network that none go into.
    """
    accepted = ("t2v",) if config.task == "t2v" else ("t2v", "i2v", "flf2v")
    if said is not None and said not in accepted:
        raise InputError(
            f"Transformer of {config.in_channels} input and {config.out_channels} output channels with model_type = "
            f"{said}; accepted: {', '.join(accepted)}; download its configuration again."
        )
    return config if said in (None, config.task) else dataclasses.replace(config, model_type=said)


def read_quantization(infos: Mapping[str, TensorInfo], num_layers: int) -> dict[str, Any]:
    """What `DiTConfig` says of quantisation, from the tensors: those with a scale beside them are quantised."""
    scales = [info.shape for key, info in infos.items() if key.endswith(".scale")]
    kernels = {key: infos.get(key.removesuffix("scale") + "weight") for key in infos if key.endswith(".scale")}
    layers = {int(found[1]) for key in kernels if (found := re.search(r"\bblocks\.(\d+)\.", key))}
    dtypes = {info.dtype for info in kernels.values() if info}
    formats = [name for name, dtype in DTYPES.items() if dtypes == {np.dtype(dtype)}]
    if not layers or not formats:
        return {"quantize": "off", "quantized_layers": None, "channel_scales": False}
    span = None if (span := (min(layers), max(layers) + 1)) == (0, num_layers) else span
    return {"quantize": formats[0], "quantized_layers": span, "channel_scales": any(scales)}


def write_diffusers(config: DiTConfig) -> dict[str, Any]:
    """`transformer/config.json`."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "added_kv_proj_dim": config.dim if config.image_dim is not None else None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": config.image_positions or None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def write_official(config: DiTConfig) -> dict[str, Any]:
    """`config.json`."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": config.task,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }


def build(config: DiTConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The network with random weights."""
    from wanjax.models.dit import DiT  # here: a checkpoint is converted without any model

    return DiT(config, rngs)


NETWORK = Network(
    build=build,
    tables={"diffusers": DIFFUSERS, "official": OFFICIAL},
    read={"diffusers": read_diffusers, "official": read_official},
    write={"diffusers": write_diffusers, "official": write_official},
    folder="transformer",
    stems={"diffusers": "diffusion_pytorch_model", "official": "diffusion_pytorch_model"},
)
