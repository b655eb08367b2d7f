"""The demo's second stage: first and last frame given, on clips whose first and last frames differ strongly.

wanjax cache --config configs/demo_stage2.py --out out/demo/clips2
python train_jax.py --config configs/demo_stage2.py
"""

from configs.demo import stage
from wanjax.config import ShapesData, TaskMix, TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    # Below a noise level of 0.9 the noised clip itself shows where everything moves; the caption is learned above.
    clips = ShapesData("different", first_seed=100_000, count=6144)
    return stage(
        "2", "1", clips, TaskMix(flf2v=1.0), steps=1700, cooldown=600, learning_rate=0.02, shift=8.0, sigma_std=1.5
    )
