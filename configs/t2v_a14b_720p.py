"""Text to video by Wan2.2-T2V-A14B's two experts: 81 frames of 720p.

    python sample_jax.py --config configs/t2v_a14b_720p.py --checkpoint Wan2.2-T2V-A14B --prompt "..."

Values are those of the official command line (Wan2.2 `generate.py --task t2v-A14B`): 40 steps, shift 12, guidance 4 for
high noise and 3 for low, boundary 0.875.
"""

from wanjax.config import DiTConfig, SampleConfig

NETWORK = DiTConfig(in_channels=16, image_dim=None, image_positions=0)
EXPERTS = 2
MESHES = {"v6e:2x4": "data=2,ulysses=4", "v5p:2x2x1": "data=2,ulysses=2", "tpu7x:2x2x1": "data=2,ulysses=4"}
"""For `wanjax plan`: what the checkpoint holds, and good meshes by topology."""


def get_config() -> SampleConfig:
    """The settings."""
    return SampleConfig(area=720 * 1280, frames=81, fps=16, steps=40, guidance=4.0, guidance_low=3.0, shift=12.0)
