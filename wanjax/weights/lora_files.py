"""Files of LoRA adapters: the spelling of diffusers and PEFT, which is also written, and those of published Wan LoRAs.

A key is a prefix, a layer and what it holds of the layer:

prefix  `transformer.` (diffusers), `diffusion_model.` (ComfyUI), `base_model.model.` (PEFT), `pipe.dit.` (DiffSynth)
        or none; kohya: `lora_unet_`, and the layer's dots are `_` (VideoX-Fun: `lora_unet__`, LyCORIS: `lycoris_`)
layer   `blocks.0.attn1.to_q` (Diffusers layout) or `blocks.0.self_attn.q` (official); see `wanjax.weights.tables.dit`
part    `lora_A.weight` or `lora_down.weight` [r, in]; `lora_B.weight` or `lora_up.weight` [out, r]; `lora_B.bias`; also
        `lora.down`, `_lora.down`, `lora_linear_layer.down`, and names without `.weight`;
        `alpha` (a scalar); `diff`, `diff_b`, `diff_m`: differences of weight, bias and modulation in full, those of
        norms also `w_norm`, `b_norm`; `lokr_..` and `hada_..`: see `wanjax.weights.lycoris`

The factors count alpha / r, alpha from its tensor or from the metadata that diffusers writes; without any, 1.
DoRA (arXiv 2402.09353) has a magnitude too, `dora_scale` or `lora_magnitude_vector`: with it the sum W of weight and
product becomes magnitude * W / |W|, of each output's row (or of each input's column, as the magnitude's shape says).
Sources: diffusers 0.42 `loaders/lora_conversion_utils.py`; PEFT `LoraConfig`; the keys of LightX2V's and kohya's files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from wanjax.config import DiTConfig
from wanjax.errors import InputError
from wanjax.files import replacing
from wanjax.models.layers import LowRank
from wanjax.untrusted import parse_json
from wanjax.weights import lycoris
from wanjax.weights.layouts import NETWORKS, Settings
from wanjax.weights.load import parameter_shapes
from wanjax.weights.lora_names import PART, PARTS, PREFIX, usual_name
from wanjax.weights.mapping import CONV3D, LINEAR, Entry, Shape, Slot, Table, Transform, expand, some
from wanjax.weights.tensor_source import fetch
from wanjax.weights.tensors import Reader, SafetensorsFile, TensorInfo, is_finite
from wanjax.weights.write import write_safetensors

METADATA = "lora_adapter_metadata"  # diffusers' entry in the header of a safetensors file
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers', PEFT's
PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\\d\+|\.\*(?!.*\.\*.*\.\*)){1,200}\$?")
"""Of what PEFT takes for layers' names: what cannot take a matcher for ever, as expressions in general can."""
DIFFERENCES = {"b_bias": "bias", "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
OTHER_METHODS = ("lokr_t", "hada_t", "lora_mid", "oft_", "glora_", ".on_input", "boft_", "vera_")
IMAGE_BRANCH = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder")
"""In the names of layers that a network without image branch (Wan2.2's) has not."""


class Term(NamedTuple):
    """What is added to a parameter, or to one layer of it: `scale * a @ b`, or `scale * b` where there is no `a`.

    slot: the parameter.
    a, b: keys of the file.
    scale: of the product or of the difference.
    transform: from the file's weight to the parameter.
    parts: of a difference that is a product of another kind, the keys by what they are; see `lycoris`.
    magnitude: the key of DoRA's magnitude; the sum is normalised by it.
    strength: of what a magnitude makes of the parameter; in `scale` otherwise.
    """

    slot: Slot
    a: str | None
    b: str
    scale: float
    transform: Transform
    parts: Mapping[str, str] = MappingProxyType({})
    magnitude: str | None = None
    strength: float = 1.0

    @property
    def is_beside(self) -> bool:
        """Whether it can stay beside the weight: a plain product of two factors, for a matrix."""
        return self.a is not None and self.magnitude is None and len(self.slot.shape) == 2

    def read(self, reader: Reader) -> tuple[np.ndarray | None, np.ndarray]:
        """`a` `[.., in, r]` and `b` `[r, out]`, or None and the difference in the parameter's shape; float32."""
        if self.parts:
            whole = lycoris.difference({name: self._floats(reader, key) for name, key in self.parts.items()})
            return None, self.transform.forward(whole.reshape(self.transform.checkpoint_shape(self.slot.shape)))
        b = self._floats(reader, self.b)
        if self.a is None:
            return None, self._widened(self.transform.forward(b))
        a = self.transform.forward(self._floats(reader, self.a))  # [.., in, r]
        return self._widened(a), b.reshape(b.shape[:2]).T

    def read_magnitude(self, reader: Reader) -> np.ndarray:
        """DoRA's, `[1, out]` or `[in, 1]`."""
        magnitude = self._floats(reader, self.magnitude or "")
        per_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 != magnitude.size
        return magnitude.reshape((-1, 1) if per_input else (1, -1))

    def _floats(self, reader: Reader, key: str) -> np.ndarray:
        """A tensor of the file in float32, in which sums are made."""
        tensor = reader.view(key).astype(np.float32)
        if not is_finite(tensor):
            raise InputError(f"LoRA tensor {key} holds NaN or infinity; finite weights are needed; give another LoRA")
        return tensor

    def _widened(self, x: np.ndarray) -> np.ndarray:
        """Of a patch embedding of fewer channels: those that a t2v network lacks come last and get nothing."""
        if x.ndim != 5 or x.shape[-2] == self.slot.shape[-2]:
            return x
        return np.pad(x, ((0, 0),) * 3 + ((0, self.slot.shape[-2] - x.shape[-2]), (0, 0)))


@dataclasses.dataclass
class _Faults:
    channels: int  # of the noise, all that a t2v network's patch embedding has
    unknown: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)


