"""One network in the spellings and number formats that people have: read alike, or refused by its real name."""

import json
import shutil
import sys

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny import GOLDEN, OFFICIAL, assert_same_model, relative_error, values
from tiny_checkpoints import copy_checkpoint
from tiny_experts import SMALL

import wanjax
from wanjax.commands import convert as convert_command
from wanjax.errors import InputError
from wanjax.ops.quantized import matmul
from wanjax.weights import Checkpoint
from wanjax.weights import single as single_file
from wanjax.weights.stored import tensor_file

FP8 = ml_dtypes.float8_e4m3fn
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tensors():
    return safetensors.numpy.load_file(OFFICIAL / NAME)


@pytest.fixture(scope="module")
def plain():
    return load(Checkpoint(OFFICIAL))


def load(checkpoint, name="dit"):
    return checkpoint.load(name, checkpoint.config(name))


def single(tmp_path, tensors, metadata=None, name="dit.safetensors"):
    """A checkpoint of one file, with its config.json beside it: the tiny heads are not of 128 channels."""
    safetensors.numpy.save_file(tensors, tmp_path / name, metadata)
    shutil.copyfile(OFFICIAL / "config.json", tmp_path / "config.json")
    return Checkpoint(None, {"dit": tmp_path / name})


def is_matrix(key, x):
    return x.ndim == 2 and key.startswith("blocks.") and key.endswith("weight")


def scaled(tensors, dtype=FP8, per_channel=False, name="scale_weight", layers=None):
    """As other programs write 8 bits, and what they mean by it."""
    stored, meant = {}, {}
    for key, x in tensors.items():
        stored[key] = meant[key] = x
        if is_matrix(key, x) and (layers is None or any(part in key for part in layers)):
            top = 127.0 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
            scale = np.abs(x).max(axis=1, keepdims=True) if per_channel else np.abs(x).max()
            scale = np.float32(scale / top)
            q = x / scale
            stored[key] = (np.round(q) if dtype == np.int8 else q).astype(dtype)
            stored[f"{key.removesuffix('weight')}{name}"] = np.asarray(scale, np.float32)
            meant[key] = stored[key].astype(np.float32) * scale
    return stored, meant


def dequantised(model):
    """Parameters by path, kernels multiplied with their scales."""
    arrays = values(model)
    for path in [path for path in arrays if path.endswith("kernel_scale")]:
        scale = arrays.pop(path)
        kernel = path.removesuffix("_scale")
        arrays[kernel] = arrays[kernel].astype(np.float32) * (
            scale[:, None, None] if scale.ndim == 1 else scale[:, None]
        )
    return arrays


def assert_means(checkpoint, meant, tmp_path):
    """The checkpoint's weights are those tensors."""
    (tmp_path / "meant").mkdir()
    expected = values(load(single(tmp_path / "meant", meant)))
    ours = dequantised(load(checkpoint))
    assert ours.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(ours[path].astype(np.float32), x, rtol=1e-6, atol=1e-9, err_msg=path)


# ----------------------------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net."])
def test_prefixes(tmp_path, tensors, plain, prefix):
    checkpoint = single(tmp_path, {prefix + key: x for key, x in tensors.items()})
    assert checkpoint.config("dit").task == "flf2v"
    assert_same_model(load(checkpoint), plain)


@pytest.mark.parametrize("network", ["dit", "vae", "umt5", "clip"])
@pytest.mark.parametrize("layout", ["diffusers", "official"])
def test_every_network_in_one_file(tmp_path, layout, network):
    """Told from names and shapes: neither the file's name nor its folder says anything."""
    folder = Checkpoint(GOLDEN / layout)
    (source,) = folder.weights(network).files
    path = shutil.copyfile(source.path, tmp_path / "some.safetensors")
    if (source.path.parent / "config.json").is_file():
        shutil.copyfile(source.path.parent / "config.json", tmp_path / "config.json")
    checkpoint = Checkpoint(None, {network: path})
    assert checkpoint.layout_of(network) == layout
    if network == "clip":
        assert checkpoint.config(network).num_layers == folder.config(network).num_layers
    else:
        config = checkpoint.config(network)
        assert config == folder.config(network) or network == "dit"  # eps and text_len of a tiny one
        assert_same_model(load(checkpoint, network), load(folder, network))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants(tmp_path, variant):
    folder = copy_checkpoint("diffusers", tmp_path / "c")
    (folder / "transformer" / NAME).rename(folder / "transformer" / f"diffusion_pytorch_model.{variant}.safetensors")
    assert_same_model(load(Checkpoint(folder)), load(Checkpoint(GOLDEN / "diffusers")))


