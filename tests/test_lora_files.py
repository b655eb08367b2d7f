"""Files of adapters: every spelling, all that they may hold, and every refusal."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import GOLDEN, OFFICIAL, flags, golden, official_velocity, refused, values
from tiny_adapters import CONFIG, NAMES, OURS, SPELLINGS, assert_close_to, factors, load_files, official, write

import sample_jax
from wanjax.errors import InputError
from wanjax.weights import lora
from wanjax.weights.lora_files import METADATA


def merged_by_hand(*files):
    """The golden network's parameters with `(pairs, scale)` added, in float64."""
    out = {path: x.astype(np.float64) for path, x in values(golden("official", "dit")).items()}
    for pairs, scale in files:
        for name, (a, b) in pairs.items():
            _, i, rest = name.split(".", 2)
            out[f"blocks.{OURS[rest]}.kernel"][int(i)] += scale * (b.astype(np.float64) @ a.astype(np.float64)).T
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, dtype, tmp_path):
    pairs = factors(dtype=dtype)
    path = write(tmp_path / "a.safetensors", SPELLINGS[spelling](pairs))
    scale = 8 / 4 if spelling in ("lightx2v", "kohya") else 1
    assert_close_to(load_files(path), merged_by_hand((pairs, scale)))


def test_differences_in_full(tmp_path):
    rng = np.random.default_rng(1)
    base, c = golden("official", "dit"), CONFIG
    changes = {  # by key: the parameter, and its layer
        "blocks.1.self_attn.q.diff_b": ("blocks.self_attention.q.bias", 1, (c.dim,)),
        "blocks.2.cross_attn.norm_k_img.diff": ("blocks.cross_attention.norm_k_image.scale", 2, (c.dim,)),
        "blocks.0.norm3.diff_b": ("blocks.norm_cross.bias", 0, (c.dim,)),
        "blocks.1.diff_m": ("blocks.modulation", 1, (1, 6, c.dim)),
        "head.diff_m": ("head.modulation", None, (1, 2, c.dim)),
        "head.head.diff": ("head.linear.kernel", None, (64, c.dim)),
        "patch_embedding.diff": ("patch_embedding.kernel", None, (c.dim, 36, 1, 2, 2)),
        "img_emb.proj.1.diff": ("image_embedding.fc_in.kernel", None, (c.image_dim, c.image_dim)),
        "blocks.0.ffn.0.diff": ("blocks.ffn.fc_in.kernel", 0, (c.ffn_dim, c.dim)),
    }
    tensors = {f"diffusion_model.{key}": rng.standard_normal(x[2]).astype(np.float32) for key, x in changes.items()}
    wanted = values(base)
    for (path, layer, shape), x in zip(changes.values(), tensors.values(), strict=True):
        x = x[0] if len(shape) == 3 else x.transpose({1: (0,), 2: (1, 0), 5: (2, 3, 4, 1, 0)}[x.ndim])
        target = wanted[path] = wanted[path].copy()
        target[... if layer is None else layer] += 0.5 * x
    path = write(tmp_path / "a.safetensors", tensors)
    for merged in (True, False):
        assert_close_to(load_files(f"{path}:0.5", merged=merged), wanted)
    (file,) = lora.parse([path])
    assert "adapters of 0 layers, 9 differences in full" in lora.describe_adapters(file, CONFIG)


def test_alpha_of_the_metadata_and_biases(tmp_path):
    """As PEFT counts them: patterns, rank-stabilised scales, biases of B with the scale."""
    pairs = factors(names=("self_attn.q", "ffn.0"))
    bias = np.arange(CONFIG.dim, dtype=np.float32)
    tensors = SPELLINGS["diffusers"](pairs) | {"transformer.blocks.2.attn1.to_q.lora_B.bias": bias}
    settings = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"ffn.net.0.proj": 2}, "use_rslora": True}
    settings = {METADATA: json.dumps({f"transformer.{name}": x for name, x in settings.items()})}
    path = write(tmp_path / "a.safetensors", tensors, settings)
    split = [({k: x for k, x in pairs.items() if word in k}, s) for word, s in (("ffn", 2 / 2), ("self", 6 / 2))]
    wanted = merged_by_hand(*split)
    wanted["blocks.self_attention.q.bias"][2] += 3 * bias
    assert_close_to(load_files(path), wanted, atol=1e-5)
    # PEFT's own folder says the same beside the file.
    folder = tmp_path / "peft"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", SPELLINGS["peft"](pairs))
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "use_dora": False}))
    assert_close_to(load_files(str(folder)), merged_by_hand((pairs, 2 / 4)))


