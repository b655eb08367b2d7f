"""Clips encoded once, before training: `wanjax cache --config configs/train_.. --out FOLDER`.

The configuration is that of the training to come. Every clip is encoded with each of its `tasks.variants` draws of what
is given. The folder holds ArrayRecord files, each of them written whole or not at all, and at last `index.json`; the
same command goes on where an earlier one was stopped. Several processes on the same folder (`--processes`,
`--process-id`) share the files among them. Training reads the folder as `CachedData`, and refuses it where frames,
size, tasks, seed or encoders are not those it was made with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization
from tqdm import tqdm

from wanjax.conditioning.encoders import Encoders
from wanjax.conditioning.frames import latent_mask
from wanjax.conditioning.samples import Encoded, PixelSample
from wanjax.config import WAN_VAE, CachedData, DiTConfig, MixedData, TrainConfig, VideoData
from wanjax.data.batch import shard_batch
from wanjax.data.buckets import Order, Shape
from wanjax.data.samples import TaskSamples, dropped, locate
from wanjax.data.sources import captions_digest
from wanjax.errors import InputError
from wanjax.files import check_name, remove_all_leftovers, replacing
from wanjax.remote import fetch
from wanjax.untrusted import read_bytes, read_json, reason
from wanjax.weights import Checkpoint
from wanjax.weights.hub import checkpoint_folder
from wanjax.weights.mapping import NetworkName

CLIPS_PER_FILE = 256
ENCODERS: tuple[NetworkName, ...] = ("vae", "umt5", "clip")
EMPTY_TEXT = "empty_text.msgpack"
_HASHED = 2**22
"""Numbers of a tensor that is looked at to tell encoders apart."""
MOST_INDEX = 2**30
"""Bytes of an index: some ten for every clip."""


def encoders_fingerprint(path: str) -> str:
    """Tells checkpoints' encoders apart: a hash of tensor names and some numbers of VAE, umT5 and CLIP."""
    checkpoint, digest = Checkpoint(checkpoint_folder(path)), hashlib.sha256()
    for name in ENCODERS:
        if name != "vae" and not checkpoint.has(name):  # networks without an image branch need no CLIP
            continue
        weights = checkpoint.weights(name)
        infos = dict(weights.items())
        digest.update(name.encode() + "\n".join(sorted(infos)).encode())
        small = sorted(key for key, info in infos.items() if math.prod(info.shape) <= _HASHED)  # no whole vocabulary
        with weights.open() as read:
            for key in (small[0], small[len(small) // 2], small[-1]):
                digest.update(np.ascontiguousarray(read(key)).view(np.uint8).tobytes())
    return digest.hexdigest()[:16]


def cache_settings(config: TrainConfig) -> dict[str, Any]:
    """What a cache and the training that reads it must have in common."""
    tasks = dataclasses.asdict(config.tasks)
    for name in ("caption_dropout", "image_dropout"):
        del tasks[name]  # drawn at every reading
    if not tasks["last"]:  # caches were made before there was this task
        del tasks["last"]
    folder = config.encoders or config.checkpoint
    return {
        "frames": config.frames,
        "height": config.height,
        "width": config.width,
        "seed": config.seed,
        "tasks": tasks,
        "fps": config.fps,
        "lengths": list(config.lengths),
        "ratios": list(config.ratios),
        "encoders": None if folder is None else encoders_fingerprint(folder),
    }


MOST_CLIPS = 2**24
"""Beyond the number of any clip in a cache."""


class CachedSamples:
    """`SampleSource` of encoded clips from a cache; sample n is what `TaskSamples` and the encoders would make of it.

    Args:
      path: the cache's folder.
      config: of the run.
      dit: of the network.

    Raises:
      InputError: there is no whole cache, or it was made with other settings.
    """

    def __init__(self, path: str, config: TrainConfig, dit: DiTConfig):
        path = str(fetch(path))
        index = _read_index(Path(path))
        for name, ours in cache_settings(config).items():
            theirs = index[name]
            if ours != theirs and not (name == "encoders" and ours is None):
                raise InputError(f"cache {path} has {name} {theirs}, the run {ours}; they must agree; make a new cache")
        self.path, self.config, self.dit = path, config, dit
        _check_captions(path, index, config)
        buckets = {tuple(bucket["shape"]): np.array(bucket["clips"]) for bucket in index["buckets"]}
        repeats = np.ones(1 + max(max(bucket["clips"]) for bucket in index["buckets"]), int)
        for bucket in index["buckets"]:
            repeats[bucket["clips"]] = bucket["repeats"]
        self.order = Order(buckets, config.batch, config.seed, repeats)
        clips = [clip for bucket in index["buckets"] for clip in bucket["clips"]]
        self.positions = {clip: position for position, clip in enumerate(clips)}
        try:
            self.records = grain.sources.ArrayRecordDataSource([str(Path(path) / name) for name in index["files"]])
            self.empty_text = _unpack(read_bytes(Path(path) / EMPTY_TEXT))["text"]
            found = len(self.records)  # pyright: ignore[reportArgumentType]  # it has one
            needed = len(clips) * config.tasks.variants
            if found != needed:
                raise ValueError(f"{found} records of {len(clips)} clips with {config.tasks.variants} variants")
            first = _unpack(self.records[0])
        except Exception as error:  # the library's own, for whatever a damaged file leads to
            raise InputError(
                f"cache {path} is damaged ({reason(error)}); a whole one is needed; make it anew"
            ) from error
        self._check(first)

    def __getitem__(self, index: int) -> Encoded:
        """Sample `index`, from 0."""
        record = self._record(index)
        no_caption, no_images = dropped(self.config, index)
        image = record.get("image")
        return Encoded(
            record["latents"],
            _pad(self.empty_text if no_caption else record["text"], self.dit.text_len),
            np.zeros_like(image) if no_images and image is not None else image,
            _image_condition(record),
        )

    def name(self, index: int) -> str:
        """Which clip it is of."""
        return self._record(index)["name"]

    def _check(self, record: dict[str, Any]) -> None:
        """Whether the network takes what is in a record."""
        c = self.dit
        for name, ours in (
            ("latents", c.out_channels),
            ("text", c.text_dim),
            ("image", c.image_dim),
            ("known", c.out_channels if c.in_channels != c.out_channels else None),
        ):
            theirs = record[name].shape[-1] if name in record else None
            if ours != theirs:
                raise InputError(
                    f"cache {self.path} has {name} of {theirs or 'no'} channels, the network takes {ours or 'none'}; "
                    "they must agree; make a new cache for this network"
                )
        if c.image_positions and len(record["image"]) != c.image_positions:
            raise InputError(
                f"cache {self.path} has {len(record['image'])} tokens of images, the network takes "
                f"{c.image_positions}; they must agree; make a new cache for this network"
            )

    def _record(self, index: int) -> dict[str, Any]:
        clip, variant = locate(index, self.order, self.config)
        try:
            return _unpack(self.records[self.positions[clip] * self.config.tasks.variants + variant])
        except Exception as error:  # as above
            raise InputError(
                f"cache {self.path}: clip {clip} is damaged ({reason(error)}); whole ones are needed; make it anew"
            ) from error


def _check_captions(path: str, index: dict[str, Any], config: TrainConfig) -> None:
    """Raises InputError where the clips that the cache was made of are here, and others by now or with other words."""
    of = config.data.of if isinstance(config.data, CachedData) else config.data
    ours = captions_digest(of, config.caption_encoding) if isinstance(of, (VideoData, MixedData)) else None
    if ours is not None and index["captions"] is not None and ours != index["captions"]:
        raise InputError(
            f"cache {path} is of other clips or captions than {of} has now; they must agree; make a new cache, or take "
            "back what was changed"
        )


def _read_index(path: Path) -> dict[str, Any]:
    """What a finished cache says of itself, if all its files are there."""
    file = path / "index.json"
    if not file.is_file():
        raise InputError(f"{path} has no index.json; a finished cache is needed; run wanjax cache --out {path}")
    try:
        index = read_json(file, MOST_INDEX)
        _check_index(index)
        names = [*index["files"], EMPTY_TEXT]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error!r}); a finished cache is needed; make a new one") from error
    missing = [name for name in names if not os.path.isfile(path / name)]  # a name can be too long
    if missing:
        raise InputError(
            f"cache {path} lacks {len(missing)} of {len(names)} files, the first {missing[0]}; all are needed; "
            "remove index.json and run the command that made the cache again"
        )
    return index


