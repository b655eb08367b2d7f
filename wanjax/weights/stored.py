"""Files of tensors as other programs spell them: name prefixes, and weights in 8 bits with scales beside them.

    file = readable(tensor_file(path))      # names without prefix; every tensor in full, or as our 8-bit layers hold it

A weight `L.weight` in 8 bits has its scale in `L.scale_weight` (ComfyUI until 2025, whose files then have the marker
`scaled_fp8`), or in `L.weight_scale` (ComfyUI since, LightX2V), one number or one for each output: weight = stored *
scale. Newer files say the format of a layer in `L.comfy_quant` (JSON as bytes) or in the header, as
`_quantization_metadata`. Where all matrices of all blocks of a DiT are int8 or float8_e4m3fn, they stay so: the scale
is then called `L.scale`, as in files of `wanjax quantize`. Everything else is multiplied out, in float32, when read.

Sources: github Comfy-Org/ComfyUI `comfy/quant_ops.py` and `comfy/model_detection.py`, LightX2V `tools/convert`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from wanjax.errors import InputError
from wanjax.untrusted import parse_json
from wanjax.weights.gguf_file import GGUFFile
from wanjax.weights.mapping import some
from wanjax.weights.tables import dit
from wanjax.weights.tensors import PICKLED, PthFile, Reader, SafetensorsFile, TensorFile, TensorInfo

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")
SCALES = (".scale_weight", ".weight_scale")
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
"""Of ComfyUI's formats: those that are a number times a scale."""
ACCEPTED = (
    "accepted: float32, float16, bfloat16, fp8 and int8 with one scale or one for each output, GGUF; give such a file"
)
SPIECE = "spiece_model"
"""The tokenizer's model inside a file of umT5, as bytes."""
MARKERS = re.compile(rf"scaled_fp8|model_type\..*|{SPIECE}|.*\.(comfy_quant|scale_input|input_scale)")
"""Tensors that say something of others, or of activations."""
FOREIGN = {
    r".*\.weight_scale_2": "nvfp4",
    r".*\.(absmax|quant_map)|.*\.quant_state\..*": "bitsandbytes",
    r".*\.int8_weight": "int8 per block (TurboDiffusion)",
    r".*\.(qweight|qzeros)": "GPTQ or AWQ",
}
"""Names that tell formats which cannot be read."""
OPEN_CLIP = "visual.transformer.resblocks.0.ln_1.weight"
"""A tensor of every CLIP tower as open_clip names it."""
OPEN_CLIP_NAMES = (
    (r"visual\.class_embedding", "visual.cls_embedding"),
    (r"visual\.positional_embedding", "visual.pos_embedding"),
    (r"visual\.conv1\.", "visual.patch_embedding."),
    (r"visual\.ln_pre\.", "visual.pre_norm."),
    (r"visual\.ln_post\.", "visual.post_norm."),
    (r"visual\.proj", "visual.head"),
    (r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.", r"visual.transformer.\1.norm\2."),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"visual.transformer.\1.attn.to_qkv."),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"visual.transformer.\1.attn.proj."),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"visual.transformer.\1.mlp.0."),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"visual.transformer.\1.mlp.2."),
    (r"(?!visual\.)", "textual."),
)
"""open_clip's names (github mlfoundations/open_clip `transformer.py`), and the official layout's."""
BITS8 = {np.dtype(x) for x in (np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}
KEPT = {np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn)}
"""What the DiT's blocks can multiply as it is."""


class Origin(NamedTuple):
    """Where a tensor comes from: its name in the file, and that of the scale that it is multiplied with."""

    key: str
    scale: str | None = None


def tensor_file(path: Path) -> TensorFile:
    """The reader for the file's ending.

    Raises:
      InputError: the file cannot be read, is truncated or damaged, or is a .pth and torch is not installed.
    """
    if path.suffix == ".gguf":
        return GGUFFile(path)
    return PthFile(path) if path.suffix in PICKLED else SafetensorsFile(path)


def readable(file: TensorFile) -> TensorFile:
    """The file itself if its tensors are plain; else one that gives them plain, or in 8 bits as wanjax's own are.

    Raises:
      InputError: its numbers are in a format that cannot be read, or a scale is missing.
    """
    refuse_foreign(file)
    prefix = next((p for p in PREFIXES if sum(key.startswith(p) for key in file.infos) > len(file.infos) / 2), "")
    is_marked = any(MARKERS.fullmatch(key) or key.endswith(SCALES) for key in file.infos)
    return Stored(file, prefix) if prefix or is_marked or OPEN_CLIP in file.infos else file


def refuse_foreign(file: TensorFile) -> None:
    """Raises `InputError` where names or the header tell a format that cannot be read."""
    for pattern, name in FOREIGN.items():
        if any(re.fullmatch(pattern, key) for key in file.infos):
            raise InputError(f"{file.path} has scaled {name} weights; {ACCEPTED}")
    for name in said_formats(file):
        if name not in FORMATS:
            raise InputError(f"{file.path} has scaled {name} weights; {ACCEPTED}")


def said_formats(file: TensorFile) -> set[str]:
    """The formats of layers that the file names.

    Raises:
      InputError: what names them is damaged.
    """
    keys = [key for key in file.infos if key.endswith(".comfy_quant")]
    metadata = getattr(file, "metadata", {}).get("_quantization_metadata")
    if not keys and metadata is None:
        return set()
    try:
        said = list(parse_json(metadata)["layers"].values()) if metadata is not None else []
        with file.open() as reader:
            said += [parse_json(reader.view(key).tobytes()) for key in keys]
        return {f"{x['format']} with convrot" if x.get("convrot") else str(x["format"]) for x in said}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file.path} says its formats in an unknown way ({error!r}); {ACCEPTED}") from error


