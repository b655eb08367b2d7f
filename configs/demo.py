"""What the demo's DiT stages share: `demo_stage1.py`, `demo_stage2.py`, `demo_stage2_long.py`, `demo_stage3.py`."""

from wanjax.config import CachedData, DiTConfig, ShapesData, TaskMix, TrainConfig

DIT = DiTConfig(
    dim=256,
    ffn_dim=768,
    num_heads=4,
    num_layers=6,
    in_channels=68,
    out_channels=32,
    freq_dim=64,
    text_dim=128,
    text_len=80,
    image_dim=128,
    image_positions=34,
)
ENCODERS = "out/demo/towers/model"
"""VAE, text encoder and CLIP tower, from the trainings before."""


def stage(name: str, before: str | None, clips: ShapesData, tasks: TaskMix, **settings) -> TrainConfig:
    """Stage `name`: on its own clips, from the model of the stage `before`."""
    return TrainConfig(
        workdir=f"out/demo/stage{name}",
        encoders=ENCODERS,
        checkpoint=f"out/demo/stage{before}/model" if before else None,
        dit=DIT,
        data=CachedData(f"out/demo/clips{name}", of=clips),
        tasks=tasks,
        height=64,
        width=64,
        frames=17,
        batch=32,
        optimizer="muon",
        weight_decay=0.0,
        beta2=0.99,
        warmup=100,
        ema_decay=0.998,
        remat="none",
        dtype="float32",
        save_every=200,
        **settings,
    )
