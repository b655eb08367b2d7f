"""What `benchmarks/same_numbers.py` runs in both checkouts: commands, their configurations, the files they write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wanjax.errors import InputError

SPELLINGS = {
    "calibrate": ("wanjax.sampling.calibrate", "wanjax.calibrate"),
    "convert": ("wanjax.weights.__main__", "wanjax.convert.__main__"),
    "quantize": ("wanjax.weights.quantize", "wanjax.quantize"),
    "cache": ("wanjax.training.latent_cache", "wanjax.data.cache"),
}
"""Where a command may be in checkouts without `wanjax/__main__.py`."""

DIT = """DiTConfig(
    dim=64, ffn_dim=96, num_heads=8, num_layers=2, freq_dim=16, text_dim=16, text_len=8, image_dim=16, image_positions=8
)"""
TOWERS = """TowersConfig(
    UMT5Config(vocab_size=12, dim=16, ffn_dim=24, num_heads=2, head_dim=8, num_layers=2),
    CLIPConfig(image_size=16, patch_size=8, dim=16, mlp_dim=24, num_heads=2, num_layers=2),
    words=("a", "circle", "red", "square", "straight", "turns"), width=8
)"""
VAE = """VAEConfig(
    dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
)"""
TRAIN = "TrainConfig(steps=10, warmup=2, learning_rate=1e-2, save_every=100, frames=5, height=32, width=32, batch=4"
HEARTS = 'ShapesData("heart", first_seed=0, count=6)'
OTHERS = 'ShapesData("different", first_seed=0, count=6)'
TASKS = "TaskMix(i2v=1.0, flf2v=2.0, interpolation=1.0, continuation=1.0, max_count=3, image_dropout=0.3)"
DEMO = f"{TRAIN}, checkpoint='wanjax/demo', tasks={TASKS}"
CONFIGS = {
    "demo": "demo.get_config()",
    "image-to-video": "dataclasses.replace(demo.get_config(), last_frame=None)",
    "train": f"{TRAIN}, dit={DIT}, accumulate=2, ema_decay=0.9, dtype='float32')",
    "vae": f"{TRAIN}, vae={VAE}, data={HEARTS}, snippet=(5, 16, 16), optimizer='muon', ema_decay=0.9, dtype='float32')",
    "towers": f"{TRAIN}, towers={TOWERS}, data={OTHERS}, dtype='float32')",
    "validation": f"{TRAIN}, checkpoint='tests/golden/diffusers', data={HEARTS}, tasks={TASKS}, validation={OTHERS},"
    " validate_every=5, sample_every=5, sample_clips=2, sample_steps=3, cooldown=5)",
    "cache": f"{DEMO}, data={HEARTS})",
    "lora": f"{DEMO}, data=CachedData('{{out}}/cache', of={HEARTS}), lora=LoRAConfig(rank=4, alpha=8.0),"
    " dtype='float32')",
}
"""Configuration files, by name: what `get_config` returns. `{out}` is where a checkout's outputs go."""


class Case(NamedTuple):
    """One command, and what it writes.

    command: a script of the checkout or a key of `SPELLINGS`, then its flags; `{out}` is where outputs go.
    files: patterns of what to compare, below that folder.
    needs: cases whose outputs it reads.
    devices: fake ones.
    """

    command: str
    files: tuple[str, ...]
    needs: tuple[str, ...] = ()
    devices: int = 1


def sampling(name: str, flags: str = "", needs: tuple[str, ...] = (), devices: int = 1) -> Case:
    """A run of the demo model."""
    outputs = f"--save-latents {{out}}/{name}/latents.npy --output {{out}}/{name}/video.npy"
    return Case(f"sample_jax.py {outputs} {flags}", (f"{name}/*.npy",), needs, devices)


def training(name: str, config: str, flags: str = "", needs: tuple[str, ...] = (), devices: int = 1) -> Case:
    """Ten steps of a configuration, and the export."""
    command = f"train_jax.py --config {{out}}/configs/{config}.py --workdir {{out}}/{name} {flags}"
    files = (f"{name}/metrics.jsonl", f"{name}/lora.safetensors", f"{name}/model/**/*")
    return Case(command, files, needs, devices)