def _check_index(index: Any) -> None:
    """Raises `ValueError`, `KeyError` or `TypeError` unless an index's entries are what they should be."""
    clips = [clip for bucket in index["buckets"] for clip in bucket["clips"]]
    if missing := {*cache_settings(TrainConfig()), "captions"} - index.keys():
        raise KeyError(min(missing))
    numbers = [n for bucket in index["buckets"] for n in (*bucket["shape"], *bucket["clips"], *bucket["repeats"])]
    whole = all(type(n) is int and 0 <= n < 2**31 for n in numbers)
    whole = whole and all(len(bucket["clips"]) == len(bucket["repeats"]) for bucket in index["buckets"])
    whole = whole and all(n < MOST_CLIPS for n in clips)
    if not whole or not clips or len(set(clips)) != len(clips) or any(len(b["shape"]) != 3 for b in index["buckets"]):
        raise ValueError("buckets that are none")
    if not all(isinstance(name, str) and Path(name).name == name for name in index["files"]):
        raise ValueError("files that are none")


def _image_condition(record: dict[str, np.ndarray]) -> np.ndarray | None:
    if "known" not in record:
        return None
    h, w = record["known"].shape[1:3]
    mask = np.asarray(latent_mask(record["given"][None], h, w, WAN_VAE))[0]
    return np.concatenate([mask, record["known"]], axis=-1)  # [f, h, w, 4 + c]


