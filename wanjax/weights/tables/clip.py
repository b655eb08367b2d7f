"""The CLIP vision tower in the published layouts: names and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flax import nnx

from wanjax.config import CLIPConfig
from wanjax.errors import InputError
from wanjax.weights.mapping import (
    CONV2D,
    LINEAR,
    SAME,
    Network,
    Rule,
    Shape,
    Table,
    Transform,
    count_layers,
    layer,
    norm,
    weight,
)

DIFFUSERS = Table(
    (
        *weight("embeddings.class_embedding", "class_embedding"),
        *weight("embeddings.patch_embedding.weight", "patch_embedding.kernel", CONV2D),
        *weight("embeddings.position_embedding.weight", "position_embedding"),
        *norm("pre_layrnorm", "norm_pre", bias=True),  # the misspelling is the published name
        *norm("encoder.layers.{i}.layer_norm1", "blocks.norm1", bias=True),
        *layer("encoder.layers.{i}.self_attn.q_proj", "blocks.attention.q"),
        *layer("encoder.layers.{i}.self_attn.k_proj", "blocks.attention.k"),
        *layer("encoder.layers.{i}.self_attn.v_proj", "blocks.attention.v"),
        *layer("encoder.layers.{i}.self_attn.out_proj", "blocks.attention.o"),
        *norm("encoder.layers.{i}.layer_norm2", "blocks.norm2", bias=True),
        *layer("encoder.layers.{i}.mlp.fc1", "blocks.mlp.fc_in"),
        *layer("encoder.layers.{i}.mlp.fc2", "blocks.mlp.fc_out"),
        *norm("post_layernorm", "norm_post", bias=True),
    ),
    prefix="vision_model.",  # written by transformers 4
    unused=("embeddings.position_ids", "visual_projection.weight"),
)

_QKV = ("blocks.attention.q", "blocks.attention.k", "blocks.attention.v")

OFFICIAL = Table(
    (
        *weight("visual.cls_embedding", "class_embedding", Transform(drop=(0, 1))),
        *weight("visual.patch_embedding.weight", "patch_embedding.kernel", CONV2D),
        *weight("visual.pos_embedding", "position_embedding", Transform(drop=(0,))),
        *norm("visual.pre_norm", "norm_pre", bias=True),
        *norm("visual.transformer.{i}.norm1", "blocks.norm1", bias=True),
        Rule("visual.transformer.{i}.attn.to_qkv.weight", tuple(f"{path}.kernel" for path in _QKV), LINEAR),
        Rule("visual.transformer.{i}.attn.to_qkv.bias", tuple(f"{path}.bias" for path in _QKV), SAME),
        *layer("visual.transformer.{i}.attn.proj", "blocks.attention.o"),
        *norm("visual.transformer.{i}.norm2", "blocks.norm2", bias=True),
        *layer("visual.transformer.{i}.mlp.0", "blocks.mlp.fc_in"),
        *layer("visual.transformer.{i}.mlp.2", "blocks.mlp.fc_out"),
        *norm("visual.post_norm", "norm_post", bias=True),
    ),
    unused=("visual.head", "textual.*", "log_scale"),
)


def read_diffusers(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> CLIPConfig:
    """Sizes from `image_encoder/config.json`.

    Raises:
      InputError: the activation is not the exact GELU.
    """
    if settings["hidden_act"] != "gelu":
        raise InputError(f"Image encoder with hidden_act = {settings['hidden_act']}; only gelu (ViT-H) is accepted.")
    return CLIPConfig(
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        dim=settings["hidden_size"],
        mlp_dim=settings["intermediate_size"],
        num_heads=settings["num_attention_heads"],
        num_layers=settings["num_hidden_layers"],
        eps=settings["layer_norm_eps"],
    )


def read_official(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> CLIPConfig:
    """Sizes from the shapes; 16 heads, which the official code has as a constant."""
    dim, _, patch_size, _ = shapes["visual.patch_embedding.weight"]
    return CLIPConfig(
        image_size=patch_size * math.isqrt(shapes["visual.pos_embedding"][1] - 1),
        patch_size=patch_size,
        dim=dim,
        mlp_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
        num_heads=16,
        num_layers=count_layers(shapes, "visual.transformer.{i}.norm1.weight"),
    )


def write_diffusers(config: CLIPConfig) -> dict[str, Any]:
    """`image_encoder/config.json`."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": config.dim,
        "image_size": config.image_size,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.eps,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
        "patch_size": config.patch_size,
    }


def build(config: CLIPConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The network with random weights."""
    from wanjax.models.clip import CLIPVision  # here: a checkpoint is converted without any model

    return CLIPVision(config, rngs)


NETWORK = Network(
    build=build,
    tables={"diffusers": DIFFUSERS, "official": OFFICIAL},
    read={"diffusers": read_diffusers, "official": read_official},
    write={"diffusers": write_diffusers},
    folder="image_encoder",
    stems={"diffusers": "model", "official": "models_clip_open-clip-xlm-roberta-large-vit-huge-14"},
)
