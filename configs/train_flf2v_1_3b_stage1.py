"""A 1.3B FLF2V model, stage 1 of 3: 480p, the tasks mixed, all clips, from T2V-1.3B.

    python train_jax.py --config configs/train_flf2v_1_3b_stage1.py

Wan2.1 has no FLF2V model of this size: T2V-1.3B gains the image condition and the image branch. It has no CLIP, so the
encoders are those of I2V-14B, whose VAE and umT5 are the same. The mesh is for 8 chips of v6e (2x4).
"""

from configs.train_flf2v import MIXED, stage
from wanjax.config import DiTConfig, TrainConfig

NETWORK = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
MESHES = {"v6e:2x4": "fsdp=4,ulysses=2", "v5p:2x2x1": "fsdp=4"}
"""For `wanjax plan`: the network, and good meshes by topology."""


def get_config() -> TrainConfig:
    """The settings."""
    return stage(
        "flf2v_1_3b",
        1,
        NETWORK,
        "clips/all.jsonl",
        checkpoint="Wan2.1-T2V-1.3B-Diffusers",
        encoders="Wan2.1-I2V-14B-480P-Diffusers",
        tasks=MIXED,
        mesh="fsdp=4,ulysses=2",
        height=480,
        width=832,
        batch=32,
        accumulate=8,
        steps=20000,
        learning_rate=1e-4,
        warmup=500,
        cooldown=2000,
        shift=3.0,
        remat="block",
    )
