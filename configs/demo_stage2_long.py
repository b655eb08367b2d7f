"""The demo's second stage goes on: from its model, on more clips of the same kind.

wanjax cache --config configs/demo_stage2_long.py --out out/demo/clips2_long
python train_jax.py --config configs/demo_stage2_long.py
"""

from configs.demo import stage
from wanjax.config import ShapesData, TaskMix, TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    clips = ShapesData("different", first_seed=110_000, count=8192)
    return stage(
        "2_long",
        "2",
        clips,
        TaskMix(flf2v=1.0),
        steps=2400,
        cooldown=1000,
        learning_rate=0.02,
        shift=8.0,
        sigma_std=1.5,
    )
