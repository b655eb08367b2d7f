"""What is read: a good input of each kind, and how commands read it.

A new reader of files from outside belongs into `READERS`.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import PIL.Image
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization

from wanjax import media
from wanjax.commands.calibrate import read_prompts
from wanjax.conditioning.images import read_image
from wanjax.config import SampleConfig, TrainConfig
from wanjax.data.datasets import read_datasets
from wanjax.data.decode import decode, probe
from wanjax.data.listing import list_clips, read_manifest
from wanjax.data.manifest import Row, write_manifest
from wanjax.data.videos import read_facts
from wanjax.sampling import calibration, presets
from wanjax.selection.score_log import ScoreLog
from wanjax.training import latent_cache
from wanjax.training.log import Log
from wanjax.training.whole import damage, write_checksums

from . import lists, networks

Make = Callable[[Path], Path]
"""Writes a good input into a folder, and gives the file to damage."""
Read = Callable[[Path], Any]
"""Reads it as commands do."""


class Reader(NamedTuple):
    """A kind of input."""

    make: Make
    read: Read


def _picture(form: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        rng = np.random.default_rng(0)
        PIL.Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(folder / "p.png", format=form)
        return folder / "p.png"

    return make


def _array(folder: Path) -> Path:
    np.save(folder / "n.npy", np.zeros((1, 16, 2, 4, 6), np.float32))
    return folder / "n.npy"


def _text(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def _calibration(folder: Path) -> Path:
    steps = 4
    lengths = {"magnitude": steps, **dict.fromkeys(("input_change", "residual_change", "difference_change"), steps - 1)}
    numbers: dict[str, Any] = {name: tuple(0.1 * i for i in range(length)) for name, length in lengths.items()}
    calibration.Calibration(
        weights="0", task="flf2v", shift=16.0, solver="unipc", conventions="official", steps=steps, guidance=5.0,
        frames=9, height=48, width=64, prompts=1, sigmas=(1.0, 0.9, 0.5, 0.1), polynomial=(1.0, 0.0),
        thresholds={"teacache": 0.1}, **numbers,
    ).write(str(folder / "c.json"))  # fmt: skip
    return folder / "c.json"


def _video(suffix: str) -> Make:
    def make(folder: Path) -> Path:
        path = folder / f"v.{suffix}"
        path.write_bytes(_encoded(suffix))
        return path

    return make


@functools.cache
def _encoded(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"v.{suffix}"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(CONTAINERS[suffix], rate=16)
            stream.width, stream.height = 48, 32
            stream.pix_fmt = "yuvj420p" if CONTAINERS[suffix] == "mjpeg" else "yuv420p"
            for frame in np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        return path.read_bytes()


def _read_video(suffix: str) -> Read:
    def read(folder: Path) -> None:
        path = folder / f"v.{suffix}"
        height, width, seconds = probe(path)
        if max(height, width) <= 4096 and seconds < 100:
            decode(path, [0.0, 0.1], 16, 16)

    return read


def _parquet(folder: Path) -> Path:
    rows = [Row(folder / x["path"], x["path"], x["caption"], 0.0, None, {"score": 1.0}) for x in ROWS]
    write_manifest(folder / "m.parquet", rows)
    return folder / "m.parquet"


CACHE_FILES = ("index.json", "empty_text.msgpack", "clips-000000.arrayrecord")


def _cache(damaged: str) -> Make:
    def make(folder: Path) -> Path:
        for name, content in _cached().items():
            (folder / name).write_bytes(content)
        return folder / damaged

    return make


@functools.cache
def _cached() -> dict[str, bytes]:
    """The files of a latent cache of random numbers."""
    rng, dit = np.random.default_rng(0), networks.dit()

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def record(i: int) -> bytes:
        arrays = {
            "latents": normal(2, 4, 6, dit.out_channels), "text": normal(3, dit.text_dim), "given": np.arange(5) == 0,
            "known": normal(2, 4, 6, dit.out_channels),
        }  # fmt: skip
        if dit.image_dim:
            arrays["image"] = normal(dit.image_positions or 4, dit.image_dim)
        return serialization.msgpack_serialize({"name": str(i), **arrays})

    with tempfile.TemporaryDirectory() as folder:
        writer = ArrayRecordWriter(str(Path(folder) / CACHE_FILES[2]), "group_size:1")
        for i in range(4 * CACHED.tasks.variants):
            writer.write(record(i))
        writer.close()
        index = latent_cache.cache_settings(CACHED) | {
            "of": "",
            "captions": None,
            "buckets": [{"shape": [5, 32, 48], "clips": [0, 1, 2, 3], "repeats": [1, 2, 1, 1]}],
        }
        text = serialization.msgpack_serialize({"text": normal(2, dit.text_dim)})
        records = (Path(folder) / CACHE_FILES[2]).read_bytes()
    return {
        CACHE_FILES[0]: json.dumps(index | {"files": [CACHE_FILES[2]]}).encode(),
        CACHE_FILES[1]: text,
        CACHE_FILES[2]: records,
    }


CACHED = TrainConfig(workdir="unused", frames=5, height=32, width=48, batch=1)


def _read_cache(folder: Path) -> None:
    samples = latent_cache.CachedSamples(str(folder), CACHED, networks.dit())
    for index in range(2):
        _ = samples[index]


def _read_rows(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for row in read_manifest(folder / name):
            read_facts(row)

    return read


def _read_prompts(folder: Path) -> None:
    for settings in read_prompts(str(folder / "p.jsonl")):
        SampleConfig(**settings)


def _state(folder: Path) -> Path:
    (folder / "3" / "state").mkdir(parents=True)
    (folder / "3/state/numbers").write_bytes(bytes(range(256)))
    (folder / "3/position").write_text("30")
    write_checksums(folder / "3")
    return folder / "3/checksums.json"


def _read_log(folder: Path) -> None:
    with Log(folder, 2) as log:
        log.write(3, {"loss": 1.0})


ROW = {"caption": "x", "height": 64, "width": 64, "seconds": 2.0, "start": 0.5, "end": 1.5, "score": 1.0}
ROWS = [{"path": path, **ROW} for path in ("a.mp4", "b.mp4")]
JSONL = "\n".join(json.dumps(row) for row in ROWS) + "\n"
CSV = "path,caption,start,end,score\na.mp4,x,0.5,1.5,2\nb.mp4,y,,,\n"
PROMPTS = '{"prompt": "x", "seed": 1, "first_frame": "a.png", "negative_prompt": "y"}\na cat\n'
SCORES = '{"name": "a", "way": "w", "file": [1, 2], "sharpness": 1.0}\n' * 2
PRESET = '{"about": "x", "solver": "euler", "steps": 4, "sigmas": [1, 0.9, 0.5], "guidance": [3, 1, 1], "shift": 5}'
METRICS = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'


PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
CONTAINERS = {
    "mp4": "libx264",
    "mkv": "libx264",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "ts": "mpeg2video",
    "mov": "mjpeg",
}

READERS: dict[str, Reader] = {
    **{form.lower(): Reader(_picture(form), lambda folder: read_image(folder / "p.png")) for form in PICTURES},
    "noise": Reader(_array, lambda folder: media.load_noise(folder / "n.npy", (1, 16, 2, 4, 6))),
    "latents": Reader(_array, lambda folder: media.load_latents(folder / "n.npy", 16)),
    "lora": Reader(networks.diffusers_lora, networks.read_lora),
    "kohya": Reader(networks.kohya_lora, networks.read_lora),
    **{
        file.replace("diffusion_pytorch_model", "x"): Reader(networks.checkpoint(file), networks.read_checkpoint)
        for file in networks.CHECKPOINT_FILES
    },
    "numbers": Reader(networks.checkpoint("vae/diffusion_pytorch_model.safetensors"), networks.read_numbers),
    **{
        f"file: {kind}": Reader(networks.single_file(kind), networks.read_single(kind))
        for kind in networks.SINGLE_FILES
    },
    "calibration": Reader(_calibration, lambda folder: calibration.read(str(folder / "c.json"))),
    "preset": Reader(_text("p.json", PRESET), lambda folder: presets.apply(SampleConfig(), str(folder / "p.json"))),
    "jsonl": Reader(_text("m.jsonl", JSONL), _read_rows("m.jsonl")),
    "csv": Reader(_text("m.csv", CSV), _read_rows("m.csv")),
    "parquet": Reader(_parquet, _read_rows("m.parquet")),
    "json": Reader(_text("m.json", json.dumps(ROWS)), _read_rows("m.json")),
    "toml": Reader(_text("s.toml", lists.TOML), lambda folder: read_datasets(folder / "s.toml")),
    "captions": Reader(lists.captions, lambda folder: list_clips(folder, "guess")),
    "shards": Reader(lists.shard, lists.read_shard),
    "animation": Reader(lists.animation, lists.read_animation),
    "prompts": Reader(_text("p.jsonl", PROMPTS), _read_prompts),
    "scores": Reader(_text("s.jsonl", SCORES), lambda folder: ScoreLog(folder / "s.jsonl", "w")),
    "metrics": Reader(_text("metrics.jsonl", METRICS), _read_log),
    "checksums": Reader(_state, lambda folder: damage(folder / "3")),
    **{f"cache: {file}": Reader(_cache(file), _read_cache) for file in CACHE_FILES},
    **{suffix: Reader(_video(suffix), _read_video(suffix)) for suffix in CONTAINERS},
}
"""By name."""
