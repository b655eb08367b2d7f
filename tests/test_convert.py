"""Reading checkpoints: every tensor at its place, every spelling of the releases, every refusal by name."""

import contextlib
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from wanjax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from wanjax.convert import Checkpoint
from wanjax.convert import load as load_module
from wanjax.convert.layouts import NETWORKS
from wanjax.convert.load import abstract_model, parameter_shapes, parameters
from wanjax.convert.mapping import Table, expand, weight
from wanjax.convert.tensors import TensorInfo, copy
from wanjax.convert.write import write_tensors
from wanjax.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = ("diffusers", "official")
DIT = {"diffusers": "transformer/diffusion_pytorch_model", "official": "diffusion_pytorch_model"}
VAE = {"diffusers": "vae/diffusion_pytorch_model", "official": "Wan2.1_VAE"}
UMT5 = {"diffusers": "text_encoder/model", "official": "models_t5_umt5-xxl-enc-bf16"}
CLIP = {
    "diffusers": "image_encoder/model",
    "official": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}
STEMS = {"dit": DIT, "vae": VAE, "umt5": UMT5, "clip": CLIP}


def copy_checkpoint(name, folder):
    """A writable copy of a golden checkpoint without its pictures and arrays."""
    for file in (GOLDEN / name).rglob("*"):
        if file.is_file() and file.suffix in (".json", ".safetensors") and file.name != "case.json":
            place = folder / file.relative_to(GOLDEN / name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    return folder


def edit(path, change):
    """Rewrites a file of tensors after `change` did what it likes to the dict of them."""
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def edit_json(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def raw(layout, network):
    return safetensors.numpy.load_file(GOLDEN / layout / f"{STEMS[network][layout]}.safetensors")


def values(model):
    return {path: np.asarray(leaf[...]) for path, leaf in parameters(model).items()}


def assert_same_model(a, b):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def load(folder, network):
    checkpoint = Checkpoint(folder)
    return checkpoint.load(network, checkpoint.config(network))


@functools.cache
def golden(layout, network):
    """The golden network in float32, loaded once."""
    return load(GOLDEN / layout, network)


def shard(path, size):
    """Splits a file of tensors into shards and an index, as the large releases are."""
    tensors = safetensors.numpy.load_file(path)
    infos = {key: TensorInfo(x.shape, x.dtype) for key, x in tensors.items()}
    write_tensors(
        path.parent, path.name.removesuffix(".safetensors"), infos, tensors.__getitem__, size, lambda *_: None
    )
    path.unlink()
    return path.with_name(path.name + ".index.json")


# ---- every tensor at its place


# What a parameter is made of; those that no output shows (two biases that are added, the last CLIP block) among them.
PLACES = {
    ("dit", "diffusers"): {
        "patch_embedding.kernel": lambda t: t["patch_embedding.weight"].transpose(2, 3, 4, 1, 0),
        "text_embedding.fc_in.kernel": lambda t: t["condition_embedder.text_embedder.linear_1.weight"].T,
        "time_projection.bias": lambda t: t["condition_embedder.time_proj.bias"],
        "image_embedding.positions": lambda t: t["condition_embedder.image_embedder.pos_embed"][0],
        "blocks.self_attention.q.kernel": lambda t: layers(t, "blocks.{}.attn1.to_q.weight", 2).swapaxes(1, 2),
        "blocks.norm_cross.scale": lambda t: layers(t, "blocks.{}.norm2.weight", 2),
        "blocks.cross_attention.v.bias": lambda t: layers(t, "blocks.{}.attn2.to_v.bias", 2),
        "blocks.cross_attention.v_image.bias": lambda t: layers(t, "blocks.{}.attn2.add_v_proj.bias", 2),
        "blocks.ffn.fc_out.kernel": lambda t: layers(t, "blocks.{}.ffn.net.2.weight", 2).swapaxes(1, 2),
        "blocks.modulation": lambda t: layers(t, "blocks.{}.scale_shift_table", 2)[:, 0],
        "head.modulation": lambda t: t["scale_shift_table"][0],
        "head.linear.kernel": lambda t: t["proj_out.weight"].T,
    },
    ("dit", "official"): {
        "image_embedding.positions": lambda t: t["img_emb.emb_pos"][0],
        "blocks.cross_attention.v.bias": lambda t: layers(t, "blocks.{}.cross_attn.v.bias", 3),
        "blocks.cross_attention.v_image.bias": lambda t: layers(t, "blocks.{}.cross_attn.v_img.bias", 3),
        "blocks.modulation": lambda t: layers(t, "blocks.{}.modulation", 3)[:, 0],
        "head.linear.bias": lambda t: t["head.head.bias"],
    },
    ("vae", "diffusers"): {
        "encoder.blocks.3.shortcut.bias": lambda t: t["encoder.down_blocks.3.conv_shortcut.bias"],
        "encoder.blocks.3.conv2.bias": lambda t: t["encoder.down_blocks.3.conv2.bias"],
        "encoder.mid.attention.qkv.kernel": lambda t: t["encoder.mid_block.attentions.0.to_qkv.weight"][:, :, 0, 0].T,
        "decoder.blocks.3.conv.kernel": lambda t: t["decoder.up_blocks.0.upsamplers.0.resample.1.weight"].transpose(
            2, 3, 1, 0
        ),
        "decoder.blocks.4.norm1.scale": lambda t: t["decoder.up_blocks.1.resnets.0.norm1.gamma"][:, 0, 0, 0],
        "decoder.blocks.14.conv1.kernel": lambda t: t["decoder.up_blocks.3.resnets.2.conv1.weight"].transpose(
            2, 3, 4, 1, 0
        ),
        "quant_conv.kernel": lambda t: t["quant_conv.weight"].transpose(2, 3, 4, 1, 0),
    },
    ("vae", "official"): {
        "encoder.blocks.3.shortcut.bias": lambda t: t["encoder.downsamples.3.shortcut.bias"],
        "encoder.blocks.3.conv2.bias": lambda t: t["encoder.downsamples.3.residual.6.bias"],
        "encoder.blocks.5.time_conv.bias": lambda t: t["encoder.downsamples.5.time_conv.bias"],
        "quant_conv.bias": lambda t: t["conv1.bias"],
        "post_quant_conv.bias": lambda t: t["conv2.bias"],
        "decoder.norm_out.scale": lambda t: t["decoder.head.0.gamma"][:, 0, 0, 0],
    },
    ("umt5", "diffusers"): {
        "embedding": lambda t: t["shared.weight"],
        "blocks.attention.relative_bias": lambda t: layers(
            t, "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight", 2
        ),
        "blocks.ffn.gate.kernel": lambda t: layers(
            t, "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight", 2
        ).swapaxes(1, 2),
    },
    ("umt5", "official"): {
        "norm_out.scale": lambda t: t["norm.weight"],
        "blocks.ffn.gate.kernel": lambda t: layers(t, "blocks.{}.ffn.gate.0.weight", 2).swapaxes(1, 2),
        "blocks.ffn.up.kernel": lambda t: layers(t, "blocks.{}.ffn.fc1.weight", 2).swapaxes(1, 2),
    },
    ("clip", "diffusers"): {
        "position_embedding": lambda t: t["embeddings.position_embedding.weight"],
        "blocks.mlp.fc_out.bias": lambda t: layers(t, "encoder.layers.{}.mlp.fc2.bias", 3),
        "norm_post.bias": lambda t: t["post_layernorm.bias"],
    },
    ("clip", "official"): {
        "class_embedding": lambda t: t["visual.cls_embedding"][0, 0],
        "position_embedding": lambda t: t["visual.pos_embedding"][0],
        "blocks.attention.q.bias": lambda t: layers(t, "visual.transformer.{}.attn.to_qkv.bias", 3)[:, :64],
        "blocks.attention.k.kernel": lambda t: layers(t, "visual.transformer.{}.attn.to_qkv.weight", 3)[
            :, 64:128
        ].swapaxes(1, 2),
        "blocks.attention.v.bias": lambda t: layers(t, "visual.transformer.{}.attn.to_qkv.bias", 3)[:, 128:],
        "norm_post.scale": lambda t: t["visual.post_norm.weight"],
    },
}


def layers(tensors, key, count):
    return np.stack([tensors[key.format(i)] for i in range(count)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_tensors_are_at_their_places(network, layout):
    loaded, tensors = values(golden(layout, network)), raw(layout, network)
    for path, expected in PLACES[network, layout].items():
        np.testing.assert_array_equal(loaded[path], expected(tensors).astype(np.float32), err_msg=path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_dtypes_are_those_of_the_configuration(network, layout):
    """Large weights in param_dtype, cast once; norms, modulation and positions stay float32."""
    checkpoint = Checkpoint(GOLDEN / layout)
    wide = values(golden(layout, network))
    config = checkpoint.config(network, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = checkpoint.load(network, config)
    abstract = parameters(abstract_model(network, config))
    for path, value in values(model).items():
        assert value.dtype == abstract[path].dtype, path
        np.testing.assert_array_equal(value, wide[path].astype(value.dtype), err_msg=path)
    dtypes = {path: value.dtype for path, value in values(model).items()}
    assert all(dtype == np.float32 for path, dtype in dtypes.items() if path.endswith((".scale", "modulation")))
    assert ml_dtypes.bfloat16 in dtypes.values()


def test_sizes_of_the_diffusers_layout():
    checkpoint = Checkpoint(GOLDEN / "diffusers")
    settings = json.loads((GOLDEN / "diffusers/vae/config.json").read_text())
    assert checkpoint.layout == "diffusers"
    assert checkpoint.flow_shift == 5.0
    assert checkpoint.tokenizer_dir == GOLDEN / "diffusers/tokenizer"
    assert checkpoint.config("dit") == DiTConfig(
        dim=64, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32, text_dim=32, image_dim=40, image_positions=10
    )
    assert checkpoint.config("vae") == VAEConfig(
        dim=4, latents_mean=tuple(settings["latents_mean"]), latents_std=tuple(settings["latents_std"])
    )
    assert checkpoint.config("umt5") == UMT5Config(128, 32, 80, 4, 12, 2)
    assert checkpoint.config("clip", param_dtype=jnp.bfloat16) == CLIPConfig(
        28, 14, 40, 72, 4, 3, param_dtype=jnp.bfloat16
    )


def test_sizes_of_the_official_layout():
    """From the shapes, but for the 16 heads of CLIP and the VAE's statistics, which the official code has inside."""
    checkpoint = Checkpoint(GOLDEN / "official")
    assert checkpoint.layout == "official"
    assert checkpoint.flow_shift is None
    assert checkpoint.tokenizer_dir == GOLDEN / "official/google/umt5-xxl"
    assert checkpoint.config("dit") == DiTConfig(
        dim=128, ffn_dim=160, num_heads=4, num_layers=3, freq_dim=64, text_dim=64, image_dim=64, image_positions=20
    )
    assert checkpoint.config("vae") == VAEConfig(dim=8)
    assert checkpoint.config("umt5") == UMT5Config(384, 64, 96, 4, 12, 2)
    assert checkpoint.config("clip") == CLIPConfig(42, 14, 64, 128, 16, 3)


# ---- the shapes of releases


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", ["dit", "umt5"])
def test_shards_are_one_checkpoint(network, layout, tmp_path):
    copy_checkpoint(layout, tmp_path)
    index = shard(tmp_path / f"{STEMS[network][layout]}.safetensors", 80_000)
    assert len(set(json.loads(index.read_text())["weight_map"].values())) >= 2
    assert_same_model(load(tmp_path, network), golden(layout, network))


def test_text_encoder_with_both_names_of_the_embedding(tmp_path):
    folder = copy_checkpoint("diffusers", tmp_path)

    def repeat(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()

    edit(folder / "text_encoder/model.safetensors", repeat)
    shard(folder / "text_encoder/model.safetensors", 50_000)
    assert_same_model(load(folder, "umt5"), golden("diffusers", "umt5"))


def test_text_encoder_with_the_second_name_only(tmp_path):
    folder = copy_checkpoint("diffusers", tmp_path)

    def rename(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    edit(folder / "text_encoder/model.safetensors", rename)
    assert_same_model(load(folder, "umt5"), golden("diffusers", "umt5"))


def spell_as_published(tensors):
    for key in list(tensors):
        tensors[f"vision_model.{key}"] = tensors.pop(key)
    tensors["vision_model.embeddings.position_ids"] = np.arange(5, dtype=np.int64)[None]


def test_image_encoder_as_published(tmp_path):
    folder = copy_checkpoint("diffusers", tmp_path)
    edit(folder / "image_encoder/model.safetensors", spell_as_published)
    assert_same_model(load(folder, "clip"), golden("diffusers", "clip"))


def test_twin_is_taken_before_the_pth(tmp_path):
    folder = copy_checkpoint("official", tmp_path)
    (folder / "Wan2.1_VAE.pth").write_bytes(b"not looked at")
    assert_same_model(load(folder, "vae"), golden("official", "vae"))


def make_i2v(layout, folder):
    """A checkpoint with an image branch without positions."""
    copy_checkpoint(layout, folder)
    key = {"diffusers": "condition_embedder.image_embedder.pos_embed", "official": "img_emb.emb_pos"}[layout]
    edit(folder / f"{DIT[layout]}.safetensors", lambda tensors: tensors.pop(key))
    if layout == "diffusers":
        edit_json(folder / "transformer/config.json", pos_embed_seq_len=None)
    else:
        edit_json(folder / "config.json", model_type="i2v")
    return folder


def make_t2v(layout, folder):
    """A checkpoint without image encoder and image branch."""
    copy_checkpoint(layout, folder)
    branch = ("add_k_proj", "add_v_proj", "norm_added_k", "image_embedder", "k_img", "v_img", "img_emb")

    def cut(tensors):
        for key in [key for key in tensors if any(part in key for part in branch)]:
            del tensors[key]
        tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"][:, :16].copy()

    edit(folder / f"{DIT[layout]}.safetensors", cut)
    (folder / f"{CLIP[layout]}.safetensors").unlink()
    if layout == "diffusers":
        shutil.rmtree(folder / "image_encoder")
        shutil.rmtree(folder / "image_processor")
        entries = {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None, "in_channels": 16}
        edit_json(folder / "transformer/config.json", **entries)
    else:
        edit_json(folder / "config.json", model_type="t2v", in_dim=16)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_t2v(layout, tmp_path):
    checkpoint = Checkpoint(make_t2v(layout, tmp_path))
    config = checkpoint.config("dit")
    assert (config.task, config.in_channels) == ("t2v", 16)
    assert not checkpoint.has("clip")
    model = checkpoint.load("dit", config)
    assert model.image_embedding is None
    assert model.blocks.cross_attention.k_image is None
    full = values(golden(layout, "dit"))
    for path, value in values(model).items():
        np.testing.assert_array_equal(
            value, full[path][..., :16, :] if path == "patch_embedding.kernel" else full[path]
        )


def test_t2v_transformer_alone():
    checkpoint = Checkpoint(GOLDEN / "diffusers_t2v")
    assert [network for network in NETWORKS if checkpoint.has(network)] == ["dit"]
    assert checkpoint.config("dit").task == "t2v"
    assert checkpoint.load("dit", checkpoint.config("dit")).image_embedding is None
    with pytest.raises(InputError, match="has no clip"):
        checkpoint.config("clip")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_i2v(layout, tmp_path):
    checkpoint = Checkpoint(make_i2v(layout, tmp_path))
    config = checkpoint.config("dit")
    assert config.task == "i2v"
    model = checkpoint.load("dit", config)
    assert model.image_embedding.positions is None
    full = values(golden(layout, "dit"))
    assert full.keys() - values(model).keys() == {"image_embedding.positions"}


PUBLISHED = {
    ("dit", "diffusers"): (DiTConfig(), 1304, {"blocks.39.attn2.add_k_proj.weight": (5120, 5120)}),
    ("dit", "official"): (
        DiTConfig(),
        1304,
        {"blocks.0.ffn.0.weight": (13824, 5120), "img_emb.emb_pos": (1, 514, 1280)},
    ),
    ("vae", "diffusers"): (
        VAEConfig(),
        194,
        {"decoder.up_blocks.1.upsamplers.0.time_conv.weight": (768, 384, 3, 1, 1)},
    ),
    ("vae", "official"): (VAEConfig(), 194, {"encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1)}),
    ("umt5", "diffusers"): (UMT5Config(), 242, {"encoder.block.23.layer.1.DenseReluDense.wo.weight": (4096, 10240)}),
    ("umt5", "official"): (UMT5Config(), 242, {"blocks.23.pos_embedding.embedding.weight": (32, 64)}),
    ("clip", "diffusers"): (CLIPConfig(), 519, {"encoder.layers.31.self_attn.k_proj.weight": (1280, 1280)}),
    ("clip", "official"): (CLIPConfig(), 391, {"visual.transformer.31.attn.to_qkv.weight": (3840, 1280)}),
}


@pytest.mark.parametrize(("network", "layout"), PUBLISHED)
def test_tables_fit_the_published_sizes(network, layout):
    config, count, shapes = PUBLISHED[network, layout]
    entries = expand(NETWORKS[network].tables[layout], parameter_shapes(network, config), config)
    assert len(entries) == count
    for key, shape in shapes.items():
        assert entries[key].shape == shape


def test_table_that_leaves_a_parameter_out_is_found():
    with pytest.raises(AssertionError, match="not filled exactly once"):
        expand(Table(weight("a", "a")), {"a": (2,), "b": (3,)}, None)


def test_table_that_fills_a_parameter_twice_is_found():
    with pytest.raises(AssertionError, match="not filled exactly once"):
        expand(Table((*weight("a", "a"), *weight("b", "a"))), {"a": (2,)}, None)


# ---- what is refused

KEYS = {
    "diffusers": ("blocks.1.attn1.to_q.weight", "blocks.0.ffn.net.2.bias", "proj_out.bias"),
    "official": ("blocks.1.self_attn.q.weight", "blocks.2.ffn.2.bias", "head.head.bias"),
}


def refused(folder, network, match):
    with pytest.raises(InputError, match=match) as caught:
        load(folder, network)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestKeys:
    def test_missing(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT[layout]}.safetensors"
        edit(file, lambda tensors: [tensors.pop(key) for key in KEYS[layout]])
        message = refused(tmp_path, "dit", "lacks 3 tensors")
        assert str(file) in message
        assert all(key in message for key in KEYS[layout])

    def test_unknown(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT[layout]}.safetensors"
        edit(file, lambda tensors: tensors.update({"blocks.3.extra.weight": np.zeros(3, np.float32)}))
        assert str(file) in refused(tmp_path, "dit", r"has 1 unknown tensor: blocks\.3\.extra\.weight;")

    def test_renamed(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT[layout]}.safetensors"
        key = KEYS[layout][0]
        edit(file, lambda tensors: tensors.update({f"{key}s": tensors.pop(key)}))
        refused(tmp_path, "dit", rf"has 1 unknown tensor: {key}s and lacks 1 tensor: {key};")

    def test_many_are_counted(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT[layout]}.safetensors"
        edit(file, lambda tensors: tensors.update({f"zz.{i}": np.zeros(3, np.float32) for i in range(40)}))
        assert len(refused(tmp_path, "dit", "has 40 unknown tensors: .* and 35 more")) < 400

    def test_misshapen(self, layout, tmp_path):
        """A transposed tensor of the right size is misshapen too."""
        file = copy_checkpoint(layout, tmp_path) / f"{DIT[layout]}.safetensors"
        key, given, expected = {
            "diffusers": ("blocks.1.ffn.net.2.weight", r"\[96, 64\]", r"\[64, 96\]"),
            "official": ("blocks.1.ffn.2.weight", r"\[160, 128\]", r"\[128, 160\]"),
        }[layout]
        edit(file, lambda tensors: tensors.update({key: tensors[key].T.copy()}))
        message = refused(tmp_path, "dit", f"given {given}, expected {expected}")
        assert key in message
        assert str(file) in message

    def test_quantised(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT[layout]}.safetensors"
        key = KEYS[layout][0]
        edit(file, lambda tensors: tensors.update({key: tensors[key].astype(np.int8)}))
        assert key in refused(tmp_path, "dit", "as int8; give a checkpoint that is not quantised")

    def test_in_two_shards(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT[layout]}.safetensors"
        index = shard(file, 200_000)
        key = next(iter(safetensors.numpy.load_file(sorted(file.parent.glob("*-00001-of-*"))[0])))
        edit(sorted(file.parent.glob("*-00002-of-*"))[0], lambda t: t.update({key: np.zeros(2, np.float32)}))
        assert key in refused(tmp_path, "dit", "disagree about 1 tensor")
        assert index.exists()


def test_tensor_under_two_names(tmp_path):
    copy_checkpoint("diffusers", tmp_path)
    name = "post_layernorm.bias"
    edit(tmp_path / "image_encoder/model.safetensors", lambda t: t.update({f"vision_model.{name}": t[name].copy()}))
    refused(tmp_path, "clip", r"has the tensor post_layernorm\.bias twice, as .* and as .*; remove one")


def test_other_size_than_the_configuration(tmp_path):
    copy_checkpoint("official", tmp_path)
    edit_json(tmp_path / "config.json", num_layers=2)
    refused(tmp_path, "dit", r"unknown tensors: blocks\.2\.")


@pytest.mark.parametrize("size", [0, 5, 200, 100_000, -1])
def test_truncated_file(size, tmp_path):
    file = copy_checkpoint("official", tmp_path) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in refused(tmp_path, "dit", "download it again")


@pytest.mark.parametrize(
    "start",
    [
        b"\xff" * 8,
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (2).to_bytes(8, "little") + b"\x80\x80",
    ],
)
def test_damaged_header(start, tmp_path):
    file = copy_checkpoint("official", tmp_path) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(start + b"\0" * 100)
    assert str(file) in refused(tmp_path, "dit", "download it again")


def test_offsets_that_overlap(tmp_path):
    file = copy_checkpoint("official", tmp_path) / "diffusion_pytorch_model.safetensors"
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    assert str(file) in refused(tmp_path, "dit", "offsets of b")


def test_index_that_names_a_missing_file(tmp_path):
    file = copy_checkpoint("diffusers", tmp_path) / "transformer/diffusion_pytorch_model.safetensors"
    index = shard(file, 200_000)
    lost = sorted(file.parent.glob("*-00002-of-*"))[0]
    lost.unlink()
    message = refused(tmp_path, "dit", "names 1 missing file")
    assert lost.name in message
    assert str(index) in message


def test_index_without_a_map(tmp_path):
    index = shard(copy_checkpoint("diffusers", tmp_path) / "transformer/diffusion_pytorch_model.safetensors", 200_000)
    edit_json(index, weight_map={"a": "../elsewhere.safetensors"})
    refused(tmp_path, "dit", "no valid weight_map")


def test_index_beside_a_single_file(tmp_path):
    file = copy_checkpoint("diffusers", tmp_path) / "transformer/diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    shard(file, 200_000)
    file.write_bytes(whole)
    refused(tmp_path, "dit", "has both .* remove the one that is old")


def test_pth_without_torch(tmp_path, monkeypatch):
    copy_checkpoint("official", tmp_path)
    (tmp_path / "Wan2.1_VAE.safetensors").rename(tmp_path / "Wan2.1_VAE.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    refused(tmp_path, "vae", r"needs torch.*wanjax\[torch\].*Wan2\.1_VAE\.safetensors")


@pytest.mark.parametrize(
    ("file", "entries", "network", "match"),
    [
        ("transformer/config.json", {"qk_norm": "rms_norm"}, "dit", "qk_norm = rms_norm; only rms_norm_across_heads"),
        ("transformer/config.json", {"cross_attn_norm": False}, "dit", "cross_attn_norm = False; only True"),
        ("transformer/config.json", {"num_layers": "many"}, "dit", "num_layers is 'many'"),
        ("transformer/config.json", {"patch_size": 2}, "dit", "no usable configuration of the dit"),
        ("vae/config.json", {"is_residual": True}, "vae", r"is_residual = True; only False \(Wan2\.1\)"),
        ("vae/config.json", {"patch_size": 2}, "vae", "patch_size = 2; only None"),
        ("vae/config.json", {"decoder_base_dim": 12}, "vae", "decoder_base_dim = 12"),
        ("text_encoder/config.json", {"feed_forward_proj": "relu"}, "umt5", "relu; only gated-gelu"),
        ("image_encoder/config.json", {"hidden_act": "quick_gelu"}, "clip", "quick_gelu; only gelu"),
    ],
)
def test_networks_of_another_kind(file, entries, network, match, tmp_path):
    edit_json(copy_checkpoint("diffusers", tmp_path) / file, **entries)
    refused(tmp_path, network, match)


@pytest.mark.parametrize(
    ("text", "match"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "no JSON object"), ("{}", "no entry")]
)
def test_damaged_configuration(text, match, tmp_path):
    file = copy_checkpoint("diffusers", tmp_path) / "text_encoder/config.json"
    file.unlink() if text is None else file.write_text(text)
    assert str(file) in refused(tmp_path, "umt5", match)


def test_official_file_of_something_else(tmp_path):
    copy_checkpoint("official", tmp_path)
    edit(tmp_path / "Wan2.1_VAE.safetensors", lambda t: (t.clear(), t.update({"x": np.zeros(2, np.float32)})))
    refused(tmp_path, "vae", r"lacks the tensor encoder\.conv1\.weight")


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"is no Wan2\.1 checkpoint; give a folder with either"):
        Checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"holds a WanTransformer3DModel alone; give .* the one above"):
        Checkpoint(GOLDEN / "diffusers/transformer")
    copy_checkpoint("official", tmp_path)
    copy_checkpoint("diffusers", tmp_path)
    with pytest.raises(InputError, match="has both layouts"):
        Checkpoint(tmp_path)


def test_two_transformers(tmp_path):
    copy_checkpoint("diffusers", tmp_path)
    edit_json(tmp_path / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(InputError, match=r"two transformers \(Wan2.2\)"):
        Checkpoint(tmp_path)


def test_check_refuses_what_load_refuses(tmp_path):
    file = copy_checkpoint("official", tmp_path) / "diffusion_pytorch_model.safetensors"
    Checkpoint(tmp_path).check("dit", Checkpoint(tmp_path).config("dit"))
    edit(file, lambda tensors: tensors.pop("head.head.bias"))
    with pytest.raises(InputError, match=r"lacks 1 tensor: head\.head\.bias"):
        Checkpoint(tmp_path).check("dit", Checkpoint(tmp_path).config("dit"))


# ---- onto the devices


def fsdp(mesh):
    """Shards the first axis that can be, but never the layers."""

    def choose(path, leaf):
        first = leaf.ndim - len(leaf.get_metadata().get("axes", ())) if path[0] == "blocks" else 0
        axes = [None] * leaf.ndim
        for axis in range(first, leaf.ndim):
            if leaf.shape[axis] % mesh.shape["fsdp"] == 0:
                axes[axis] = "fsdp"
                break
        return NamedSharding(mesh, PartitionSpec(*axes))

    return choose


@pytest.mark.parametrize(("layout", "network"), [("diffusers", "dit"), ("official", "clip")])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("ambient", [True, False])
def test_sharded(layout, network, kind, ambient):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(kind, kind))
    checkpoint, choose = Checkpoint(GOLDEN / layout), fsdp(mesh)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        model = checkpoint.load(network, checkpoint.config(network), choose)
    assert_same_model(model, golden(layout, network))
    for path, leaf in parameters(model).items():
        wanted = choose(tuple(path.split(".")), leaf)
        assert leaf[...].sharding.is_equivalent_to(wanted, leaf.ndim), path


def test_replicated_on_the_ambient_mesh():
    checkpoint = Checkpoint(GOLDEN / "official")
    config = checkpoint.config("umt5")
    plain = golden("official", "umt5")
    assert {leaf.sharding for leaf in jax.tree.leaves(plain)} == {jnp.zeros(()).sharding}
    for shape in ((1, 1, 1, 1), (2, 2, 2, 1)):
        with jax.set_mesh(jax.make_mesh(shape, ("data", "fsdp", "ring", "ulysses"))):
            model = checkpoint.load("umt5", config)
        assert_same_model(model, plain)
        for leaf in jax.tree.leaves(model):
            assert leaf.sharding.is_fully_replicated
            assert len(leaf.sharding.device_set) == np.prod(shape)


def test_only_a_devices_own_part_is_read(monkeypatch):
    """What a host with one device of eight would read is an eighth."""
    mesh = jax.make_mesh((8,), ("fsdp",))
    read = []

    def counting(view, dtype, reader):
        read.append(view.size)
        return copy(view, dtype, reader)

    monkeypatch.setattr(load_module, "copy", counting)
    checkpoint = Checkpoint(GOLDEN / "diffusers")
    model = checkpoint.load("dit", checkpoint.config("dit"), fsdp(mesh))
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    attention_kernels = [size for size in read if size == 64 * 64 // 8]
    assert len(attention_kernels) >= 2 * 10 * 8  # layers x kernels x devices
    assert sum(read) < 1.1 * total


def test_layer_axis_cannot_be_sharded():
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    checkpoint = Checkpoint(GOLDEN / "diffusers")

    def wrong(path, leaf):
        return NamedSharding(mesh, PartitionSpec("fsdp") if path[0] == "blocks" else PartitionSpec())

    with pytest.raises(ValueError, match="layer axis"):
        checkpoint.load("dit", checkpoint.config("dit"), wrong)


def test_sharding_is_asked_with_path_and_parameter():
    asked = {}

    def choose(path, leaf):
        asked[path] = leaf
        return jnp.zeros(()).sharding

    checkpoint = Checkpoint(GOLDEN / "diffusers")
    checkpoint.load("vae", checkpoint.config("vae"), choose)
    assert asked["encoder", "blocks", "3", "shortcut", "kernel"].shape == (1, 1, 1, 4, 8)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((), ()),
        ((5,), (0,)),
        ((100, 40), (1, 0)),
        ((100, 40), (0, 1)),
        ((6, 1), (1, 0)),
        ((0, 3), (1, 0)),
        ((40, 5, 3, 2, 2), (2, 3, 4, 1, 0)),
    ],
)
def test_copies_are_aligned_and_exact(shape, order, dtype):
    class Reader:
        def view(self, key):
            raise NotImplementedError

        def release(self):
            pass

    x = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16).transpose(order)
    y = copy(x, dtype, Reader())
    assert y.dtype == dtype
    assert y.flags.c_contiguous
    assert y.size == 0 or y.ctypes.data % 64 == 0
    np.testing.assert_array_equal(y, x.astype(dtype))
