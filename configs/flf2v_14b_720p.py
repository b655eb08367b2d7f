"""First and last frame to video, Wan2.1-FLF2V-14B-720P: 81 frames of 720p area, five seconds.

    python sample_jax.py --config configs/flf2v_14b_720p.py --checkpoint Wan2.1-FLF2V-14B-720P \
        --first-frame first.png --last-frame last.png --prompt "..."

Values are those of the official command line (Wan2.1 `generate.py --task flf2v-14B`). In bfloat16 the DiT's weights
take 33 GB and umT5's 11 GB; they are not on the device at the same time. Without --mesh, a mesh like those below is
chosen; `wanjax plan --config configs/flf2v_14b_720p.py` says what a device then holds.
"""

from wanjax.config import DiTConfig, SampleConfig

NETWORK = DiTConfig()
MESHES = {
    "v6e:2x4": "data=2,ulysses=4",
    "v6e:4x4": "data=2,ulysses=8",
    "v5p:2x2x1": "data=2,ulysses=2",
    "tpu7x:2x2x1": "data=2,ulysses=4",
}
"""For `wanjax plan`: what the checkpoint holds, and good meshes by topology."""


def get_config() -> SampleConfig:
    """The settings."""
    return SampleConfig(area=720 * 1280, frames=81, fps=16, steps=50, guidance=5.0, shift=16.0)