class Stored:
    """A file of tensors under plain names; see the module.

    Args:
      file: as it is.
      prefix: of its names, which goes.

    Raises:
      InputError: a scale is missing, or fits no weight.
    """

    def __init__(self, file: TensorFile, prefix: str):
        self.path, self._file = file.path, file
        self.metadata: Mapping[str, str] = getattr(file, "metadata", {})
        scales = {key.removesuffix(end): key for end in SCALES for key in file.infos if key.endswith(end)}
        self._check(scales)
        is_open_clip = OPEN_CLIP in file.infos
        kept = kept_layers({key.removeprefix(prefix): key for key in scales}, scales, file.infos)
        self.infos: dict[str, TensorInfo] = {}
        self.origins: dict[str, Origin] = {}
        for key, info in file.infos.items():
            if MARKERS.fullmatch(key.removeprefix(prefix)) or key in scales.values():
                continue
            layer, name = key.removesuffix(".weight"), key.removeprefix(prefix)
            scale = scales.get(layer) if key.endswith(".weight") else None
            if scale is not None and layer in kept:
                self._add(name, info, Origin(key))
                shape = (file.infos[scale].size // file.infos[scale].dtype.itemsize,)
                shape = () if shape == (1,) and not kept[layer] else shape
                self._add(f"{layer.removeprefix(prefix)}.scale", TensorInfo(shape, np.dtype(np.float32)), Origin(scale))
            elif scale is not None:
                self._add(name, TensorInfo(info.shape, np.dtype(np.float32)), Origin(key, scale))
            elif is_open_clip:
                name, info = official_clip(name, info)
                self._add(name, info, Origin(key))
            else:
                self._add(name, info, Origin(key))

    def _add(self, name: str, info: TensorInfo, origin: Origin) -> None:
        self.infos[name], self.origins[name] = info, origin

    def _check(self, scales: Mapping[str, str]) -> None:
        infos = self._file.infos
        for layer, key in scales.items():
            weight = infos.get(f"{layer}.weight")
            if weight is None:
                raise InputError(f"{self.path} has the scale {key} of no weight; download it again")
            shape = infos[key].shape
            out = weight.shape[0] if weight.shape else 1
            if shape not in ((), (1,), (out,), (out, 1)):
                raise InputError(
                    f"{self.path} has {key} of shape {list(shape)}: weights with a scale per block; {ACCEPTED}"
                )
        bare = [k for k, x in infos.items() if x.dtype in BITS8 and len(x.shape) == 2 and k.endswith(".weight")]
        missing = [key for key in bare if key.removesuffix(".weight") not in scales]
        promised = any(key.endswith("scaled_fp8") for key in infos) or any(infos[k].dtype == np.int8 for k in missing)
        if missing and (scales or promised):
            raise InputError(
                f"{self.path} has {some(missing, 'weight')} in 8 bits without the scale that it promises; give the "
                "whole file, or one without scales"
            )

    @contextlib.contextmanager
    def open(self) -> Iterator[Reader]:
        """Opens the file for reading."""
        with self._file.open() as reader:
            yield _StoredReader(self, reader)


class _StoredReader:
    def __init__(self, stored: Stored, reader: Reader):
        self._stored, self._reader = stored, reader

    def view(self, key: str) -> np.ndarray:
        origin, info = self._stored.origins[key], self._stored.infos[key]
        view = self._reader.view(origin.key)
        if origin.scale is None:
            return view.astype(info.dtype, copy=False).reshape(info.shape)  # a scale may be bfloat16
        scale = self._reader.view(origin.scale).astype(np.float32).reshape(-1)
        with np.errstate(all="ignore"):  # NaN of a damaged file is found by who takes the numbers
            return view.astype(np.float32) * scale.reshape(-1, *(1,) * (view.ndim - 1))  # in full: 8 bits have no sums

    def release(self) -> None:
        self._reader.release()


def official_clip(key: str, info: TensorInfo) -> tuple[str, TensorInfo]:
    """An open_clip tensor's name and shape in the official layout, whose embeddings have axes of size 1 in front."""
    for pattern, name in OPEN_CLIP_NAMES:
        if found := re.match(pattern, key):
            key = found.expand(name) + key[found.end() :]
            break
    ones = {"visual.cls_embedding": (1, 1), "visual.pos_embedding": (1,)}.get(key, ())
    return key, info._replace(shape=(*ones, *info.shape))


def kept_layers(bare: Mapping[str, str], scales: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> dict[str, bool]:
    """The layers whose weights stay in 8 bits, and whether they have a scale for each output; none if not all can.

    Args:
      bare: the scaled layers' names in the file, by name without prefix.
      scales: names of their scales.
      infos: of the file.
    """
    layers = {name: (int(found[1]), key) for name, key in bare.items() if (found := PROJECTION.fullmatch(name))}
    if not layers:
        return {}
    prefix = next(key[: len(key) - len(name)] for name, (_, key) in layers.items())
    blocks = {i for i, _ in layers.values()}
    there = [key.removeprefix(prefix).removesuffix(".weight") for key in infos if key.endswith(".weight")]
    wanted = {name for name in there if (found := PROJECTION.fullmatch(name)) and int(found[1]) in blocks}
    dtypes = {infos[f"{key}.weight"].dtype for _, key in layers.values()}
    counts = Counter(infos[scales[key]].shape in ((), (1,)) for _, key in layers.values())
    whole = wanted == set(layers) and blocks == set(range(min(blocks), max(blocks) + 1))
    if not whole or len(dtypes) > 1 or not dtypes <= KEPT or len(counts) > 1:
        return {}
    return {key: counts[False] > 0 for _, key in layers.values()}


def _projection_pattern() -> re.Pattern[str]:
    keys = {
        rule.key.removesuffix(".scale")
        for table in (dit.OFFICIAL, dit.DIFFUSERS)
        for rule in table.rules
        if rule.key.endswith(".scale")
    }
    inner = "|".join(re.escape(key.removeprefix("blocks.{i}.")) for key in sorted(keys))
    return re.compile(rf"blocks\.(\d+)\.(?:{inner})")


PROJECTION = _projection_pattern()
"""A layer that the DiT's blocks may hold in 8 bits; its group is the block."""
