"""FLF2V-14B at 720p x 81 frames on four chips of v5p (2x2x1): one sample over all of them.

    python train_jax.py --config configs/train_flf2v_14b_720p_4chips.py --checkpoint Wan2.1-FLF2V-14B-720P --workdir DIR

Weights, optimiser and gradients take 61 of a chip's 95 GiB, so each block keeps only its input for the backward pass.
"""

from wanjax.config import DiTConfig, TrainConfig

NETWORK = DiTConfig()
MESHES = {"v5p:2x2x1": "ulysses=4"}
"""For `wanjax plan`: what the checkpoint holds, and the mesh by topology."""


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(mesh="ulysses=4", height=720, width=1280, frames=81, batch=1, shift=5.0, remat="block")