CALIBRATE = "calibrate --config {out}/configs/demo.py --steps 8 --guidance 5 --output {out}/calibration.json"
CALIBRATED = "--steps 8 --calibration {out}/calibration.json"
LORA = "--lora {out}/lora/lora.safetensors:4"
INT8 = "quantize --checkpoint wanjax/demo --output {out}/quantized-int8 --format int8 --layers 1:5"
FP8 = "quantize --checkpoint wanjax/demo --output {out}/quantized-fp8 --format fp8 --layout official"
CASES = {
    "demo": sampling("demo"),
    "dpmpp": sampling("dpmpp", "--solver dpmpp"),
    "euler": sampling("euler", "--solver euler"),
    "guidance": sampling("guidance", "--guidance 5"),
    "diffusers": sampling("diffusers", "--conventions diffusers --shift 8"),
    "image-to-video": sampling("image-to-video", "--config {out}/configs/image-to-video.py"),
    "bfloat16": sampling("bfloat16", "--dtype bfloat16"),
    "int8": sampling("int8", "--quantize int8"),
    "fixed": sampling("fixed", "--steps 8 --cache fixed:2"),
    "cfg-cache": sampling("cfg-cache", "--steps 8 --guidance 5 --cfg-cache 2"),
    "fast": sampling("fast", "--steps 8 --guidance 5 --fast"),
    "calibrate": Case(CALIBRATE, ("calibration.json",)),
    "teacache": sampling("teacache", f"{CALIBRATED} --guidance 5 --cache teacache:0.05", ("calibrate",)),
    "magcache": sampling("magcache", f"{CALIBRATED} --cache magcache:0.05", ("calibrate",)),
    "convert": Case("convert wanjax/demo {out}/official --layout official --no-pth", ("official/**/*",)),
    "convert-back": Case("convert {out}/official {out}/back --layout diffusers", ("back/**/*",), ("convert",)),
    "quantize-int8": Case(INT8, ("quantized-int8/**/*",)),
    "quantize-fp8": Case(FP8, ("quantized-fp8/**/*",)),
    "cache": Case("cache --config {out}/configs/cache.py --out {out}/cache --batch 3", ("cache/*",)),
    "train": training("train", "train"),
    "train-bfloat16": training("train-bfloat16", "train", "--dtype bfloat16 --remat none --accumulate 1"),
    "vae": training("vae", "vae"),
    "towers": training("towers", "towers"),
    "validation": training("validation", "validation"),
    "lora": training("lora", "lora", needs=("cache",)),
    "lora-merged": sampling("lora-merged", LORA, ("lora",)),
    "lora-beside": sampling("lora-beside", f"{LORA} --no-lora-merge", ("lora",)),
    "data-ulysses": sampling("data-ulysses", "--guidance 5 --mesh data=2,ulysses=4", devices=8),
    "ring-ulysses": sampling("ring-ulysses", "--mesh ring=4,ulysses=2", devices=8),
    "fsdp-ulysses": sampling("fsdp-ulysses", "--mesh fsdp=4,ulysses=2", devices=8),
    "train-mesh": training("train-mesh", "train", "--mesh fsdp=2,ring=2,ulysses=2", devices=8),
}
"""By name, those that others need before them."""


def choose(names: Iterable[str] | None) -> dict[str, Case]:
    """The cases of these names and those that they need, in order; all for None.

    Raises:
      InputError: there is none of a name.
    """
    if names is None:
        return CASES
    wanted, found = list(names), set()
    while wanted:
        name = wanted.pop()
        if name not in CASES:
            raise InputError(f"--only {name}; there are {', '.join(CASES)}; give some of them")
        found.add(name)
        wanted += CASES[name].needs
    return {name: case for name, case in CASES.items() if name in found}


def spelled(case: Case, checkout: Path, out: Path) -> list[str]:
    """What an interpreter is given to run a case, as the checkout spells it.

    Raises:
      InputError: the checkout has no such command.
    """
    first, *flags = case.command.format(out=out).split()
    if first not in SPELLINGS:
        return [first, *flags]
    if (checkout / "wanjax/__main__.py").is_file():
        return ["-m", "wanjax", first, *flags]
    for module in SPELLINGS[first]:
        if (checkout / module.replace(".", "/")).with_suffix(".py").is_file():
            return ["-m", module.removesuffix(".__main__"), *flags]
    raise InputError(
        f"{checkout} has no command {first}; looked for {', '.join(SPELLINGS[first])}; add its module there"
    )


def write_configs(out: Path) -> None:
    """The files of `CONFIGS`, into `out/configs`."""
    (out / "configs").mkdir(parents=True)
    for name, source in CONFIGS.items():
        imports = "import dataclasses\n\nfrom wanjax import demo\nfrom wanjax.config import *\n"
        text = f"{imports}\n\ndef get_config():\n    return {source.format(out=out)}\n"
        (out / f"configs/{name}.py").write_text(text)
