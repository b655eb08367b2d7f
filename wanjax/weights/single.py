"""One file that is a whole network: which network, how spelt and of which sizes is told from names and shapes.

    found = SingleFile("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "dit")
    found.layout            # "official": whose names it has
    found.settings          # what the layout's config.json would say

What no shape tells is the same in all published networks: heads of 128 channels, 512 tokens of text, eps 1e-6. A
`config.json` beside the file counts over that, if it is one of the network's width.

Names: github Comfy-Org/ComfyUI `comfy/model_detection.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanjax.config import SampleConfig, UMT5Config, VAEConfig
from wanjax.errors import InputError
from wanjax.untrusted import read_json
from wanjax.weights.layouts import PARTS, TensorShapes, Weights
from wanjax.weights.mapping import LayoutName, NetworkName, count_layers

HEAD_DIM = 128
FLAGS: dict[NetworkName, str] = {
    "dit": "dit",
    "dit_low": "dit_low",
    "vae": "vae",
    "umt5": "text_encoder",
    "clip": "image_encoder",
}
"""The field of `SampleConfig` that names each network's file."""
TOLD_BY: dict[str, tuple[str, LayoutName]] = {
    "head.modulation": ("dit", "official"),
    "condition_embedder.time_proj.weight": ("dit", "diffusers"),
    "decoder.middle.0.residual.0.gamma": ("vae", "official"),
    "decoder.mid_block.resnets.0.norm1.gamma": ("vae", "diffusers"),
    "token_embedding.weight": ("umt5", "official"),
    "encoder.block.0.layer.0.SelfAttention.q.weight": ("umt5", "diffusers"),
    "visual.cls_embedding": ("clip", "official"),
    "embeddings.class_embedding": ("clip", "diffusers"),
}
"""A tensor that every file of a network has: the network, and whose names it goes by."""
OTHERS = {
    "vace_patch_embedding.weight": "VACE",
    "vace_blocks.0.before_proj.weight": "VACE",
    "face_adapter.fuser_blocks.0.linear1_kv.weight": "Animate",
    "control_adapter.conv.weight": "Fun-Control with a camera",
    "ref_conv.weight": "Fun-Control",
    "audio_injector.injector.0.q.weight": "S2V",
}
"""Tensors that tell networks of the family which are not supported."""
SPOKEN = {"dit": "DiT", "vae": "VAE", "umt5": "umT5", "clip": "CLIP"}


def given_files(config: SampleConfig) -> dict[NetworkName, str]:
    """The files of single networks that a configuration names."""
    return {name: path for name, flag in FLAGS.items() if (path := getattr(config, flag)) is not None}


class SingleFile:
    """A network's file, or its index of shards.

    Attributes:
      path: as given.
      layout: whose names its tensors have.
      weights: its tensors.

    Args:
      path: .safetensors, .gguf, .pth, .pt, .bin, or an index of shards.
      network: that it shall be.

    Raises:
      InputError: it cannot be read, or is another network.
    """

    def __init__(self, path: str | Path, network: NetworkName):
        self.path, self.network = Path(path), network
        flag = "--" + FLAGS[network].replace("_", "-")
        if not self.path.is_file():
            raise InputError(f"{flag} {path} is no file; a .safetensors, .gguf or .pth file is accepted; give one")
        self.weights = Weights.of_file(self.path)
        shapes = {key: info.shape for key, info in self.weights.items()}
        for key, name in OTHERS.items():
            if key in shapes:
                raise InputError(f"{flag} {path} is a {name} network; t2v, i2v and flf2v ones are accepted; give one")
        bare = {key.removeprefix("vision_model."): shape for key, shape in shapes.items()}
        found = next((told for key, told in TOLD_BY.items() if key in bare), None)
        kind = "dit" if network == "dit_low" else network
        if found is None or found[0] != kind:
            what = "none of Wan's networks" if found is None else f"a {SPOKEN[found[0]]}"
            raise InputError(f"{flag} {path} is {what}, as its tensors say; give a {SPOKEN[kind]}'s file")
        self.layout: LayoutName = found[1]
        table = PARTS[network].tables[self.layout]
        self.shapes = TensorShapes({table.bare_name(key): shape for key, shape in shapes.items()}, self.path)

    @property
    def settings(self) -> dict[str, Any]:
        """What the layout's `config.json` would say."""
        make = {
            ("dit", "official"): official_dit,
            ("dit", "diffusers"): diffusers_dit,
            ("vae", "diffusers"): diffusers_vae,
            ("umt5", "diffusers"): diffusers_umt5,
            ("clip", "diffusers"): diffusers_clip,
        }.get(("dit" if self.network == "dit_low" else self.network, self.layout))
        return {} if make is None else make(self.shapes, self._beside())

    @property
    def tokenizer(self) -> bytes | None:
        """What a `tokenizer.json` would hold of the SentencePiece model inside, if there is one.

        Raises:
          InputError: it is damaged.
        """
        try:
            return self.weights.tokenizer()
        except ValueError as error:
            raise InputError(f"{self.path}: its tokenizer is {error}; give a tokenizer.json as --tokenizer") from error

    def _beside(self) -> Mapping[str, Any]:
        """`config.json` beside the file, if it can be read."""
        try:
            said = read_json(self.path.parent / "config.json")
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}