def test_parts_from_files_run(tmp_path):
    """A whole run whose DiT and VAE are files, as the folder's own."""
    folder = copy_checkpoint("diffusers", tmp_path / "c")
    shutil.copytree(folder / "transformer", tmp_path / "t")
    run = SMALL | {"first_frame": "docs/pictures/first.png", "last_frame": "docs/pictures/last.png", "steps": 1}
    kept = {"dtype": "float32", "compile_cache": "off"}
    whole = wanjax.Pipeline.from_pretrained(str(folder), **kept)(**run, decode=False)
    files = {"vae": str(GOLDEN / "diffusers/vae" / NAME), "dit": str(tmp_path / "t" / NAME)}
    shutil.rmtree(folder / "transformer")
    shutil.rmtree(folder / "vae")
    tokenizer = shutil.move(folder / "tokenizer/tokenizer.json", tmp_path / "words.json")
    parts = wanjax.Pipeline.from_pretrained(str(folder), **kept, **files, tokenizer=str(tokenizer))(**run, decode=False)
    np.testing.assert_array_equal(parts.latents, whole.latents)


def test_two_experts_from_files(tmp_path):
    source = GOLDEN / "a14b_flf2v"
    files = {"dit": source / "transformer" / NAME, "dit_low": source / "transformer_2" / NAME}
    checkpoint = Checkpoint(None, files)
    assert (checkpoint.experts, checkpoint.boundary, checkpoint.config("dit_low").task) == (2, 0.9, "i2v")
    with pytest.raises(InputError, match=r"--dit-low .* without its expert for high noise; give that too, as --dit"):
        Checkpoint(None, {"dit_low": files["dit_low"]})


def test_convert_takes_files(tmp_path):
    source = GOLDEN / "diffusers"
    parts = {"dit": "transformer", "vae": "vae"}
    argv = [str(tmp_path / "out"), "--layout", "official", "--no-pth"]
    argv += [x for name, part in parts.items() for x in (f"--{name}", str(source / part / NAME))]
    convert_command.main([*argv, "--tokenizer", str(source / "tokenizer/tokenizer.json")])
    written = Checkpoint(tmp_path / "out")
    assert written.layout == "official"
    assert (tmp_path / "out/google/umt5-xxl/tokenizer.json").is_file()
    assert_same_model(load(written), load(Checkpoint(source)))
    with pytest.raises(InputError, match="nothing to convert"):
        convert_command.main([str(tmp_path / "none"), "--layout", "official"])


# -------------------------------------------------------------------------------------------------------------- 8 bits


@pytest.mark.parametrize(
    ("dtype", "per_channel", "name", "kept"),
    [
        (FP8, False, "scale_weight", "fp8"),
        (FP8, True, "weight_scale", "fp8"),
        (np.int8, True, "weight_scale", "int8"),
        (np.int8, False, "weight_scale", "int8"),
        (ml_dtypes.float8_e5m2, False, "scale_weight", "off"),
    ],
)
def test_scaled_8_bits(tmp_path, tensors, dtype, per_channel, name, kept):
    """What the blocks can multiply as it is stays in 8 bits; the rest is multiplied out."""
    stored, meant = scaled(tensors, dtype, per_channel, name)
    checkpoint = single(tmp_path, stored | {"scaled_fp8": np.zeros(2, FP8)} if name == "scale_weight" else stored)
    config = checkpoint.config("dit")
    assert (config.quantize, config.channel_scales) == (kept, per_channel and kept != "off")
    assert_means(checkpoint, meant, tmp_path)


def test_some_layers_in_8_bits_are_multiplied_out(tmp_path, tensors):
    stored, meant = scaled(tensors, layers=("self_attn",))
    checkpoint = single(tmp_path, stored)
    assert checkpoint.config("dit").quantize == "off"
    assert_means(checkpoint, meant, tmp_path)


def test_the_newer_markers(tmp_path, tensors):
    stored, meant = scaled(tensors, name="weight_scale")
    layers = [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]
    said = {"format": "float8_e4m3fn"}
    marks = {f"{layer}.comfy_quant": np.frombuffer(json.dumps(said).encode(), np.uint8) for layer in layers}
    marks |= {f"{layers[0]}.input_scale": np.ones(1, np.float32)}
    prefixed = {f"model.diffusion_model.{key}": x for key, x in (stored | marks).items()}
    assert_means(single(tmp_path, prefixed), meant, tmp_path)
    metadata = {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(layers, said)})}
    assert single(tmp_path, stored, metadata).config("dit").quantize == "fp8"


def test_plain_fp8_is_cast(tmp_path, tensors):
    cast = {key: x.astype(FP8) if is_matrix(key, x) else x for key, x in tensors.items()}
    checkpoint = single(tmp_path, cast)
    assert checkpoint.config("dit").quantize == "off"
    assert_means(checkpoint, {key: x.astype(np.float32) for key, x in cast.items()}, tmp_path)


