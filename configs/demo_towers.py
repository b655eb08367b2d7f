"""The demo's text encoder and CLIP tower, which learn from one another on the procedural clips and their captions.

    python train_jax.py --config configs/demo_towers.py --encoders out/demo/vae_long/model

The third of the demo's seven trainings; docs/training.md has them all. `--encoders` is only copied into the result.
"""

from wanjax.config import CLIPConfig, ShapesData, TowersConfig, TrainConfig, UMT5Config
from wanjax.demo.shapes import VOCABULARY
from wanjax.demo.vocabulary import vocabulary_size


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(
        workdir="out/demo/towers",
        encoders="out/demo/vae_long/model",
        towers=TowersConfig(
            umt5=UMT5Config(
                vocab_size=vocabulary_size(VOCABULARY), dim=128, ffn_dim=320, num_heads=4, head_dim=32, num_layers=3
            ),
            clip=CLIPConfig(image_size=64, patch_size=16, dim=128, mlp_dim=384, num_heads=4, num_layers=4),
            words=VOCABULARY,
            text_len=80,
        ),
        data=ShapesData("different", first_seed=0, count=1_000_000),
        height=64,
        width=64,
        frames=5,
        batch=32,
        steps=2500,
        learning_rate=1e-3,
        beta2=0.99,
        warmup=50,
        cooldown=1700,
        ema_decay=0.99,
        save_every=200,
        dtype="float32",
    )
