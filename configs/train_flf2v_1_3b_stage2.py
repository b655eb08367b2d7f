"""A 1.3B FLF2V model, stage 2 of 3: 480p, both end frames given, clips whose two differ strongly, from stage 1.

wanjax select clips/all.jsonl --max cuts=0 --top difference=0.3 --out clips/different.jsonl
python train_jax.py --config configs/train_flf2v_1_3b_stage2.py
"""

from configs.train_flf2v import FLF2V, stage
from wanjax.config import DiTConfig, TrainConfig

NETWORK = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
MESHES = {"v6e:2x4": "fsdp=4,ulysses=2", "v5p:2x2x1": "fsdp=4"}
"""For `wanjax plan`: the network, and good meshes by topology."""


def get_config() -> TrainConfig:
    """The settings."""
    return stage(
        "flf2v_1_3b",
        2,
        NETWORK,
        "clips/different.jsonl",
        tasks=FLF2V,
        mesh="fsdp=4,ulysses=2",
        height=480,
        width=832,
        batch=32,
        accumulate=8,
        steps=10000,
        learning_rate=5e-5,
        warmup=200,
        cooldown=2000,
        shift=3.0,
        remat="block",
    )
