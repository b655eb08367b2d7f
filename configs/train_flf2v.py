"""What the FLF2V stage configurations share; `train_flf2v_14b_stage1.py` .. `train_flf2v_1_3b_stage3.py` are to be run.

From the paper (arXiv 2503.20314): first all tasks mixed, then first and last frame given; clips whose two differ
strongly, then clips of high quality; 480p, then 720p; AdamW with weight decay 1e-3 and learning rate 1e-4; bfloat16.
81 frames are the published model's. The rest was not published and is our choice: the tasks' weights, batches, steps,
warm-up and fall of the learning rate and its lower values in the later stages, the shift of the noise levels (more for
more pixels), dropouts, the moving average. The paper's mixed phase has no image features; here a tenth of it has none.
"""

from wanjax.config import DiTConfig, TaskMix, TrainConfig, VideoData

FLF2V = TaskMix(flf2v=1.0)
MIXED = TaskMix(t2v=1.0, i2v=2.0, flf2v=4.0, continuation=1.0, interpolation=2.0, image_dropout=0.1, variants=4)


def stage(model: str, number: int, dit: DiTConfig, clips: str, **settings) -> TrainConfig:
    """Stage `number`: on the clips of a manifest, from the stage before, which holds the encoders too."""
    settings.setdefault("checkpoint", f"out/{model}/stage{number - 1}/model")
    return TrainConfig(
        workdir=f"out/{model}/stage{number}",
        dit=dit,
        data=VideoData(clips),
        validation=VideoData("clips/held_out.jsonl"),
        validate_every=500,
        sample_every=1000,
        frames=81,
        weight_decay=1e-3,
        ema_decay=0.9995,
        save_every=250,
        **settings,
    )
