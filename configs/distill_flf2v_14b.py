"""FLF2V-14B at 720p: a student of four steps without guidance, from the published model as its teacher.

    python train_jax.py --config configs/distill_flf2v_14b.py --checkpoint Wan2.1-FLF2V-14B-720P --workdir DIR
    python sample_jax.py --checkpoint DIR/model --preset DIR/preset.json --first-frame .. --last-frame .. --prompt ..

The clips, with captions, are those of `configs/train_flf2v_14b_stage3.py`; only their end frames and captions are used.
Student, critic, their optimisers and the average are 450 GB over 128 chips of v5p (4x4x8), 4 chips to a sample.
Rates, turns and Adam's first decay are those of DMD2 and of what was distilled from Wan since; guidance is the model's
own. Not yet run at this size; `configs/demo_distill.py` is the same in small.
"""

from wanjax.config import DistillationConfig, DiTConfig, TaskMix, TrainConfig, VideoData

NETWORK = DiTConfig()
MESHES = {"v5p:4x4x8": "fsdp=32,ulysses=4"}
"""For `wanjax report`: what the checkpoint holds, and a good mesh."""


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(
        distillation=DistillationConfig(guidance=5.5, student_every=5, critic_learning_rate=4e-7),
        data=VideoData("clips/fine.jsonl"),
        validation=VideoData("clips/held_out.jsonl"),
        validate_every=500,
        sample_every=1000,
        tasks=TaskMix(flf2v=1.0, caption_dropout=0.0),
        mesh="fsdp=32,ulysses=4",
        height=720,
        width=1280,
        frames=81,
        batch=32,
        steps=5000,
        learning_rate=2e-6,
        warmup=0,
        beta1=0.0,
        weight_decay=0.01,
        ema_decay=0.99,
        shift=5.0,
        remat="attention",
        save_every=250,
    )