class LoRAFile:
    """Adapters on disk.

    Attributes:
      path: the file; given a folder that diffusers or PEFT wrote, the file in it.
      strength: what everything in it is multiplied with.

    Raises:
      InputError: there is no such file, it cannot be read, or it is of another method than LoRA.
    """

    def __init__(self, path: str | Path, strength: float = 1.0):
        self.path, self.strength = _file(Path(path)), strength
        self._file = SafetensorsFile(self.path)
        other = [key for key in self._file.infos if any(name in key for name in OTHER_METHODS)]
        if other:
            raise InputError(
                f"{self.path} has {other[0]}; LoRA, DoRA, LoKr and LoHa are accepted, without Tucker's cores; give one"
            )
        self._settings = self._read_settings()
        self._unknown: list[str] = []
        self._layers: dict[str, dict[str, str]] = {}  # key by part by layer
        for key in self._file.infos:
            self._add(key)
        alphas = [parts["alpha"] for parts in self._layers.values() if "alpha" in parts]
        with self._file.open() as reader:
            self._alphas = {key: self._alpha(key, reader.view(key)) for key in alphas}

    def _alpha(self, name: str, value: Any) -> float:
        """A number that factors count by.

        Raises:
          InputError: it is none, or not finite.
        """
        value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            what = f"of shape {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
            raise InputError(f"{self.path}: {name} is {what}; a finite number is accepted; give another LoRA")
        return float(value)

    def _add(self, key: str) -> None:
        name = usual_name(key)
        found = PART.fullmatch(name[PREFIX.match(name).end() :])  # pyright: ignore[reportOptionalMemberAccess]
        part = found and (found["other"] or PARTS.get((found["factor"], found["of"])))
        if not found or not part:
            self._unknown.append(key)
            return
        parts = self._layers.setdefault(found["layer"].replace("lora_unet__", "lora_unet_"), {})
        if part in parts:
            raise InputError(f"{self.path} has both {parts[part]} and {key}; remove one")
        parts[part] = key

    def _read_settings(self) -> Mapping[str, Any]:
        """PEFT's configuration, from the file's own metadata or beside the file."""
        beside = self.path.parent / "adapter_config.json"
        try:
            stored = parse_json(self._file.metadata.get(METADATA, "null"))
            if stored is None:
                return Settings(beside) if self.path.name == FILES[1] and beside.is_file() else {}
            settings = {key.removeprefix("transformer."): value for key, value in stored.items()}
            for pattern in settings.get("alpha_pattern") or ():
                if not PATTERN.fullmatch(pattern):
                    raise InputError(
                        f"{self.path}: alpha_pattern {pattern!r}; layers' names are accepted, with . .* and \\d+ for "
                        "what differs; give another LoRA"
                    )
            return settings
        except (ValueError, AttributeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path} has unreadable metadata ({error}); download it again") from error

    def terms(self, config: DiTConfig) -> list[Term]:
        """All that the file adds to the network's parameters.

        Raises:
          InputError: a tensor is unknown, or of another shape, or a pair lacks one of its factors.
        """
        places, faults, terms = _places(config), _Faults(config.out_channels, list(self._unknown)), []
        for layer, parts in self._layers.items():
            place = places.get(layer)
            if place is None and layer in self.left_out(config):
                continue
            if place is None:
                faults.unknown += parts.values()
            else:
                terms += self._terms(layer, parts, place, faults)
        found = [f"has {some(faults.unknown, 'tensor')} that the network has no place for"] if faults.unknown else []
        found += [f"lacks {some(faults.missing, 'tensor')}"] if faults.missing else []
        found += [f"has {some(faults.misshapen, 'tensor')} of another shape"] if faults.misshapen else []
        if found or not terms:
            network = f"{config.task} network of {config.num_layers} layers of width {config.dim}"
            raise InputError(f"{self.path} {' and '.join(found) or 'is empty'}; give a LoRA for this {network}")
        return terms

    def left_out(self, config: DiTConfig) -> list[str]:
        """Layers of the image branch, where the network has none; a LoRA of Wan2.1's is much used with Wan2.2's."""
        return [] if config.image_dim is not None else [layer for layer in self._layers if IMAGE_BRANCH.search(layer)]

    def _terms(
        self, layer: str, parts: Mapping[str, str], place: Mapping[str, Entry], faults: _Faults
    ) -> Iterator[Term]:
        factor = self.strength
        products = {name: key for name, key in parts.items() if name in lycoris.NAMES}
        if products:
            yield from self._product(layer, parts, products, place.get("weight"), faults)
        elif parts.keys() & {"a", "b", "alpha", "b_bias", "dora_scale"}:
            if not {"a", "b"} <= parts.keys():
                faults.missing += [f"lora_{part.upper()} of {layer}" for part in ("a", "b") if part not in parts]
                return
            factor *= self._scale(layer, parts)
            entry = place.get("weight")
            if entry is None or entry.transform not in (LINEAR, CONV3D):
                faults.unknown += [parts["a"], parts["b"]]
            elif self._fit(parts, entry, faults) and self._magnitude_fits(parts, entry, faults):
                term = Term(entry.slots[0], parts["a"], parts["b"], factor, entry.transform)
                yield self._with_magnitude(term, parts)
        for part, name in DIFFERENCES.items():
            key, entry = parts.get(part), place.get(name)
            if key is None:
                continue
            if entry is None:
                faults.unknown.append(key)
            elif self._has_shape(key, entry.shape, faults):
                scale = factor if part == "b_bias" else self.strength
                yield Term(entry.slots[0], None, key, scale, entry.transform)

    def _product(
        self, layer: str, parts: Mapping[str, str], products: Mapping[str, str], entry: Entry | None, faults: _Faults
    ) -> Iterator[Term]:
        """LoKr's or LoHa's."""
        shapes = {name: self._file.infos[key].shape for name, key in products.items()}
        made, first = lycoris.shape(shapes), next(iter(products.values()))
        if entry is None or entry.transform not in (LINEAR, CONV3D):
            faults.unknown += products.values()
        elif made != (entry.shape[0], math.prod(entry.shape[1:])):
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            faults.misshapen.append(f"{first} (given {given}, expected factors of {list(entry.shape)})")
        elif self._magnitude_fits(parts, entry, faults):
            scale = self.strength * self._scale(layer, parts)
            yield self._with_magnitude(Term(entry.slots[0], None, first, scale, entry.transform, products), parts)

    def _with_magnitude(self, term: Term, parts: Mapping[str, str]) -> Term:
        if "dora_scale" not in parts:
            return term
        scale = term.scale / self.strength if self.strength else 0.0
        return term._replace(magnitude=parts["dora_scale"], scale=scale, strength=self.strength)

    def _magnitude_fits(self, parts: Mapping[str, str], entry: Entry, faults: _Faults) -> bool:
        key = parts.get("dora_scale")
        if key is None:
            return True
        out, fan_in, *rest = entry.shape
        given = self._file.infos[key].shape
        if not rest and given in ((out,), (out, 1), (1, fan_in)):
            return True
        faults.misshapen.append(f"{key} (given {list(given)}, expected {[out, 1]})")
        return False

    def _fit(self, parts: Mapping[str, str], entry: Entry, faults: _Faults) -> bool:
        (rank, *_), (out, *rest) = self._file.infos[parts["a"]].shape or (0,), entry.shape
        given = self._file.infos[parts["b"]].shape
        if rank and (given == (out, rank, *(1,) * (len(rest) - 1)) or given == (out, rank)):
            return self._has_shape(parts["a"], (rank, *rest), faults)
        faults.misshapen.append(f"{parts['b']} (given {list(given)}, expected {[out, rank]})")
        return False

    def _has_shape(self, key: str, shape: Shape, faults: _Faults) -> bool:
        given = self._file.infos[key].shape
        of_t2v = (shape[0], faults.channels, *shape[2:]) if len(shape) == 5 else shape
        if given in (shape, of_t2v):
            return True
        faults.misshapen.append(f"{key} (given {list(given)}, expected {list(shape)})")
        return False

    def _scale(self, layer: str, parts: Mapping[str, str]) -> float:
        """alpha / r, or, if the settings say so, alpha / sqrt(r) (rank-stabilised LoRA, arXiv 2312.03732)."""
        if "a" in parts:
            rank = (self._file.infos[parts["a"]].shape or (1,))[0] or 1
        else:
            rank = lycoris.rank({name: self._file.infos[key].shape for name, key in parts.items()})
            if rank is None and not ("alpha" in self._settings and "r" in self._settings):
                return 1.0  # LyCORIS' own counts matrices in full as they are
            rank = rank or self._alpha("r", self._settings["r"]) or 1
        said = self._settings.get("lora_alpha", self._settings.get("alpha", rank))  # PEFT's, of LoRA, of LoKr and LoHa
        alpha = self._alpha("lora_alpha", said)
        for pattern, value in (self._settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):  # as PEFT matches them
                alpha = self._alpha(f"alpha of {pattern}", value)
                break
        if "alpha" in parts:
            alpha = self._alphas[parts["alpha"]]
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def open(self) -> contextlib.AbstractContextManager[Reader]:
        """What `Term.read` takes."""
        return self._file.open()


