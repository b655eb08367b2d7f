"""The umT5 encoder in the published layouts: names and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from wanjax.config import UMT5Config
from wanjax.errors import InputError
from wanjax.weights.mapping import Network, Shape, Table, count_layers, layer, norm, weight

DIFFUSERS = Table(
    (
        *weight("shared.weight", "embedding"),
        *norm("encoder.block.{i}.layer.0.layer_norm", "blocks.norm_attention"),
        *layer("encoder.block.{i}.layer.0.SelfAttention.q", "blocks.attention.q", bias=False),
        *layer("encoder.block.{i}.layer.0.SelfAttention.k", "blocks.attention.k", bias=False),
        *layer("encoder.block.{i}.layer.0.SelfAttention.v", "blocks.attention.v", bias=False),
        *layer("encoder.block.{i}.layer.0.SelfAttention.o", "blocks.attention.o", bias=False),
        *weight(
            "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
            "blocks.attention.relative_bias",
        ),
        *norm("encoder.block.{i}.layer.1.layer_norm", "blocks.norm_ffn"),
        *layer("encoder.block.{i}.layer.1.DenseReluDense.wi_0", "blocks.ffn.gate", bias=False),
        *layer("encoder.block.{i}.layer.1.DenseReluDense.wi_1", "blocks.ffn.up", bias=False),
        *layer("encoder.block.{i}.layer.1.DenseReluDense.wo", "blocks.ffn.down", bias=False),
        *norm("encoder.final_layer_norm", "norm_out"),
    ),
    aliases={"encoder.embed_tokens.weight": "shared.weight"},  # tied; releases hold one, the other, or both
)

OFFICIAL = Table((
    *weight("token_embedding.weight", "embedding"),
    *norm("blocks.{i}.norm1", "blocks.norm_attention"),
    *layer("blocks.{i}.attn.q", "blocks.attention.q", bias=False),
    *layer("blocks.{i}.attn.k", "blocks.attention.k", bias=False),
    *layer("blocks.{i}.attn.v", "blocks.attention.v", bias=False),
    *layer("blocks.{i}.attn.o", "blocks.attention.o", bias=False),
    *weight("blocks.{i}.pos_embedding.embedding.weight", "blocks.attention.relative_bias"),
    *norm("blocks.{i}.norm2", "blocks.norm_ffn"),
    *layer("blocks.{i}.ffn.gate.0", "blocks.ffn.gate", bias=False),
    *layer("blocks.{i}.ffn.fc1", "blocks.ffn.up", bias=False),
    *layer("blocks.{i}.ffn.fc2", "blocks.ffn.down", bias=False),
    *norm("norm", "norm_out"),
))  # fmt: skip


def read_diffusers(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> UMT5Config:
    """Sizes from `text_encoder/config.json`.

    Raises:
      InputError: the encoder is no umT5 with gated tanh-GELU.
    """
    if settings.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
        raise InputError(f"Text encoder with {settings['feed_forward_proj']}; only gated-gelu (umT5) is accepted.")
    return UMT5Config(
        vocab_size=settings["vocab_size"],
        dim=settings["d_model"],
        ffn_dim=settings["d_ff"],
        num_heads=settings["num_heads"],
        head_dim=settings["d_kv"],
        num_layers=settings["num_layers"],
        num_buckets=settings["relative_attention_num_buckets"],
        max_distance=settings["relative_attention_max_distance"],
        eps=settings["layer_norm_epsilon"],
    )


def read_official(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> UMT5Config:
    """Sizes from the shapes; the number of heads from the relative bias."""
    vocab_size, dim = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return UMT5Config(
        vocab_size=vocab_size,
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=num_heads,
        head_dim=shapes["blocks.0.attn.q.weight"][0] // num_heads,
        num_layers=count_layers(shapes, "blocks.{i}.norm1.weight"),
        num_buckets=num_buckets,
    )


def write_diffusers(config: UMT5Config) -> dict[str, Any]:
    """`text_encoder/config.json`."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_ff": config.ffn_dim,
        "d_kv": config.head_dim,
        "d_model": config.dim,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.eps,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "vocab_size": config.vocab_size,
    }


def build(config: UMT5Config, rngs: nnx.Rngs) -> nnx.Module:
    """The network with random weights."""
    from wanjax.models.umt5 import UMT5Encoder  # here: a checkpoint is converted without any model

    return UMT5Encoder(config, rngs)


NETWORK = Network(
    build=build,
    tables={"diffusers": DIFFUSERS, "official": OFFICIAL},
    read={"diffusers": read_diffusers, "official": read_official},
    write={"diffusers": write_diffusers},
    folder="text_encoder",
    stems={"diffusers": "model", "official": "models_t5_umt5-xxl-enc-bf16"},
)