def heads(dim: int, beside: Mapping[str, Any], count: str, where: Path) -> int:
    """Attention heads of a DiT of width `dim`.

    Raises:
      InputError: no number of them has 128 channels each.
    """
    said = beside.get(count)
    if isinstance(said, int) and beside.get("dim", dim) == dim == said * beside.get("attention_head_dim", dim // said):
        return said
    if dim % HEAD_DIM:
        raise InputError(f"{where} is {dim} wide, which heads of {HEAD_DIM} do not fill; put its config.json beside it")
    return dim // HEAD_DIM


def official_dit(shapes: TensorShapes, beside: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the official layout."""
    dim = shapes["head.modulation"][-1]
    out, in_dim = shapes["head.head.weight"][0], shapes["patch_embedding.weight"]
    return {
        "dim": dim,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_heads": heads(dim, beside, "num_heads", shapes.where),
        "num_layers": count_layers(shapes, "blocks.{i}.modulation"),
        "in_dim": in_dim[1],
        "out_dim": out // math.prod(in_dim[2:]),
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "text_len": beside.get("text_len", 512),
        "eps": beside.get("eps", 1e-6),
    }


def diffusers_dit(shapes: TensorShapes, beside: Mapping[str, Any]) -> dict[str, Any]:
    """`transformer/config.json`."""
    dim, patch = shapes["scale_shift_table"][-1], shapes["patch_embedding.weight"]
    image = "condition_embedder.image_embedder."
    num_heads = heads(dim, beside, "num_attention_heads", shapes.where)
    positions = shapes.get(f"{image}pos_embed")
    return {
        "num_attention_heads": num_heads,
        "attention_head_dim": dim // num_heads,
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": count_layers(shapes, "blocks.{i}.scale_shift_table"),
        "in_channels": patch[1],
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch[2:]),
        "patch_size": patch[2:],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "image_dim": shapes[f"{image}norm1.weight"][0] if f"{image}norm1.weight" in shapes else None,
        "pos_embed_seq_len": positions[1] if positions else None,
        "eps": beside.get("eps", 1e-6),
    }


def diffusers_vae(shapes: TensorShapes, beside: Mapping[str, Any]) -> dict[str, Any]:
    """`vae/config.json`: the published VAE's, with the width of this one."""
    usual = VAEConfig()
    known = {
        "base_dim": shapes["encoder.conv_in.weight"][0],
        "z_dim": shapes["post_quant_conv.weight"][0],
        "dim_mult": usual.dim_mult,
        "num_res_blocks": usual.num_res_blocks,
        "temperal_downsample": usual.temporal_downsample,
        "latents_mean": usual.latents_mean,
        "latents_std": usual.latents_std,
    }
    return known | {name: beside[name] for name in known if name in beside}


def diffusers_umt5(shapes: TensorShapes, beside: Mapping[str, Any]) -> dict[str, Any]:
    """`text_encoder/config.json`."""
    name, usual = "encoder.block.{i}.layer.0.SelfAttention", UMT5Config()
    first = name.format(i=0)
    buckets, num_heads = shapes[f"{first}.relative_attention_bias.weight"]
    tokens = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    return {
        "vocab_size": shapes[tokens][0],
        "d_model": shapes[tokens][1],
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_heads": num_heads,
        "d_kv": shapes[f"{first}.q.weight"][0] // num_heads,
        "num_layers": count_layers(shapes, f"{name}.q.weight"),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": usual.max_distance,
        "layer_norm_epsilon": usual.eps,
    }


def diffusers_clip(shapes: TensorShapes, beside: Mapping[str, Any]) -> dict[str, Any]:
    """`image_encoder/config.json`; 16 heads, as ViT-H has."""
    dim, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    said = beside.get("num_attention_heads")
    return {
        "hidden_act": "gelu",
        "image_size": patch * math.isqrt(shapes["embeddings.position_embedding.weight"][0] - 1),
        "patch_size": patch,
        "hidden_size": dim,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_attention_heads": said if beside.get("hidden_size") == dim and isinstance(said, int) else 16,
        "num_hidden_layers": count_layers(shapes, "encoder.layers.{i}.layer_norm1.weight"),
        "layer_norm_eps": 1e-5,
    }