def _file(path: Path) -> Path:
    for name in FILES:
        if (path / name).is_file():
            return path / name
    if path.suffix != ".safetensors" or not path.is_file():
        raise InputError(f"LoRA {path} is not a .safetensors file, nor a folder with {' or '.join(FILES)}; give one")
    return path


def _places(config: DiTConfig) -> dict[str, dict[str, Entry]]:
    """What a layer's weight, bias and modulation are, by its name in every spelling."""
    places: dict[str, dict[str, Entry]] = {}
    for table in NETWORKS["dit"].tables.values():
        for name, entry in _entries(table, config).items():
            layer, _, part = name.rpartition(".")
            if part in ("weight", "bias"):
                places.setdefault(layer, {})[part] = entry
                continue
            places.setdefault(name, {})["weight"] = entry  # a parameter without layer, such as the modulation
            if part == "modulation":
                places.setdefault(layer, {})[part] = entry
    return places | {f"lora_unet_{layer.replace('.', '_')}": place for layer, place in places.items()}


def _entries(table: Table, config: DiTConfig) -> dict[str, Entry]:
    """The network's table but for the scales of quantised matrices, which have no adapters."""
    shapes = {k: shape for k, shape in parameter_shapes("dit", config).items() if not k.endswith("kernel_scale")}
    return expand(table, shapes, config)


