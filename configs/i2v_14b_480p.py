"""First frame to video, Wan2.1-I2V-14B-480P: 81 frames of 480p area.

    python sample_jax.py --config configs/i2v_14b_480p.py --checkpoint Wan2.1-I2V-14B-480P \
        --first-frame first.png --prompt "..."

Values are those of the official command line (Wan2.1 `generate.py --task i2v-14B`, 40 steps; shift 3 at 480p).
"""

from wanjax.config import DiTConfig, SampleConfig

NETWORK = DiTConfig(image_positions=0)
MESHES = {"v6e:2x4": "data=2,ulysses=4", "v5p:2x2x1": "data=2,ulysses=2"}
"""For `wanjax plan`: what the checkpoint holds, and good meshes by topology."""


def get_config() -> SampleConfig:
    """The settings."""
    return SampleConfig(area=480 * 832, frames=81, fps=16, steps=40, guidance=5.0, shift=3.0)