def _pack(name: str, encoded: Encoded, given: np.ndarray) -> bytes:
    """A sample without what can be made again: the mask, and the zero rows behind the text."""
    text = np.asarray(encoded.text)
    arrays = {"latents": encoded.latents, "text": text[: _length(text)], "given": given}
    if encoded.image is not None:
        arrays["image"] = encoded.image
    if encoded.image_condition is not None:
        arrays["known"] = encoded.image_condition[..., -encoded.latents.shape[-1] :]
    return serialization.msgpack_serialize({"name": name} | {key: np.ascontiguousarray(x) for key, x in arrays.items()})


def _unpack(data: bytes) -> Any:
    return serialization.msgpack_restore(data)


def _length(text: np.ndarray) -> int:
    return int(np.flatnonzero(np.any(text != 0, axis=-1)).max(initial=-1)) + 1


def _pad(text: np.ndarray, length: int) -> np.ndarray:
    return np.pad(text, ((0, length - len(text)), (0, 0)))


# ------------------------------------------------------------------------------------------------------------ writing


def write_cache(
    config: TrainConfig,
    samples: TaskSamples,
    buckets: dict[Shape, np.ndarray],
    encoders: Encoders,
    out: Path,
    share: tuple[int, int] = (0, 1),
    repeats: np.ndarray | None = None,
) -> None:
    """Encode clips into `out`, on the ambient mesh; what is there already stays.

    Args:
      config: of the training to come; `batch` clips are encoded at a time.
      samples: the clips, with what is given of them.
      buckets: which of them, by shape.
      encoders: for them.
      out: folder to write.
      share: which process this is, and of how many that write the folder.
      repeats: how often each clip comes in a pass; None: once.

    Raises:
      InputError: the folder holds something else.
    """
    often = np.ones(1 + max(clips.max() for clips in buckets.values()), int) if repeats is None else repeats
    listed = [
        {"shape": list(shape), "clips": clips.tolist(), "repeats": often[clips].tolist()}
        for shape, clips in buckets.items()
    ]
    of = config.data.of if isinstance(config.data, CachedData) else config.data
    captions = captions_digest(of, config.caption_encoding) if isinstance(of, (VideoData, MixedData)) else None
    index = cache_settings(config) | {"of": repr(of), "captions": captions, "buckets": listed}
    _begin(out, index)
    parts = _parts(buckets)
    files = [out / f"clips-{i:06d}.arrayrecord" for i in range(len(parts))]
    mine, variants = range(share[0], len(parts), share[1]), config.tasks.variants
    with tqdm(total=sum(len(parts[i]) for i in mine) * variants, unit="sample", dynamic_ncols=True) as bar:
        for i in mine:
            places = [(clip, variant) for clip in parts[i] for variant in range(variants)]
            if files[i].exists():
                bar.update(len(places))
            else:
                _write_file(files[i], encode_all(samples, encoders, places, config.batch, bar))
    if not all(file.exists() for file in files):
        return  # another process writes the rest, and then the index
    _finish(out, index | {"files": [file.name for file in files]}, encoders)


