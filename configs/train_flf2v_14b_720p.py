"""FLF2V-14B at 720p x 81 frames: what a step costs in time and memory, on synthetic data.

    python train_jax.py --config configs/train_flf2v_14b_720p.py --checkpoint Wan2.1-FLF2V-14B-720P --workdir DIR

75,600 tokens a sample. The mesh is for 64 chips of v5p (4x4x4): 16 samples, each over 4 chips, weights and optimiser
(230 GB) over all of them.
"""

from wanjax.config import DiTConfig, TrainConfig

NETWORK = DiTConfig()
MESHES = {"v5p:4x4x4": "fsdp=16,ulysses=4", "v6e:16x16": "fsdp=32,ulysses=8"}
"""For `wanjax plan`: what the checkpoint holds, and good meshes (one sample per fsdp)."""


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(
        mesh="fsdp=16,ulysses=4", height=720, width=1280, frames=81, batch=16, shift=5.0, remat="attention"
    )
