"""The demo's third stage: as the second, on clips that are drawn with four times the samples.

wanjax cache --config configs/demo_stage3.py --out out/demo/clips3
python train_jax.py --config configs/demo_stage3.py
"""

from configs.demo import stage
from wanjax.config import ShapesData, TaskMix, TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    clips = ShapesData("fine", first_seed=200_000, count=2048)
    return stage(
        "3", "2_long", clips, TaskMix(flf2v=1.0), steps=300, cooldown=200, learning_rate=0.005, shift=8.0, sigma_std=1.5
    )
