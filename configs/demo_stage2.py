"""The demo's second stage: first and last frame given, on clips whose first and last frames differ strongly.

python -m wanjax.data.cache --config configs/demo_stage2.py --out out/demo/clips2
python train_jax.py --config configs/demo_stage2.py
"""

from configs.demo import stage
from wanjax.config import ShapesData, TaskMix, TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    clips = ShapesData("different", first_seed=100_000, count=8192)
    return stage(2, clips, TaskMix(flf2v=1.0), steps=2000, cooldown=1000, learning_rate=0.015)
