"""Our networks against diffusers' on this machine's CPU: the same random weights, in turn, medians of the runs.

    make bench-diffusers            # = python benchmarks/against_diffusers.py, with the golden extra installed

DiT: width 1536, 12 heads, 4 layers of the 1.3B model, float32, one forward from latents to velocity. As the weights'
projections of the text do not change between steps, ours makes them once a video; both figures are given. VAE: the
published configuration, 17 frames of 128x128, float32. Outputs are compared, so that the same work is timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from wanjax.config import VAEConfig
from wanjax.models.vae import VAE
from wanjax.weights import Checkpoint

SECTIONS = ("dit_2048", "dit_4096", "vae_encode", "vae_decode", "vae_decode_memory")


def main() -> None:
    """Prints a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError:
        print("error: diffusers or torch is missing; both are needed; pip install '.[golden]'", file=sys.stderr)
        sys.exit(2)
    threads = len(os.sched_getaffinity(0))  # as many as XLA takes
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {"threads": threads, "repeats": arguments.repeats}
    print(f"{'':28s}{'ours':>10s}{'diffusers':>12s}{'ratio':>8s}{'difference':>12s}")
    for tokens in (2048, 4096):
        if f"dit_{tokens}" in arguments.only:
            figures |= dit(tokens, arguments.repeats)
    if {"vae_encode", "vae_decode"} & set(arguments.only):
        figures |= vae(arguments.only, arguments.repeats)
    if "vae_decode_memory" in arguments.only:
        figures |= decode_memory()
    print(json.dumps(figures))


def load(reference: Any, folder: str, network: Any) -> Any:
    """Our network with the weights of a diffusers one."""
    with tempfile.TemporaryDirectory() as path:
        reference.save_pretrained(Path(path) / folder)
        checkpoint = Checkpoint(path)
        return checkpoint.load(network, checkpoint.config(network))


def dit(tokens: int, repeats: int) -> dict[str, Any]:
    import diffusers
    import torch

    torch.manual_seed(0)
    reference = diffusers.WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=4, in_channels=16, out_channels=16
    ).eval()
    torch.nn.init.normal_(reference.proj_out.weight, std=0.02)  # diffusers starts it at zero: nothing to compare
    ours = load(reference, "transformer", "dit")
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, tokens // 1024, 64, 64, 16), np.float32)
    text, timestep = rng.standard_normal((1, 512, 4096), np.float32), np.array([500.0], np.float32)
    tensors = [torch.from_numpy(x) for x in (np.moveaxis(latents, -1, 1).copy(), timestep, text)]

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            return np.moveaxis(reference(*tensors).sample.numpy(), 1, -1)

    project = jax.jit(lambda m, text: m.context(text))
    forward = jax.jit(lambda m, x, t, context: m(x, t, context))
    context = jax.block_until_ready(project(ours, text))
    name = f"dit_{tokens}"
    figures = compare(name, {"": lambda: forward(ours, latents, timestep, context)}, theirs, repeats)
    whole = {"_with_text": lambda: forward(ours, latents, timestep, project(ours, text))}
    return figures | compare(name, whole, theirs, repeats)