def write_lora(path: str | Path, config: DiTConfig, adapters: Mapping[str, LowRank]) -> None:
    """Writes adapters as diffusers and PEFT do, in the dtypes that they have, with alpha in the metadata.

    Appears at `path` when it is complete, not before. On several hosts all have to call this; the first one writes.

    Args:
      path: a .safetensors file; an older one is replaced.
      config: of the network.
      adapters: by the path of the linear layer that each is beside.

    Raises:
      InputError: `path` cannot be written.
    """
    tensors, ranks, alphas = {}, {}, {}
    for name, entry in _entries(NETWORKS["dit"].tables["diffusers"], config).items():
        slot = entry.slots[0]
        adapter = adapters.get(slot.path.removesuffix(".kernel"))
        if adapter is None or not slot.path.endswith(".kernel"):
            continue
        name = name.removesuffix(".weight")
        tensors[f"transformer.{name}.lora_A.weight"] = fetch(adapter.a, slot).T  # [r, in]
        tensors[f"transformer.{name}.lora_B.weight"] = fetch(adapter.b, slot).T  # [out, r]
        if adapter.magnitude is not None:
            tensors[f"transformer.{name}.lora_magnitude_vector"] = fetch(adapter.magnitude, slot)  # [out]
        ranks[name], alphas[name] = adapter.rank, float(adapter.alpha)
    if jax.process_index():
        return
    infos = {key: TensorInfo(x.shape, x.dtype) for key, x in tensors.items()}
    try:
        with replacing(Path(path)) as new:
            is_dora = any(adapter.magnitude is not None for adapter in adapters.values())
            metadata = {METADATA: _metadata(ranks, alphas, is_dora)}
            write_safetensors(new, infos, tensors.__getitem__, lambda *_: None, metadata)
    except OSError as error:
        raise InputError(f"LoRA {path} cannot be written ({error.strerror}); give another place") from error


def _metadata(ranks: Mapping[str, int], alphas: Mapping[str, float], is_dora: bool) -> str:
    """PEFT's `LoraConfig`, as far as it says something: the usual rank and alpha, and the layers that have others."""
    rank, alpha = (max(set(x.values()), key=list(x.values()).count) for x in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: x for name, x in ranks.items() if x != rank},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "target_modules": sorted(ranks),
    } | ({"use_dora": True} if is_dora else {})
    return json.dumps({f"transformer.{name}": value for name, value in config.items()}, indent=2, sort_keys=True)
