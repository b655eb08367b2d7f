"""Text to video, Wan2.1-T2V-1.3B: 81 frames of 480 x 832.

    python sample_jax.py --config configs/t2v_1_3b_480p.py --checkpoint Wan2.1-T2V-1.3B --prompt "..."

The official advice for the 1.3B model is guidance 6 and shift 8.
"""

from wanjax.config import SampleConfig


def get_config() -> SampleConfig:
    """The settings."""
    return SampleConfig(height=480, width=832, frames=81, fps=16, steps=50, guidance=6.0, shift=8.0)
