"""Wan2.2-I2V-A14B: adapters of rank 32 for one expert at 480p x 81 frames, on one chip of v6e or one GPU of 48 GB.

    python train_jax.py --config configs/train_a14b_lora.py --checkpoint Wan2.2-I2V-A14B --expert high --workdir DIR

The clips, with captions, lie in the folder `clips`; first frame, last frame, both, keyframes, the beginning of a video
or text alone are given, drawn for each clip. The expert's weights are in int8. `--expert high` learns motion and
composition, `low` details; `both` needs the weights of both, twice the memory. Rank, learning rate, steps and mix are
where people start from, not from the paper, which has no adapters; not yet run.
"""

from wanjax.config import DiTConfig, LoRAConfig, TaskMix, TrainConfig, VideoData

NETWORK = DiTConfig(image_dim=None, image_positions=0)
MESHES = {"v6e:1x1": "data=1", "v6e:2x4": "ulysses=8"}
"""For `wanjax plan`: an expert, and good meshes."""


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(
        expert="high",
        lora=LoRAConfig(rank=32),
        quantize="int8",
        data=VideoData("clips"),
        tasks=TaskMix(t2v=1.0, i2v=3.0, flf2v=3.0, last=1.0, continuation=1.0, interpolation=1.0),
        mesh="data=1",
        height=480,
        width=832,
        frames=81,
        batch=1,
        accumulate=1,
        steps=2000,
        learning_rate=1e-4,
        shift=5.0,
        remat="offload",
    )