def test_umt5_in_scaled_8_bits(tmp_path):
    source = safetensors.numpy.load_file(GOLDEN / "diffusers/text_encoder/model.safetensors")
    stored, meant = dict(source), dict(source)
    for key, x in source.items():
        if x.ndim == 2 and "block" in key and "bias" not in key:
            scale = np.float32(np.abs(x).max() / 448)
            stored[key] = (x / scale).astype(FP8)
            stored[key.replace("weight", "scale_weight")] = np.asarray(scale)
            meant[key] = stored[key].astype(np.float32) * scale
    marks = {"scaled_fp8": np.zeros(0, FP8), "spiece_model": np.zeros(9, np.uint8)}
    for name, content in (("a", stored | marks), ("b", meant)):
        safetensors.numpy.save_file(content, tmp_path / f"{name}.safetensors")
    a, b = (load(Checkpoint(None, {"umt5": tmp_path / f"{name}.safetensors"}), "umt5") for name in "ab")
    assert_same_model(a, b)


@pytest.mark.parametrize("per_channel", [False, True])
def test_products_stay_in_8_bits(per_channel):
    """The compiled program multiplies int8 by int8, whatever scales there are; the scales come after."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((6, 32), np.float32), rng.integers(-127, 128, (32, 16)).astype(np.int8)
    scale = rng.random(16).astype(np.float32) + 0.5 if per_channel else np.float32(0.7)
    text = jax.jit(matmul).lower(x, kernel, scale).as_text()
    assert "(tensor<6x32xi8>, tensor<32x16xi8>)" in text
    row = np.abs(x).max(1, keepdims=True) / 127
    expected = np.round(x / row) @ kernel.astype(np.float32) * row * scale
    np.testing.assert_allclose(matmul(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(scale)), expected, rtol=1e-5)


def test_int8_per_channel_runs(tmp_path, tensors):
    """A whole run close to the exact one; on several devices too."""
    stored, _ = scaled(tensors, np.int8, True, "weight_scale")
    folder = copy_checkpoint("official", tmp_path / "c")
    (folder / NAME).unlink()
    run = {**SMALL, "first_frame": "docs/pictures/first.png", "last_frame": "docs/pictures/last.png", "steps": 2}
    safetensors.numpy.save_file(stored, folder / NAME)
    results = [
        wanjax.Pipeline.from_pretrained(str(path), dtype="float32", compile_cache="off", mesh=mesh)(
            **run, decode=False
        ).latents
        for path, mesh in ((OFFICIAL, None), (folder, None), (folder, "fsdp=2,data=1,ring=1,ulysses=4"))
    ]
    exact, one, eight = results
    for latents in (one, eight):  # each rounds what lies between two numbers as its own sums come out
        assert 0 < relative_error(latents, exact) < 0.05


# ------------------------------------------------------------------------------------------------------------- refusals


REFUSED = {
    "a scale is missing": (
        lambda t: drop(scaled(t)[0], "blocks.0.ffn.0.scale_weight"), "1 weight: blocks.0.ffn.0.weight"
    ),
    "the marker alone": (
        lambda t: {k: x.astype(FP8) if is_matrix(k, x) else x for k, x in t.items()} | {"scaled_fp8": np.zeros(0, FP8)},
        "without the scale that it promises",
    ),
    "a scale of nothing": (lambda t: t | {"blocks.0.nothing.scale_weight": np.ones(1, np.float32)}, "of no weight"),
    "blocks": (
        lambda t: scaled(t)[0] | {"blocks.0.ffn.0.scale_weight": np.ones((2, 4), np.float32)},
        "weights with a scale per block; accepted: float32",
    ),
    "nvfp4": (
        lambda t: t | {"a.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8)}, "scaled nvfp4 weights; acc"
    ),
    "convrot": (
        lambda t: t | {"a.comfy_quant": np.frombuffer(b'{"format": "int8_tensorwise", "convrot": true}', np.uint8)},
        "scaled int8_tensorwise with convrot weights",
    ),
    "damaged": (lambda t: t | {"a.comfy_quant": np.frombuffer(b"{", np.uint8)}, "says its formats in an unknown way"),
    "bitsandbytes": (lambda t: t | {"a.absmax": np.ones(1, np.float32)}, "scaled bitsandbytes weights"),
    "turbodiffusion": (lambda t: t | {"a.int8_weight": np.zeros(2, np.int8)}, "int8 per block"),
    "VACE": (lambda t: t | {"vace_patch_embedding.weight": np.ones(1, np.float32)}, "is a VACE network"),
    "another network": (lambda t: {"a": np.ones(1, np.float32)}, "is none of Wan's networks"),
}  # fmt: skip


def drop(tensors, key):
    return {k: x for k, x in tensors.items() if k != key}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_its_real_name(tmp_path, tensors, change, words):
    with pytest.raises(InputError, match=words) as caught:
        single(tmp_path, change(tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dim", "heads"), [(1536, 12), (3072, 24), (5120, 40)])
def test_heads_of_the_published_sizes(dim, heads, tmp_path):
    """No tensor says them: 1.3B, 5B and 14B have heads of 128 channels; what stands beside counts over that."""
    assert single_file.heads(dim, {}, "num_heads", tmp_path) == heads
    assert single_file.heads(dim, {"num_heads": 8, "dim": dim}, "num_heads", tmp_path) == 8


def test_another_file_than_the_flag_says(tmp_path):
    with pytest.raises(InputError, match=r"--vae .* is a DiT, as its tensors say; give a VAE's file"):
        Checkpoint(None, {"vae": OFFICIAL / NAME})
    with pytest.raises(InputError, match=r"--text-encoder nothing is no file"):
        Checkpoint(None, {"umt5": "nothing"})
    shutil.copyfile(GOLDEN / "diffusers/transformer" / NAME, tmp_path / NAME)
    with pytest.raises(InputError, match=r"wide, which heads of 128 do not fill; put its config.json beside it"):
        Checkpoint(None, {"dit": tmp_path / NAME}).config("dit")
    with pytest.raises(InputError, match=r"no vae is given; give a checkpoint that has it, or its file as --vae"):
        Checkpoint(None, {"dit": OFFICIAL / NAME}).config("vae")


# ---------------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path, tensors, kind, arch="wan"):
    """As city96's converter: matrices quantised, the rest in float32, five axes as one and their shape beside."""
    writer, meant = gguf.GGUFWriter(path, arch), {}
    for key, x in tensors.items():
        block = gguf.GGML_QUANT_SIZES[kind][0]
        used = kind if x.ndim == 2 and x.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32
        if x.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(x.shape))
        flat = x.reshape(len(x), -1) if x.ndim > 4 else x
        data = gguf.quants.quantize(np.ascontiguousarray(flat, np.float32), used)
        meant[key] = gguf.quants.dequantize(data, used).reshape(x.shape)
        writer.add_tensor(key, data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "F16", "BF16"])
