"""The demo model and your clips: all weights of the DiT, an hour on two CPU cores.

wanjax cache --config configs/real_full.py --out out/real/clips
python train_jax.py --config configs/real_full.py
python sample_jax.py --checkpoint out/real/full/model --first-frame .. --last-frame .. --prompt ..
"""

from configs.real import tuning
from wanjax.config import TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    return tuning("full", learning_rate=2e-4)
