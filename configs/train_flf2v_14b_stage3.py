"""FLF2V-14B, stage 3 of 3: 720p, first and last frame given, the best of those clips, from stage 2.

    wanjax select clips/different.jsonl --area 921600 --min resolution=720 --max clipped=0.2 \
        --top sharpness=0.3 --duplicates --out clips/fine.jsonl
    python train_jax.py --config configs/train_flf2v_14b_stage3.py

75,600 tokens a sample. On 256 chips of v6e (16x16): --mesh fsdp=32,ulysses=8 --accumulate 1.
"""

from configs.train_flf2v import FLF2V, stage
from wanjax.config import DiTConfig, TrainConfig

NETWORK = DiTConfig()
MESHES = {"v5p:4x4x4": "fsdp=16,ulysses=4", "v6e:16x16": "fsdp=32,ulysses=8"}
"""For `wanjax plan`: the network, and good meshes by topology."""


def get_config() -> TrainConfig:
    """The settings."""
    return stage(
        "flf2v_14b",
        3,
        NETWORK,
        "clips/fine.jsonl",
        tasks=FLF2V,
        mesh="fsdp=16,ulysses=4",
        height=720,
        width=1280,
        batch=32,
        accumulate=2,
        steps=5000,
        learning_rate=2e-5,
        warmup=200,
        cooldown=2000,
        shift=5.0,
        remat="attention",
    )
