"""The golden checkpoints of two experts, and pipelines of them."""

import shutil

from tiny import GOLDEN

import wanjax

CASES = ("flf2v", "t2v")
SMALL = {"prompt": "a kite", "negative_prompt": "", "height": 32, "width": 48, "frames": 5, "shift": 5.0}


def make_folders(root):
    """Both cases as Diffusers checkpoints; what they share is kept once."""
    shared = GOLDEN / "a14b_flf2v"
    shutil.copytree(shared, root / "flf2v")
    shutil.copytree(GOLDEN / "a14b_t2v", root / "t2v")
    for part in ("vae", "text_encoder", "tokenizer"):
        (root / "t2v" / part).symlink_to(shared / part)
    return {case: root / case for case in CASES}


def pipeline(folder, **settings):
    return wanjax.Pipeline.from_pretrained(
        str(folder), **{"dtype": "float32", "compile_cache": "off", "keep": "one"} | settings
    )
