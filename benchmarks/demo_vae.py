"""What VAEs alone make of drawn clips, frame by frame: the most that a DiT on their latents can come to.

    python benchmarks/demo_vae.py wanjax/demo benchmarks/demo_stages/vae_5_frames [--clips 8]

Clips are whole, of seeds that no training takes. Prints PSNR in dB of each frame, mean over the clips; the last line is
JSON.
"""

from __future__ import annotations

import argparse
import json

import jax
import numpy as np

from wanjax.cli import exit_codes
from wanjax.conditioning.frames import to_pixels
from wanjax.demo.shapes import ProceduralClips
from wanjax.weights import Checkpoint

FIRST_SEED, FRAMES, SIZE = 40_000_000, 17, 64


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+", help="folders of checkpoints with a VAE")
    parser.add_argument("--clips", type=int, default=8, help="how many (8)")
    flags = parser.parse_args()
    found = {path: psnr_by_frame(path, flags.clips) for path in flags.checkpoint}
    for path, values in found.items():
        print(f"{path}: first frame {values[0]:.1f}, others {values[1:].mean():.1f} dB")
        print("  ", *(f"{value:.1f}" for value in values))
    print(json.dumps({path: [round(float(value), 2) for value in values] for path, values in found.items()}))


def psnr_by_frame(path: str, count: int) -> np.ndarray:
    """`[frames]` in dB, mean over the clips."""
    checkpoint = Checkpoint(path)
    vae = checkpoint.load("vae", checkpoint.config("vae"))
    make = jax.jit(lambda vae, video: vae.decode(vae.encode(to_pixels(video))))
    values = []
    clips = ProceduralClips(FIRST_SEED, count, FRAMES, SIZE, "different")
    for clip in (clips[i] for i in range(count)):
        made = np.asarray(make(vae, clip.video[None]))[0]  # [frames, height, width, 3]
        error = (np.round((made + 1) * 127.5) - clip.video) ** 2
        values.append(10 * np.log10(255**2 / error.mean((1, 2, 3))))
    return np.mean(values, axis=0)


if __name__ == "__main__":
    with exit_codes():
        main()
