"""A 1.3B FLF2V model, stage 3 of 3: 720p, both end frames given, the best of those clips, from stage 2.

    wanjax select clips/different.jsonl --area 921600 --min resolution=720 --max clipped=0.2 \
        --top sharpness=0.3 --duplicates --out clips/fine.jsonl
    python train_jax.py --config configs/train_flf2v_1_3b_stage3.py
"""

from configs.train_flf2v import FLF2V, stage
from wanjax.config import DiTConfig, TrainConfig

NETWORK = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
MESHES = {"v6e:2x4": "fsdp=2,ulysses=4", "v5p:2x2x1": "ulysses=4"}
"""For `wanjax plan`: the network, and good meshes by topology."""


def get_config() -> TrainConfig:
    """The settings."""
    return stage(
        "flf2v_1_3b",
        3,
        NETWORK,
        "clips/fine.jsonl",
        tasks=FLF2V,
        mesh="fsdp=2,ulysses=4",
        height=720,
        width=1280,
        batch=16,
        accumulate=8,
        steps=5000,
        learning_rate=2e-5,
        warmup=200,
        cooldown=2000,
        shift=5.0,
        remat="block",
    )
