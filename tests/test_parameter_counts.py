"""Full-size networks, abstractly: as many parameters as the published ones.

The constants are those of diffusers' and transformers' models on torch's meta device; `test_live.py::
test_parameter_counts_are_the_references` compares them with those libraries.
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
