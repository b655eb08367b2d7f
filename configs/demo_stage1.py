"""The demo's first stage: all tasks mixed, on clips of which a third hardly move.

wanjax cache --config configs/demo_stage1.py --out out/demo/clips1
python train_jax.py --config configs/demo_stage1.py
"""

from configs.demo import stage
from wanjax.config import ShapesData, TaskMix, TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    tasks = TaskMix(i2v=1.0, flf2v=4.0, interpolation=2.0, continuation=1.0, max_count=9, image_dropout=0.1)
    clips = ShapesData("all", first_seed=0, count=4096)
    return stage("1", None, clips, tasks, steps=1200, cooldown=400, learning_rate=0.02, shift=3.0)
