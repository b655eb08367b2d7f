"""FLF2V-14B, stage 1 of 3: 480p, the tasks mixed, all clips, from I2V-14B.

    python train_jax.py --config configs/train_flf2v_14b_stage1.py

32,760 tokens a sample. The mesh is for 64 chips of v5p (4x4x4). From I2V only the image position embedding is new. From
T2V-14B, which has no CLIP: --checkpoint Wan2.1-T2V-14B-Diffusers --encoders Wan2.1-I2V-14B-480P-Diffusers.
"""

from configs.train_flf2v import MIXED, stage
from wanjax.config import DiTConfig, TrainConfig

NETWORK = DiTConfig()
MESHES = {"v5p:4x4x4": "fsdp=16,ulysses=4", "v6e:8x16": "fsdp=32,ulysses=4"}
"""For `wanjax plan`: the network, and good meshes by topology."""


def get_config() -> TrainConfig:
    """The settings."""
    return stage(
        "flf2v_14b",
        1,
        NETWORK,
        "clips/all.jsonl",
        checkpoint="Wan2.1-I2V-14B-480P-Diffusers",
        tasks=MIXED,
        mesh="fsdp=16,ulysses=4",
        height=480,
        width=832,
        batch=64,
        accumulate=2,
        steps=20000,
        learning_rate=1e-4,
        warmup=500,
        cooldown=2000,
        shift=3.0,
        remat="block",
    )
