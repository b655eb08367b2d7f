"""The demo's VAE, second half: on whole clips of 17 frames, as it has only seen the beginnings of clips so far.

    python train_jax.py --config configs/demo_vae_long.py

What a latent frame remembers of the past reaches further than the 5 frames of the first half, whose steps are
cheaper.
"""

import dataclasses

from configs import demo_vae
from wanjax.config import TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    return dataclasses.replace(
        demo_vae.get_config(),
        workdir="out/demo/vae_long",
        checkpoint="out/demo/vae/model",
        snippet=(17, 64, 64),
        batch=1,
        seed=1,
        steps=1500,
        learning_rate=0.002,
        cooldown=1200,
    )