def test_gguf(tmp_path, tensors, kind):
    meant = write_gguf(tmp_path / "dit.gguf", tensors, gguf.GGMLQuantizationType[kind])
    shutil.copyfile(OFFICIAL / "config.json", tmp_path / "config.json")
    assert_means(Checkpoint(None, {"dit": tmp_path / "dit.gguf"}), meant, tmp_path)


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K", "Q4_K"])
def test_gguf_super_blocks(tmp_path, kind):
    """Their numbers are the package's own: rows of 256, any bytes."""
    used, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    data = rng.integers(0, 60, (4, gguf.GGML_QUANT_SIZES[used][1] * 2), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    writer.add_tensor("a.weight", data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tensor_file(tmp_path / "x.gguf")
    assert file.infos["a.weight"].shape == (4, 512)
    with file.open() as reader:
        np.testing.assert_array_equal(reader.view("a.weight"), gguf.quants.dequantize(data, used))


def test_gguf_of_umt5(tmp_path):
    names = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    parts = {
        "layer.0.layer_norm": "attn_norm",
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        **{f"layer.0.SelfAttention.{x}": f"attn_{x}" for x in "qkvo"},
        "layer.1.layer_norm": "ffn_norm",
        "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up",
        "layer.1.DenseReluDense.wo": "ffn_down",
    }
    for i in range(9):
        names |= {f"encoder.block.{i}.{k}.weight": f"enc.blk.{i}.{v}.weight" for k, v in parts.items()}
    source = safetensors.numpy.load_file(GOLDEN / "diffusers/text_encoder/model.safetensors")
    tensors = {names[key]: x for key, x in source.items() if key != "encoder.embed_tokens.weight"}
    write_gguf(tmp_path / "t5.gguf", tensors, gguf.GGMLQuantizationType.F32, "t5encoder")
    ours = load(Checkpoint(None, {"umt5": tmp_path / "t5.gguf"}), "umt5")
    assert_same_model(ours, load(Checkpoint(GOLDEN / "diffusers"), "umt5"))


def test_bad_gguf(tmp_path, tensors, monkeypatch):
    write_gguf(tmp_path / "a.gguf", tensors, gguf.GGMLQuantizationType.F32, "flux")
    with pytest.raises(InputError, match="is a GGUF of a flux network; accepted: wan"):
        Checkpoint(None, {"dit": tmp_path / "a.gguf"})
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(InputError, match="is no GGUF file or is damaged"):
        Checkpoint(None, {"dit": tmp_path / "b.gguf"})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'wanjax\[gguf\]'"):
        Checkpoint(None, {"dit": tmp_path / "a.gguf"})
