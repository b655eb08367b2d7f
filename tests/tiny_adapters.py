"""Files of adapters for the official golden DiT, in every published spelling."""

import itertools

import ml_dtypes
import numpy as np
import safetensors.numpy
from tiny import OFFICIAL, values

from wanjax.config import LoRAConfig
from wanjax.weights import Checkpoint, lora

CHECKPOINT = Checkpoint(OFFICIAL)
CONFIG = CHECKPOINT.config("dit")
BLOCKS = LoRAConfig().targets
LINEAR = {"self_attn": ("q", "k", "v", "o"), "cross_attn": ("q", "k", "v", "o", "k_img", "v_img"), "ffn": ("0", "2")}
NAMES = [f"{part}.{name}" for part, names in LINEAR.items() for name in names]
OURS = dict(zip(NAMES, (
    "self_attention.q", "self_attention.k", "self_attention.v", "self_attention.o", "cross_attention.q",
    "cross_attention.k", "cross_attention.v", "cross_attention.o", "cross_attention.k_image",
    "cross_attention.v_image", "ffn.fc_in", "ffn.fc_out",
), strict=True))  # fmt: skip
THEIRS = dict(zip(NAMES, (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
    "attn2.to_out.0", "attn2.add_k_proj", "attn2.add_v_proj", "ffn.net.0.proj", "ffn.net.2",
), strict=True))  # fmt: skip


def sizes(name):
    c = CONFIG
    return {"ffn.0": (c.dim, c.ffn_dim), "ffn.2": (c.ffn_dim, c.dim)}.get(name, (c.dim, c.dim))


def factors(seed=0, rank=4, names=NAMES, dtype=np.float32):
    """`a` [r, in] and `b` [out, r] of every layer of every block, by its official name."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for i, name in itertools.product(range(CONFIG.num_layers), names):
        fan_in, fan_out = sizes(name)
        a, b = rng.standard_normal((rank, fan_in)) / fan_in**0.5, 0.1 * rng.standard_normal((fan_out, rank))
        pairs[f"blocks.{i}.{name}"] = a.astype(dtype), b.astype(dtype)
    return pairs


def write(path, tensors, metadata=None):
    safetensors.numpy.save_file(tensors, path, metadata)
    return str(path)


def official(pairs, a="lora_A", b="lora_B", prefix="diffusion_model."):
    return {
        f"{prefix}{name}.{factor}.weight": x for name, (down, up) in pairs.items() for factor, x in ((a, down), (b, up))
    }


SPELLINGS = {
    "comfyui": lambda pairs: official(pairs),
    "lightx2v": lambda pairs: (
        official(pairs, "lora_down", "lora_up")
        | {f"diffusion_model.{name}.alpha": np.array(8, ml_dtypes.bfloat16) for name in pairs}
    ),
    "diffsynth": lambda pairs: official(pairs, "lora_A.default", "lora_B.default", prefix=""),
    "unianimate": lambda pairs: official(pairs, "lora_A.default", "lora_B.default", prefix="pipe.dit."),
    "peft": lambda pairs: official(pairs, prefix="base_model.model."),
    "kohya": lambda pairs: {
        f"lora_unet_{name.replace('.', '_')}.{part}": x
        for name, (a, b) in pairs.items()
        for part, x in (("lora_down.weight", a), ("lora_up.weight", b), ("alpha", np.array(8, np.float16)))
    },
    "lycoris": lambda pairs: {
        f"lycoris_{name.replace('.', '_')}.{part}.weight": x
        for name, pair in pairs.items()
        for part, x in zip(("lora_down", "lora_up"), pair, strict=True)
    },
    "lora.up": lambda pairs: official(pairs, "lora.down", "lora.up"),
    "without .weight": lambda pairs: {k.removesuffix(".weight"): x for k, x in official(pairs).items()},
    "linear layer": lambda pairs: official(pairs, "lora_linear_layer.down", "lora_linear_layer.up"),
    "_lora.up": lambda pairs: {
        f"diffusion_model.{name}_lora.{part}.weight": x
        for name, pair in pairs.items()
        for part, x in zip(("down", "up"), pair, strict=True)
    },
    "videox-fun": lambda pairs: {
        f"lora_unet__{name.replace('.', '_')}.{part}.weight": x
        for name, pair in pairs.items()
        for part, x in zip(("lora_down", "lora_up"), pair, strict=True)
    },
    "diffusers": lambda pairs: {
        f"transformer.blocks.{i}.{THEIRS[name]}.{part}.weight": x
        for key, pair in pairs.items()
        for _, i, name in [key.split(".", 2)]
        for part, x in zip(("lora_A", "lora_B"), pair, strict=True)
    },
}


def load_files(*arguments, merged=True, config=CONFIG, sharding=None):
    return lora.load(CHECKPOINT, config, lora.parse(arguments), merged, sharding)


def assert_close_to(dit, wanted, atol=2e-6):
    got = values(dit)
    assert got.keys() == wanted.keys()
    for path, x in wanted.items():
        np.testing.assert_allclose(got[path], x, atol=atol, err_msg=path)
