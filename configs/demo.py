"""What the demo's three DiT stages share; `demo_stage1.py` .. `demo_stage3.py` are the configurations to run."""

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


def stage(number: int, clips: ShapesData, tasks: TaskMix, **settings) -> TrainConfig:
    """Stage `number`: on its own clips, from the stage before."""
    return TrainConfig(
        workdir=f"out/demo/stage{number}",
        encoders=ENCODERS,
        checkpoint=f"out/demo/stage{number - 1}/model" if number > 1 else None,
        dit=DIT,
        data=CachedData(f"out/demo/clips{number}", of=clips),
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
