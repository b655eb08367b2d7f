"""Good files of networks: folders of checkpoints, single files as other programs spell them, adapters."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy

from wanjax.conditioning.text import Tokenizer
from wanjax.config import DiTConfig
from wanjax.weights import Checkpoint
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.mapping import NetworkName
from wanjax.weights.write import write_safetensors, write_tensors

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/diffusers"
OFFICIAL = ROOT / "tests/golden/official"
NAMES: tuple[NetworkName, ...] = ("dit", "vae", "umt5", "clip")
CHECKPOINT_FILES = (
    *("transformer/config.json", "vae/config.json", "text_encoder/config.json", "image_encoder/config.json"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "model_index.json"),
    *("scheduler/scheduler_config.json", "wanjax_extra/extra.json"),
    *("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    *("transformer/diffusion_pytorch_model.safetensors.index.json",),
)
"""Of a checkpoint's folder in the Diffusers layout: those that are damaged, one at a time."""
EXTRA = {"origin": "official", "numbers": {"dit": {"text_len": 512}}, "flow_shift": 5.0, "names": {}, "copies": {}}


class File(NamedTuple):
    """A single file of a network: which, what it is made of, and its name here."""

    network: NetworkName
    source: Path
    name: str


SINGLE_FILES = {
    "dit": File("dit", OFFICIAL / "diffusion_pytorch_model.safetensors", "dit.safetensors"),
    "vae": File("vae", OFFICIAL / "Wan2.1_VAE.safetensors", "vae.safetensors"),
    "umt5": File("umt5", GOLDEN / "text_encoder/model.safetensors", "umt5.safetensors"),
    "clip": File("clip", GOLDEN / "image_encoder/model.safetensors", "clip.safetensors"),
    "fp8": File("dit", OFFICIAL / "diffusion_pytorch_model.safetensors", "fp8.safetensors"),
    "gguf": File("dit", OFFICIAL / "diffusion_pytorch_model.safetensors", "dit.gguf"),
}
if importlib.util.find_spec("torch"):  # which reads them
    SINGLE_FILES["pth"] = File("dit", OFFICIAL / "diffusion_pytorch_model.safetensors", "dit.pth")


def checkpoint(damaged: str) -> Callable[[Path], Path]:
    """Makes a folder in the Diffusers layout; gives the file of it that is to be damaged."""

    def make(folder: Path) -> Path:
        shutil.copytree(GOLDEN, folder / "c", ignore=shutil.ignore_patterns("expected.npz"))
        file = folder / "c" / damaged
        if damaged.endswith("extra.json"):
            file.parent.mkdir()
            file.write_text(json.dumps(EXTRA))
        elif damaged.endswith(".index.json"):
            whole = file.with_name(file.name.removesuffix(".index.json"))
            tensors = safetensors.numpy.load_file(whole)
            whole.unlink()
            infos: Any = {key: _info(x) for key, x in tensors.items()}
            write_tensors(file.parent, whole.stem, infos, tensors.__getitem__, 40_000, lambda *_: None)
        return file

    return make


def read_checkpoint(folder: Path) -> None:
    """All that a command takes from headers, and the tokenizer."""
    checkpoint = Checkpoint(folder / "c")
    _ = checkpoint.flow_shift, checkpoint.boundary
    for name in NAMES:
        checkpoint.check(name, checkpoint.config(name))
    Tokenizer(checkpoint.tokenizer, 8)(["a cat"])


def read_numbers(folder: Path) -> None:
    """A network's numbers too."""
    checkpoint = Checkpoint(folder / "c")
    checkpoint.load("vae", checkpoint.config("vae"))


def single_file(kind: str) -> Callable[[Path], Path]:
    """Makes a single file with its config.json beside it."""

    def make(folder: Path) -> Path:
        file = SINGLE_FILES[kind]
        shutil.copyfile(OFFICIAL / "config.json", folder / "config.json")
        (folder / file.name).write_bytes(_contents(kind))
        return folder / file.name

    return make


def read_single(kind: str) -> Callable[[Path], None]:
    """Reads it: its header, and numbers of some tensors."""

    def read(folder: Path) -> None:
        file = SINGLE_FILES[kind]
        checkpoint = Checkpoint(None, {file.network: folder / file.name})
        checkpoint.check(file.network, checkpoint.config(file.network))
        _ = checkpoint.files[file.network].tokenizer
        weights = checkpoint.weights(file.network)
        with weights.open() as view:
            for key, info in list(weights.items())[::7]:
                assert view(key).shape == info.shape

    return read


