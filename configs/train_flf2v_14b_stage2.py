"""FLF2V-14B, stage 2 of 3: 480p, first and last frame given, clips whose two differ strongly, from stage 1.

wanjax select clips/all.jsonl --max cuts=0 --top difference=0.3 --out clips/different.jsonl
python train_jax.py --config configs/train_flf2v_14b_stage2.py
"""

from configs.train_flf2v import FLF2V, stage
from wanjax.config import DiTConfig, TrainConfig

NETWORK = DiTConfig()
MESHES = {"v5p:4x4x4": "fsdp=16,ulysses=4", "v6e:8x16": "fsdp=32,ulysses=4"}
"""For `wanjax plan`: the network, and good meshes by topology."""


def get_config() -> TrainConfig:
    """The settings."""
    return stage(
        "flf2v_14b",
        2,
        NETWORK,
        "clips/different.jsonl",
        tasks=FLF2V,
        mesh="fsdp=16,ulysses=4",
        height=480,
        width=832,
        batch=64,
        accumulate=2,
        steps=10000,
        learning_rate=5e-5,
        warmup=200,
        cooldown=2000,
        shift=3.0,
        remat="block",
    )