def test_several_at_once(tmp_path):
    """Other ranks, other layers, other strengths; a sum, whether merged or not."""
    pairs = factors(1, 4), factors(2, 2, ("self_attn.q", "ffn.2")), factors(3, 1, ("self_attn.q",))
    del pairs[1]["blocks.0.self_attn.q"]
    files = [write(tmp_path / f"{i}.safetensors", official(x)) for i, x in enumerate(pairs)]
    arguments = f"{files[0]}:0.5", files[1], f"{files[2]}:-2"
    merged = load_files(*arguments)
    assert_close_to(merged, merged_by_hand((pairs[0], 0.5), (pairs[1], 1), (pairs[2], -2)))
    beside = load_files(*arguments, merged=False)
    assert beside.blocks.self_attention.q.lora.rank == 4 + 2 + 1
    assert beside.blocks.ffn.fc_in.lora.rank == 4
    ours = official_velocity(beside)
    assert np.abs(ours - official_velocity(golden("official", "dit"))).max() > 0.1
    assert np.abs(official_velocity(merged) - ours).max() <= 1e-5 * max(1, np.abs(ours).max())


def test_bfloat16_weights_are_rounded_once(tmp_path):
    pairs = factors(dtype=ml_dtypes.bfloat16)
    path = write(tmp_path / "a.safetensors", official(pairs))
    dit = load_files(path, config=dataclasses.replace(CONFIG, param_dtype=jnp.bfloat16))
    wanted = merged_by_hand((pairs, 1))["blocks.ffn.fc_in.kernel"].astype(np.float32).astype(ml_dtypes.bfloat16)
    different = values(dit)["blocks.ffn.fc_in.kernel"] != wanted
    assert np.mean(different) < 1e-3  # where float32 and float64 lie on two sides of a rounding


def test_of_a_t2v_network(tmp_path):
    """Its layers are a part of ours; the patch embedding gets nothing for the image condition's channels."""
    rng = np.random.default_rng(4)
    pairs = factors(names=NAMES[:8] + NAMES[10:])
    down, up = rng.standard_normal((4, 16, 1, 2, 2)), rng.standard_normal((CONFIG.dim, 4, 1, 1, 1))
    key = "diffusion_model.patch_embedding"
    tensors = official(pairs) | {f"{key}.lora_down.weight": down.astype(np.float32)}
    path = write(tmp_path / "a.safetensors", tensors | {f"{key}.lora_up.weight": up.astype(np.float32)})
    wanted = merged_by_hand((pairs, 1))
    product = np.einsum("rcthw,or->thwco", down, up[..., 0, 0, 0])
    wanted["patch_embedding.kernel"][..., :16, :] += product
    assert_close_to(load_files(path), wanted, atol=1e-5)
    (file,) = lora.parse([path])
    line = lora.describe_adapters(file, CONFIG)
    assert line == f"{path} at 1: adapters of 31 layers; none for cross_attention.k_image, cross_attention.v_image"


@pytest.fixture(scope="module")
def made():
    """What PEFT and LyCORIS made of one layer, by method: tensors of a file; PEFT's settings and rows of the weight."""
    cases = {}
    with np.load(GOLDEN / "lora.npz") as file:
        for key, x in file.items():
            name, _, rest = key.partition("/")
            case = cases.setdefault(name, ({}, {}))
            case[rest in ("config", "merged")][rest] = x
    return cases


METHODS = ("peft-lora", "peft-rslora", "peft-dora", "peft-loha", "peft-lokr", "peft-lokr_both", "peft-lokr_full")
METHODS += ("lycoris-dora", "lycoris-dora_in", "lycoris-loha", "lycoris-lokr", "lycoris-lokr_dora", "lycoris-lokr_full")


@pytest.mark.parametrize("method", METHODS)
def test_methods_make_the_weights_of_peft_and_lycoris(made, method, tmp_path):
    tensors, told = made[method]
    path = write(tmp_path / "adapter_model.safetensors", tensors)
    if "config" in told:
        (tmp_path / "adapter_config.json").write_text(str(told["config"]))
    base = values(golden("official", "dit"))["blocks.ffn.fc_in.kernel"]
    whole = values(load_files(path))["blocks.ffn.fc_in.kernel"]
    rows = told["merged"]
    assert np.abs(whole[1].T[: len(rows)] - rows).max() <= 1e-5 * np.abs(rows).max()
    np.testing.assert_array_equal(whole[[0, 2]], base[[0, 2]])
    half = values(load_files(f"{path}:0.5", merged=False))
    if "blocks.ffn.fc_in.lora.a" not in half:  # what cannot stay beside: half of the way, also of a magnitude
        np.testing.assert_allclose(half["blocks.ffn.fc_in.kernel"][1], (base[1] + whole[1]) / 2, atol=2e-6)
    (file,) = lora.parse([path])
    assert "adapters of 1 layers; none for" in lora.describe_adapters(file, CONFIG)


def one(**parts):
    return {f"blocks.0.ffn.0.{name.replace('__', '.')}": x for name, x in parts.items()}


