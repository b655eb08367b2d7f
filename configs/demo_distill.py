"""The demo's student: four steps without guidance, from the packaged model as its teacher.

wanjax cache --config configs/demo_distill.py --out out/demo/clips_distill
python train_jax.py --config configs/demo_distill.py
python benchmarks/demo_quality.py --choose --checkpoint out/demo/distill/model --preset out/demo/distill/preset.json
"""

from wanjax.config import CachedData, DistillationConfig, ShapesData, TaskMix, TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(
        workdir="out/demo/distill",
        checkpoint="wanjax/demo",
        distillation=DistillationConfig(
            sigmas=(1.0, 0.96, 0.8888889, 0.7272727),  # 1, 0.75, 0.5 and 0.25 shifted by 8
            guidance=1.0,
            student_every=3,
            critic_learning_rate=3e-4,
        ),
        data=CachedData("out/demo/clips_distill", of=ShapesData("different", first_seed=300_000, count=4096)),
        tasks=TaskMix(flf2v=1.0, caption_dropout=0.0),
        height=64,
        width=64,
        frames=17,
        batch=16,
        steps=1500,
        learning_rate=1e-4,
        weight_decay=0.0,
        beta1=0.0,
        beta2=0.99,
        warmup=30,
        cooldown=600,
        ema_decay=0.98,
        shift=8.0,
        sigma_std=1.5,
        remat="none",
        dtype="float32",
        save_every=100,
    )
