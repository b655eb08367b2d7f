"""Text to video, Wan2.1-T2V-1.3B: 81 frames of 480 x 832.

    python sample_jax.py --config configs/t2v_1_3b_480p.py --checkpoint Wan2.1-T2V-1.3B --prompt "..."

The official advice for the 1.3B model is guidance 6 and shift 8.
"""

from wanjax.config import DiTConfig, SampleConfig

NETWORK = DiTConfig(
    dim=1536,
    ffn_dim=8960,
    num_heads=12,
    num_layers=30,
    in_channels=16,
    image_dim=None,
    image_positions=0,
)
MESHES = {"v6e:1x1": "data=1", "v6e:2x4": "data=2,ulysses=4"}
"""For `wanjax plan`: what the checkpoint holds, and good meshes by topology."""


def get_config() -> SampleConfig:
    """The settings."""
    return SampleConfig(height=480, width=832, frames=81, fps=16, steps=50, guidance=6.0, shift=8.0)