A, B = np.zeros((2, 128), np.float32), np.zeros((160, 2), np.float32)
REFUSED = {
    "empty": ({}, ["is empty", "flf2v network of 3 layers of width 128"]),
    "layer": ({"blocks.7.ffn.0.lora_A.weight": A, "blocks.7.ffn.0.lora_B.weight": B}, ["blocks.7.ffn.0.lora_A.weight"]),
    "key": (one(lora_A__weight=A, lora_B__weight=B, what__weight=A), ["1 tensor: blocks.0.ffn.0.what.weight"]),
    "half": (one(lora_A__weight=A), ["lacks 1 tensor: lora_B of blocks.0.ffn.0"]),
    "in": (one(lora_A__weight=A[:, 1:].copy(), lora_B__weight=B), ["given [2, 127], expected [2, 128]"]),
    "out": (one(lora_A__weight=A, lora_B__weight=B[1:].copy()), ["given [159, 2], expected [160, 2]"]),
    "rank": (one(lora_A__weight=A, lora_B__weight=B[:, 1:].copy()), ["given [160, 1], expected [160, 2]"]),
    "bias": (one(diff_b=np.zeros(128, np.float32)), ["given [128], expected [160]"]),
    "norm": ({"blocks.0.norm3.lora_A.weight": A, "blocks.0.norm3.lora_B.weight": B}, ["blocks.0.norm3.lora_A.weight"]),
    "no bias": ({"blocks.0.self_attn.norm_q.diff_b": A[0]}, ["blocks.0.self_attn.norm_q.diff_b"]),
    "twice": (one(lora_A__weight=A, lora_down__weight=A, lora_B__weight=B), ["both", "remove one"]),
    "magnitude": (one(lora_A__weight=A, lora_B__weight=B, dora_scale=A), ["dora_scale (given [2, 128], expected [160"]),
    "lokr": (one(lokr_w1=A, lokr_w2=B), ["lokr_w1 (given lokr_w1 [2, 128], lokr_w2 [160, 2], expected factors of"]),
    "half of lokr": (one(lokr_w1=A), ["lokr_w1 (given lokr_w1 [2, 128], expected factors of [160, 128])"]),
    "loha": (one(hada_w1_a=B, hada_w1_b=A, hada_w2_a=B, hada_w2_b=A[:1].copy()), ["hada_w1_a (given"]),
    "tucker": (one(lokr_w1=A, lokr_t2=B), ["lokr_t2; LoRA, DoRA, LoKr and LoHa are accepted, without Tucker's cores"]),
    "oft": (one(oft_blocks=A), ["oft_blocks; LoRA, DoRA, LoKr and LoHa are accepted"]),
}


@pytest.mark.parametrize(("tensors", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_files(tensors, words, tmp_path):
    path = write(tmp_path / "a.safetensors", tensors)
    refused(flags(OFFICIAL, lora=path, output=tmp_path / "v.npy"), ["a.safetensors", *words])


def test_bad_arguments(tmp_path):
    path = tmp_path / "a.safetensors"
    refused(flags(OFFICIAL, lora=path), ["a.safetensors", "nor a folder with pytorch_lora_weights.safetensors"])
    refused(flags(OFFICIAL, lora=tmp_path), ["is not a .safetensors file"])
    refused(flags(OFFICIAL, lora=f"{path}:much"), ["a.safetensors:much"])
    path.write_bytes(b"\0" * 20)
    refused(flags(OFFICIAL, lora=path), ["a.safetensors", "not a safetensors file"])
    write(path, official(factors()))
    for strength in ("nan", "1e308", "-inf"):
        refused(flags(OFFICIAL, lora=f"{path}:{strength}"), ["a strength from -1000 to 1000", f"{path}:1"])
    colon = write(tmp_path / "a:2.safetensors", official(factors()))
    assert lora.parse([colon])[0].strength == 1
    assert lora.parse([f"{colon}:2e-1"])[0].strength == 0.2
    write(path, official(factors()), {METADATA: "{"})
    refused(flags(OFFICIAL, lora=path), ["a.safetensors", "unreadable metadata"])


def test_exit_code_and_one_line():
    argv = flags(OFFICIAL, lora="nowhere.safetensors")
    run = subprocess.run([sys.executable, sample_jax.__file__, *argv], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: LoRA nowhere.safetensors")
    assert run.stderr.count("\n") == 1


def test_an_image_branch_is_left_out_where_there_is_none(tmp_path):
    """A much used recipe: Wan2.1-I2V's LoRA on Wan2.2-I2V, in every spelling; what else is unknown stays refused."""
    config = dataclasses.replace(CONFIG, image_dim=None, image_positions=0)
    for spelling, spell in SPELLINGS.items():
        path = write(tmp_path / "a.safetensors", spell(factors()))
        (file,) = lora.parse([path])
        assert len(file.terms(config)) == len(file.terms(CONFIG)) * 10 // 12, spelling
        left_out = 2 * config.num_layers
        assert f"left out: {left_out} layers of an image branch" in lora.describe_adapters(file, config)
        assert "left out" not in lora.describe_adapters(file, CONFIG)
    tensors = official(factors()) | {"diffusion_model.blocks.0.other.lora_A.weight": np.zeros((4, 4), np.float32)}
    with pytest.raises(InputError, match=r"1 tensor: .*other.lora_A.weight that the network has no place for"):
        lora.parse([write(tmp_path / "b.safetensors", tensors)])[0].terms(config)
