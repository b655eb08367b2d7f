"""How well adapters teach the demo model a shape that it was never trained on: hearts, which beat while they move.

    python benchmarks/demo_lora.py [--steps 400] [--clips 1024] [--rank 8] [--targets self_attention] [--workdir DIR]

Encodes procedural clips of hearts, trains adapters on them as `train_jax.py` does, and writes `DIR/lora.safetensors`.
Then the model with and without that file, on held-out clips of hearts: the validation loss, and PSNR in dB of the
frames between when it fills them in, mean over clips. Also the same of the shapes that it knew, and whether the weights
beside the adapters are those of the checkpoint to the bit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sharding.mesh import MeshShape, make_mesh
from sharding.rules import parameter_sharding
from wanjax.cli import exit_codes
from wanjax.conditioning.encoders import Encoders, open_encoders
from wanjax.config import CachedData, LoRAConfig, ShapesData, TaskMix, TrainConfig
from wanjax.data.batch import Batches, shard_batch
from wanjax.demo.shapes import Kind
from wanjax.diffusion import solvers
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.sampling.batch import sample_latents
from wanjax.sampling.decoding import decode_batch
from wanjax.training import checks, loop, metrics
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.data import open_clips, task_samples
from wanjax.training.latent_cache import write_cache
from wanjax.training.objectives.flow_matching import FlowMatching, network_to_train
from wanjax.training.state import init_state
from wanjax.weights import Checkpoint, lora

FIRST_SEED, HELD_OUT_SEED = 400_000, 10_000_000


def make_config(flags: argparse.Namespace) -> TrainConfig:
    """The settings of the training."""
    hearts = ShapesData("heart", FIRST_SEED, flags.clips)
    return TrainConfig(
        workdir=flags.workdir,
        checkpoint=flags.checkpoint,
        lora=LoRAConfig(rank=flags.rank, targets=tuple(flags.targets)),
        data=CachedData(f"{flags.workdir}/clips", of=hearts),
        tasks=TaskMix(flf2v=1.0, caption_dropout=0.0),
        frames=17,
        height=64,
        width=64,
        batch=flags.batch,
        steps=flags.steps,
        learning_rate=flags.learning_rate,
        warmup=min(20, flags.steps // 4),
        cooldown=flags.steps // 2,
        weight_decay=0.0,
        beta2=0.99,
        shift=8.0,
        sigma_std=1.5,
        remat="none",
        dtype="float32",
        save_every=flags.steps,
    )


def train(config: TrainConfig, objective: FlowMatching) -> tuple[Path, int, bool]:
    """The file of adapters, how many numbers they are, and whether all others are still the checkpoint's."""
    assert config.workdir is not None
    assert config.checkpoint is not None
    checkpoints, data = TrainCheckpoints(config.workdir, keep=1), objective.open_data(config)
    batches = Batches(data.source, config.batch, encode=data.encode)
    state, _ = loop.train(config, objective, init_state(config, objective), batches, checkpoints)
    checkpoints.close()
    before = jax.tree.leaves(Checkpoint(config.checkpoint).load("dit", objective.dit, parameter_sharding))
    after = jax.tree.leaves(state.frozen)
    same = len(before) == len(after) and all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    return (
        objective.export(objective.eval_model(state)),
        sum(x.size for x in jax.tree.leaves(state.model)),
        same,
    )


