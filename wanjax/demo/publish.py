"""Puts a trained model into the package, the end of `make demo`."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from wanjax.demo import FOLDER, SEED
from wanjax.demo.shapes import ProceduralClips
from wanjax.weights import Checkpoint


def publish(source: Path, target: Path = FOLDER) -> None:
    """Replace the networks in `target` by those of `source`, and its frames and caption by those of the clip `SEED`.

    Raises:
      InputError: the source is no whole checkpoint in the Diffusers layout.
    """
    checkpoint = Checkpoint(source)
    for network in ("dit", "vae", "umt5", "clip"):
        checkpoint.check(network, checkpoint.config(network))
    replace(source, target)


def replace(source: Path, target: Path) -> None:
    """As `publish`, of a source that was checked."""
    for folder in filter(Path.is_dir, source.iterdir()):
        shutil.rmtree(target / folder.name, ignore_errors=True)
        shutil.copytree(folder, target / folder.name)
    shutil.copyfile(source / "model_index.json", target / "model_index.json")
    clip = ProceduralClips(SEED, 1, frames=17, size=64, kind="different")[0]
    for name, frame in (("first", clip.video[0]), ("last", clip.video[-1])):
        Image.fromarray(frame).save(target / f"{name}.png")
    (target / "caption.txt").write_text(clip.caption + "\n")
