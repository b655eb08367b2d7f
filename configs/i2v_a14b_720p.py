"""First, last or both frames to video by Wan2.2-I2V-A14B's two experts: 81 frames of 720p area.

    python sample_jax.py --config configs/i2v_a14b_720p.py --checkpoint Wan2.2-I2V-A14B \\
        --first-frame first.png --last-frame last.png --prompt "..."

Values are those of the official command line (Wan2.2 `generate.py --task i2v-A14B`): 40 steps, shift 5, guidance 3.5,
boundary 0.9. It has no last frame; mask and latents say it to the network, as they say the first.
"""

from wanjax.config import DiTConfig, SampleConfig

NETWORK = DiTConfig(image_dim=None, image_positions=0)
EXPERTS = 2
MESHES = {"v6e:2x4": "data=2,ulysses=4", "v5p:2x2x1": "data=2,ulysses=2", "tpu7x:2x2x1": "data=2,ulysses=4"}
"""For `wanjax plan`: what the checkpoint holds, and good meshes by topology."""


def get_config() -> SampleConfig:
    """The settings."""
    return SampleConfig(area=720 * 1280, frames=81, fps=16, steps=40, guidance=3.5, shift=5.0)