@functools.cache
def _contents(kind: str) -> bytes:
    """Of a few blocks, since what is damaged is the header."""
    import tempfile

    file = SINGLE_FILES[kind]
    tensors = safetensors.numpy.load_file(file.source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        if kind == "gguf":
            _write_gguf(path, tensors)
        elif kind == "pth":
            _write_pth(path, tensors)
        else:
            tensors = _scaled(tensors) if kind == "fp8" else tensors
            infos: Any = {key: _info(x) for key, x in tensors.items()}
            write_safetensors(path, infos, tensors.__getitem__, lambda *_: None)
        return path.read_bytes()


def _info(x: np.ndarray) -> Any:
    from wanjax.weights.tensors import TensorInfo

    return TensorInfo(x.shape, x.dtype)


def _scaled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As ComfyUI spells 8 bits: a scale beside each matrix of the blocks, and the format in words."""
    made: dict[str, np.ndarray] = {}
    for key, x in tensors.items():
        is_matrix = key.startswith("blocks.") and key.endswith(".weight") and x.ndim == 2
        made[f"model.diffusion_model.{key}"] = x.astype(ml_dtypes.float8_e4m3fn) if is_matrix else x
        if is_matrix:
            layer = f"model.diffusion_model.{key.removesuffix('.weight')}"
            made[f"{layer}.weight_scale"] = np.ones((), np.float32)
            made[f"{layer}.comfy_quant"] = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    return made


WORDS = ["<pad>", "</s>", "<unk>", *(f"▁word{i}" for i in range(20))]
"""Of a tokenizer inside a GGUF file."""


def _write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    writer, quantised = gguf.GGUFWriter(path, "wan"), gguf.GGMLQuantizationType.Q8_0
    writer.add_tokenizer_model("t5")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(i) for i in range(len(WORDS))])
    writer.add_token_types([3, 3, 2, *[1] * (len(WORDS) - 3)])
    writer.add_precompiled_charsmap(bytes(range(32)))
    for key, x in tensors.items():
        kind = quantised if x.ndim == 2 and x.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        if x.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(x.shape))
        flat = np.ascontiguousarray(x.reshape(len(x), -1) if x.ndim > 4 else x, np.float32)
        writer.add_tensor(key, gguf.quants.quantize(flat, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_pth(path: Path, tensors: dict[str, np.ndarray]) -> None:
    import torch

    torch.save({key: torch.from_numpy(x.copy()) for key, x in tensors.items()}, path)


# ---- adapters


def diffusers_lora(folder: Path) -> Path:
    """As peft writes it, with its settings in the header."""
    shapes = {"A": (2, 64), "B": (64, 2)}
    layers = {f"transformer.blocks.{i}.attn1.to_q.lora_{part}.weight": shapes[part] for i in (0, 1) for part in "AB"}
    arrays: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in layers.items()}
    arrays["transformer.blocks.0.attn1.to_q.alpha"] = np.full((), 2, np.float32)
    settings = {
        "transformer.r": 2,
        "transformer.lora_alpha": 2,
        "transformer.alpha_pattern": {"blocks.1.attn1.to_q": 4},
    }
    safetensors.numpy.save_file(arrays, folder / "l.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    return folder / "l.safetensors"


def kohya_lora(folder: Path) -> Path:
    """As musubi-tuner writes it: underscores for points, an alpha for each layer."""
    arrays: dict[str, Any] = {}
    for layer in ("blocks_0_self_attn_q", "blocks_1_self_attn_v"):
        arrays[f"lora_unet_{layer}.lora_down.weight"] = np.ones((2, 64), np.float16)
        arrays[f"lora_unet_{layer}.lora_up.weight"] = np.ones((64, 2), np.float16)
        arrays[f"lora_unet_{layer}.alpha"] = np.full((), 2, np.float16)
    safetensors.numpy.save_file(arrays, folder / "l.safetensors", {"ss_network_dim": "2"})
    return folder / "l.safetensors"


def read_lora(folder: Path) -> None:
    """Its layers, for a network, and their numbers."""
    file = LoRAFile(folder / "l.safetensors")
    terms = file.terms(dit())
    with file.open() as reader:
        for term in terms:
            term.read(reader)


@functools.cache
def dit() -> DiTConfig:
    """Of the checkpoint."""
    return Checkpoint(GOLDEN).config("dit")
