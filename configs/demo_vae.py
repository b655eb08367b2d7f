"""The demo's VAE: Wan-VAE of two million parameters, from scratch on the procedural clips.

    python train_jax.py --config configs/demo_vae.py

The first of the demo's seven trainings; docs/training.md has them all.
"""

from wanjax.config import ShapesData, TrainConfig, VAEConfig


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(
        workdir="out/demo/vae",
        # The statistics are measured when it is exported.
        vae=VAEConfig(
            dim=16,
            z_dim=32,
            dim_mult=(1, 2, 2, 4),
            num_res_blocks=1,
            latents_mean=(0.0,) * 32,
            latents_std=(1.0,) * 32,
        ),
        data=ShapesData("all", first_seed=0, count=1_000_000),
        height=64,
        width=64,
        frames=17,
        snippet=(5, 64, 64),
        kl_weight=3e-5,
        batch=2,
        steps=6000,
        optimizer="muon",
        learning_rate=0.005,  # with 0.02 the loss stands still at twice as much until the rate falls
        beta2=0.99,
        warmup=50,
        cooldown=4000,
        ema_decay=0.995,
        save_every=100,
        dtype="float32",
    )
