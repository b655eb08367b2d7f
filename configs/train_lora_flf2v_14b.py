"""FLF2V-14B: adapters of rank 32 at 480p x 81 frames, for a style or a motion that a folder of clips shows.

    python train_jax.py --config configs/train_lora_flf2v_14b.py --checkpoint Wan2.1-FLF2V-14B-720P --workdir DIR

The clips, with captions, lie in the folder `clips`. 32,760 tokens a sample; the mesh is for 4 chips of v5p. Rank,
learning rate and steps are where people start from, not from the paper, which has no adapters; not yet run.
"""

from wanjax.config import DiTConfig, LoRAConfig, TrainConfig, VideoData

NETWORK = DiTConfig()
MESHES = {"v5p:2x2x1": "ulysses=4"}
"""For `wanjax plan`: what the checkpoint holds, and a good mesh."""


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(
        lora=LoRAConfig(rank=32),
        data=VideoData("clips"),
        mesh="ulysses=4",
        height=480,
        width=832,
        frames=81,
        batch=1,
        accumulate=1,
        steps=2000,
        learning_rate=1e-4,
        shift=3.0,
        remat="attention",
    )