class HeldOut:
    """Clips of a kind that no training saw, encoded."""

    def __init__(self, config: TrainConfig, encoders: Encoders, kind: Kind, clips: int, size: int):
        config = dataclasses.replace(config, data=ShapesData(kind, HELD_OUT_SEED, clips), batch=size)
        samples = task_samples(config, encoders, open_clips(config))
        self.config, self.vae, self.empty = config, encoders.networks["vae"], jnp.asarray(encoders.empty_text())
        self.parts = []
        for start in range(0, clips, size):
            numbers = [start + i for i in range(min(size, clips - start))]
            pixels = [samples.sample(number, 0) for number in numbers]
            self.parts.append((numbers, [x.video for x in pixels], encoders(shard_batch(pixels, len(pixels)))))
        self.losses = jax.jit(FlowMatching(config, encoders.dit).validation_losses)

    def loss(self, dit: DiT) -> float:
        """Mean over clips and noise levels."""
        return float(np.mean([self.losses(dit, batch, numbers[0]).mean() for numbers, _, batch in self.parts]))

    def psnr(self, dit: DiT, steps: int, shift: float) -> float:
        """Of the frames between, mean over clips."""
        schedule, values = solvers.make_schedule("unipc", steps, shift, "official"), []
        for numbers, truth, batch in self.parts:
            noise = metrics.noise_of(numbers, batch.latents.shape[1:])
            latents = sample_latents(dit, batch, self.empty, noise, schedule, 1.0)
            videos = np.asarray(decode_batch(self.vae, latents))
            values += [metrics.psnr(a[1:-1], b[1:-1]) for a, b in zip(videos, truth, strict=True)]
        return float(np.mean(values))


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--clips", type=int, default=1024, help="to learn from")
    parser.add_argument("--held-out", type=int, default=32, help="clips to measure on")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["self_attention"])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--solver-steps", type=int, default=4)
    parser.add_argument("--solver-shift", type=float, default=40.0)
    parser.add_argument("--checkpoint", default="wanjax/demo")
    parser.add_argument("--workdir", help="a folder that is new or empty (default: a temporary one)")
    return parser.parse_args()


def main() -> None:
    flags, start = read_flags(), time.perf_counter()
    flags.workdir = flags.workdir or tempfile.mkdtemp(prefix="demo_lora_")
    if Path(flags.workdir).exists() and any(Path(flags.workdir).iterdir()):
        raise InputError(f"--workdir {flags.workdir} is not empty; a new or empty folder is accepted; give another")
    config = make_config(flags)
    objective = FlowMatching(config, network_to_train(config))
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        checks.check(config, objective, MeshShape())
        encoders, chosen = open_encoders(config, objective.dit), open_clips(config)
        write_cache(
            config, task_samples(config, encoders, chosen), chosen.buckets, encoders, Path(f"{flags.workdir}/clips")
        )
        file, trained, same = train(config, objective)
        checkpoint = Checkpoint(flags.checkpoint)
        plain = checkpoint.load("dit", objective.dit, parameter_sharding)
        adapted = lora.load(checkpoint, objective.dit, lora.parse([str(file)]), False, parameter_sharding)
        share = trained / sum(x.size for x in jax.tree.leaves(plain))
        result = {"steps": flags.steps, "rank": flags.rank, "trained": trained, "share": share, "base_unchanged": same}
        kinds: tuple[Kind, ...] = ("heart", "different")
        for kind in kinds:
            clips = HeldOut(config, encoders, kind, flags.held_out, flags.batch)
            for name, dit in (("before", plain), ("after", adapted)):
                result[f"{kind}_loss_{name}"] = round(clips.loss(dit), 4)
                result[f"{kind}_psnr_{name}_db"] = round(clips.psnr(dit, flags.solver_steps, flags.solver_shift), 2)
    print(f"{trained:,} numbers trained, {share:.2%} of the model's; the others {'unchanged' if same else 'CHANGED'}")
    print(f"{flags.held_out} held-out clips:  loss before, after     PSNR before, after")
    for kind in kinds:
        losses = [result[f"{kind}_loss_{name}"] for name in ("before", "after")]
        ratios = [result[f"{kind}_psnr_{name}_db"] for name in ("before", "after")]
        print(f"{kind:20s} {losses[0]:12.4f} {losses[1]:8.4f} {ratios[0]:12.2f} {ratios[1]:8.2f} dB")
    print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1), "file": str(file)}))


if __name__ == "__main__":
    with exit_codes():
        main()
