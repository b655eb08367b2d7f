"""What `real_lora.py` and `real_full.py` share: the packaged demo model learns from a folder of your clips.

The folder is `clips`: videos with their captions beside them, as docs/data.md says. They are used at 17 frames of about
64 x 64. The demo's text encoder knows the words of `wanjax.demo.shapes.VOCABULARY`; all others are one and the same.
"""

from wanjax.config import CachedData, TaskMix, TrainConfig, VideoData


def tuning(name: str, **settings) -> TrainConfig:
    """A fine-tuning of about an hour on two CPU cores; both kinds read one cache of encoded clips."""
    return TrainConfig(
        workdir=f"out/real/{name}",
        checkpoint="wanjax/demo",
        data=CachedData("out/real/clips", of=VideoData("clips")),
        tasks=TaskMix(flf2v=1.0, caption_dropout=0.1, variants=2),
        height=64,
        width=64,
        frames=17,
        batch=16,
        steps=1000,
        warmup=50,
        cooldown=500,
        weight_decay=0.0,
        beta2=0.99,
        ema_decay=0.99,
        shift=8.0,
        sigma_std=1.5,
        remat="none",
        dtype="float32",
        save_every=100,
        **settings,
    )