def _parts(buckets: dict[Shape, np.ndarray]) -> list[list[int]]:
    """The clips of each file, all of one shape."""
    return [
        clips[start : start + CLIPS_PER_FILE].tolist()
        for clips in buckets.values()
        for start in range(0, len(clips), CLIPS_PER_FILE)
    ]


def _begin(out: Path, index: dict[str, Any]) -> None:
    """Make the folder, or see that it holds the beginning of this very cache."""
    check_name(out, "--out")
    plan = out / "plan.json"
    out.mkdir(parents=True, exist_ok=True)
    there = [file.name for file in out.iterdir() if not file.name.startswith(f".{plan.stem}.")]  # of who begins too
    try:
        if plan.exists() and read_json(plan, MOST_INDEX) != json.loads(json.dumps(index)):
            raise InputError(f"{out} holds the beginning of another cache; give another --out, or remove it")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{plan} cannot be read ({reason(error)}); give another --out, or remove it") from error
    if not plan.exists() and there:
        raise InputError(f"{out} is not empty and no cache; give another --out")
    _write_whole(plan, json.dumps(index).encode())


def _finish(out: Path, index: dict[str, Any], encoders: Encoders) -> None:
    """Write what all samples share, and at last the index."""
    text = np.asarray(encoders.empty_text())
    _write_whole(out / EMPTY_TEXT, serialization.msgpack_serialize({"text": text[: _length(text)]}))
    _write_whole(out / "index.json", json.dumps(index).encode())
    remove_all_leftovers(out)


def encode_all(
    samples: TaskSamples, encoders: Encoders, places: list[tuple[int, int]], batch: int, bar: tqdm
) -> Iterator[bytes]:
    """The records of (clip, draw) pairs, in order; the last batch is filled up with repetitions."""
    parts = [places[start : start + batch] for start in range(0, len(places), batch)]
    read = grain.MapDataset.source(parts).map(lambda part: [samples.named_sample(*p) for p in part])
    for part in read.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)):
        pixels: list[PixelSample] = [pixels for _, pixels in part]
        encoded = jax.device_get(encoders(shard_batch([*pixels, *pixels[-1:] * (batch - len(part))], batch)))
        for i, (name, sample) in enumerate(part):
            yield _pack(name, jax.tree.map(lambda x, i=i: x[i], encoded), sample.given)
        bar.update(len(part))


def _write_file(path: Path, records: Iterator[bytes]) -> None:
    with replacing(path) as unfinished:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()


def _write_whole(path: Path, data: bytes) -> None:
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)
