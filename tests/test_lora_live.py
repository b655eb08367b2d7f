"""Adapters of the packaged model, in diffusers' own loader."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ROOT, assert_close, on, velocity

from wanjax.config import LoRAConfig, LoRATarget
from wanjax.weights import Checkpoint, lora

pytestmark = pytest.mark.live

DEMO = ROOT / "wanjax/demo"


def compare(file, dit):
    """The velocity of a network with its adapters with that of diffusers', which reads them from a file."""
    import diffusers
    import torch
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    rng = np.random.default_rng(0)
    shapes = (1, 68, 5, 8, 8), (1, 512, 128), (2, 17, 128)  # 512: diffusers tells text from image by it
    latents, text, image = (rng.standard_normal(shape, np.float32) for shape in shapes)
    timestep = np.float32([700])
    transformer = diffusers.WanTransformer3DModel.from_pretrained(DEMO / "transformer").eval()

    def run():
        with torch.no_grad():
            return np.moveaxis(
                transformer(*map(torch.from_numpy, (latents, timestep, text, image))).sample.numpy(), 1, -1
            )

    before = run()
    state, metadata = WanLoraLoaderMixin.lora_state_dict(file.parent, weight_name=file.name, return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, transformer, metadata=metadata)
    assert np.abs(run() - before).max() > 0.01
    with on():
        got = velocity(dit, np.moveaxis(latents, 1, -1), timestep, text, image.reshape(1, 34, 128))
    assert_close(got, run())


def test_diffusers_reads_what_the_benchmark_trains(tmp_path):
    small = ["--steps", "20", "--clips", "16", "--held-out", "2", "--batch", "8", "--workdir", str(tmp_path / "run")]
    program = [sys.executable, str(ROOT / "benchmarks/demo_lora.py"), *small]
    result = json.loads(subprocess.run(program, capture_output=True, check=True, cwd=ROOT).stdout.splitlines()[-1])
    assert result["base_unchanged"]
    assert result["rank"] == 8
    assert result["share"] <= 0.02
    checkpoint = Checkpoint(DEMO)
    with on():
        dit = lora.load(checkpoint, checkpoint.config("dit"), lora.parse([result["file"]]), False)
    compare(Path(result["file"]), dit)


def test_diffusers_reads_dora_and_ranks_of_their_own(tmp_path):
    targets = ("self_attention", LoRATarget("cross_attention.q", rank=3), LoRATarget("ffn", rank=2, alpha=1.0))
    rng, checkpoint = np.random.default_rng(1), Checkpoint(DEMO)
    with on():
        dit = checkpoint.load("dit", checkpoint.config("dit"))
        dit = lora.attach(dit, LoRAConfig(rank=4, alpha=8.0, targets=targets, dora=True), nnx.Rngs(0))
        for layer in lora.linear_layers(dit).values():
            if layer.lora is not None:
                b, m = layer.lora.b, layer.lora.magnitude
                layer.lora.b = b.replace(jnp.asarray(rng.normal(0, 0.05, b.shape), jnp.float32))
                layer.lora.magnitude = m.replace(m[...] * jnp.asarray(rng.uniform(0.8, 1.2, m.shape), jnp.float32))
        lora.save(tmp_path / "dora.safetensors", dit)
    compare(tmp_path / "dora.safetensors", dit)