def vae(only: tuple[str, ...], repeats: int) -> dict[str, Any]:
    import diffusers
    import torch

    torch.manual_seed(0)
    reference = diffusers.AutoencoderKLWan().eval()
    ours = load(reference, "vae", "vae")
    mean, std = (np.asarray(x, np.float32) for x in (ours.config.latents_mean, ours.config.latents_std))
    rng = np.random.default_rng(0)
    video = np.tanh(rng.standard_normal((1, 17, 128, 128, 3), np.float32))
    latents = rng.standard_normal((1, 5, 16, 16, 16), np.float32)
    to_torch = lambda x: torch.from_numpy(np.moveaxis(x, -1, 1).copy())  # noqa: E731
    pixels, raw = to_torch(video), to_torch(latents * std + mean)
    encode, decode = jax.jit(lambda m, x: m.encode(x)), jax.jit(lambda m, x: m.decode(x))

    def encode_theirs() -> np.ndarray:
        with torch.inference_mode():
            encoded: Any = reference.encode(pixels)
            return (np.moveaxis(encoded.latent_dist.mode().numpy(), 1, -1) - mean) / std

    def decode_theirs() -> np.ndarray:
        with torch.inference_mode():
            decoded: Any = reference.decode(raw)
            return np.moveaxis(decoded.sample.numpy(), 1, -1)

    figures: dict[str, Any] = {}
    if "vae_encode" in only:
        figures |= compare("vae_encode", {"": lambda: encode(ours, video)}, encode_theirs, repeats)
    if "vae_decode" in only:
        figures |= compare("vae_decode", {"": lambda: decode(ours, latents)}, decode_theirs, repeats)
    return figures


def compare(
    name: str, ours: dict[str, Callable[[], Any]], theirs: Callable[[], np.ndarray], repeats: int
) -> dict[str, Any]:
    """Runs all of them in turn, after a warm-up that compiles and compares; prints a row for each of ours."""
    reference = theirs()
    difference = max(float(np.abs(np.asarray(run()) - reference).max()) for run in ours.values())
    difference /= max(1.0, float(np.abs(reference).max()))
    times: dict[str, list[float]] = {suffix: [] for suffix in ours} | {"theirs": []}
    for _ in range(repeats):
        for suffix, run in {**ours, "theirs": theirs}.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[suffix].append(time.perf_counter() - start)
    median = {suffix: statistics.median(runs) for suffix, runs in times.items()}
    figures = {}
    for suffix in ours:
        ratio = median[suffix] / median["theirs"]
        print(f"{name + suffix:28s}{median[suffix]:9.3f}s{median['theirs']:11.3f}s{ratio:8.2f}{difference:12.1e}")
        figures |= {
            f"{name}{suffix}_s": round(median[suffix], 4),
            f"{name}{suffix}_diffusers_s": round(median["theirs"], 4),
            f"{name}{suffix}_ratio": round(ratio, 3),
            f"{name}{suffix}_difference": difference,
        }
    return figures


def decode_memory() -> dict[str, Any]:
    """Working memory of decoding 81 frames against 17, input and output apart: planned by XLA, and really taken."""
    planned, grown = {}, {}
    for frames in (17, 81):  # each in its own process, whose heap holds nothing of the other's
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            planned[frames], grown[frames] = pool.apply(decode_once, (frames,))
    print(
        f"VAE decode, working memory of 17 and 81 frames: planned {planned[17]:.0f} and {planned[81]:.0f} MiB, ", end=""
    )
    print(f"taken {grown[17]:.0f} and {grown[81]:.0f} MiB")
    return {
        "vae_decode_memory_mib": {str(k): round(v, 1) for k, v in planned.items()},
        "vae_decode_memory_ratio": round(planned[81] / planned[17], 3),
        "vae_decode_grown_mib": {str(k): round(v, 1) for k, v in grown.items()},
        "vae_decode_grown_ratio": round(grown[81] / grown[17], 3),
    }


def decode_once(frames: int) -> tuple[float, float]:
    """In a process of its own: MiB that XLA planned beside input and output, and that the process grew by."""
    vae = jax.jit(lambda: VAE(VAEConfig(), nnx.Rngs(0)))()
    latents = jax.random.normal(jax.random.key(0), (1, (frames - 1) // 4 + 1, 16, 16, 16))
    compiled = jax.jit(lambda m, x: m.decode(x)).lower(vae, latents).compile()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (Linux)
    video = jax.block_until_ready(compiled(vae, latents))
    grown = resident("VmHWM") - before - video.nbytes / 2**20
    planned: Any = compiled.memory_analysis()
    return planned.temp_size_in_bytes / 2**20, grown


def resident(field: str) -> float:
    """A memory figure of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    main()
