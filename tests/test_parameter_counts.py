"""Full-size networks, abstractly: as many parameters as the published ones.

The constants are those of diffusers' and transformers' models on torch's meta device; the test marked live compares
them with those libraries.
"""

import functools

import jax
import pytest
from flax import nnx

from wanjax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from wanjax.models.clip import CLIPVision
from wanjax.models.dit import DiT
from wanjax.models.umt5 import UMT5Encoder
from wanjax.models.vae import VAE

NO_IMAGE = {"in_channels": 16, "image_dim": None, "image_positions": 0}
COUNTS = {
    "flf2v-14B": (functools.partial(DiT, DiTConfig()), 16_395_536_704),
    "i2v-14B": (functools.partial(DiT, DiTConfig(image_positions=0)), 16_394_878_784),
    "t2v-14B": (functools.partial(DiT, DiTConfig(**NO_IMAGE)), 14_288_491_584),
    "t2v-1.3B": (
        functools.partial(DiT, DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **NO_IMAGE)),
        1_418_996_800,
    ),
    "VAE": (functools.partial(VAE, VAEConfig()), 126_892_531),
    "umT5-XXL": (functools.partial(UMT5Encoder, UMT5Config()), 5_680_910_336),
    "CLIP ViT-H": (functools.partial(CLIPVision, CLIPConfig()), 630_766_080),
}


def count(build):
    """Parameters of a network that is never allocated."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: build(nnx.Rngs(0)))))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    build, constant = COUNTS[name]
    assert count(build) == constant


def reference_model(name):
    """The published network, without weights."""
    import diffusers
    import torch
    import transformers

    size_14b = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
    image = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
    dit = diffusers.WanTransformer3DModel
    xxl = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
    clip_h = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    with torch.device("meta"):
        return {
            "flf2v-14B": lambda: dit(**size_14b, **image, pos_embed_seq_len=514),
            "i2v-14B": lambda: dit(**size_14b, **image),
            "t2v-14B": lambda: dit(**size_14b, in_channels=16),
            "t2v-1.3B": lambda: dit(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30),
            "VAE": diffusers.AutoencoderKLWan,
            "umT5-XXL": lambda: transformers.UMT5EncoderModel(
                transformers.UMT5Config(vocab_size=256384, feed_forward_proj="gated-gelu", **xxl)
            ),
            "CLIP ViT-H": lambda: transformers.CLIPVisionModel(
                transformers.CLIPVisionConfig(image_size=224, patch_size=14, hidden_act="gelu", **clip_h)
            ),
        }[name]()


@pytest.mark.live
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_references(name):
    build, constant = COUNTS[name]
    reference = sum(parameter.numel() for parameter in reference_model(name).parameters())
    assert count(build) == reference == constant
