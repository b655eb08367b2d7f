"""The demo model and your clips: adapters of rank 16, an hour on two CPU cores.

wanjax cache --config configs/real_lora.py --out out/real/clips
python train_jax.py --config configs/real_lora.py
python sample_jax.py --lora out/real/lora/lora.safetensors --first-frame .. --last-frame .. --prompt ..
"""

from configs.real import tuning
from wanjax.config import LoRAConfig, TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    return tuning("lora", lora=LoRAConfig(rank=16), learning_rate=1e-3)
