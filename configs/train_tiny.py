"""A tiny DiT learns synthetic noise: shows that training runs, on any mesh, and nothing else.

    python train_jax.py --config configs/train_tiny.py

A minute on a CPU. Several devices on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8 and, for example,
--mesh fsdp=2,ring=2,ulysses=2.
"""

from wanjax.config import DiTConfig, TrainConfig


def get_config() -> TrainConfig:
    """The settings."""
    return TrainConfig(
        workdir="out/train_tiny",
        dit=DiTConfig(
            dim=64,
            ffn_dim=96,
            num_heads=8,
            num_layers=2,
            freq_dim=16,
            text_dim=16,
            text_len=8,
            image_dim=16,
            image_positions=8,
        ),
        height=32,
        width=48,
        frames=9,
        batch=2,
        steps=20,
        warmup=5,
        learning_rate=1e-3,
        save_every=10,
        dtype="float32",
    )
