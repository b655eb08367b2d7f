"""Reading checkpoints: every tensor at its place, every spelling of the releases."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny import GOLDEN, LAYOUTS, assert_same_model, golden, load, values
from tiny_checkpoints import (
    STEMS,
    copy_checkpoint,
    edit,
    make_i2v,
    make_t2v,
    shard,
    spell_as_published,
    without_images,
)

from wanjax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from wanjax.errors import InputError
from wanjax.weights import Checkpoint
from wanjax.weights.layouts import NETWORKS
from wanjax.weights.load import abstract_model, parameter_shapes, parameters
from wanjax.weights.mapping import Table, expand, weight

# ---- every tensor at its place


def raw(layout, network):
    return safetensors.numpy.load_file(GOLDEN / layout / f"{STEMS[network][layout]}.safetensors")


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
    assert checkpoint.tokenizer == GOLDEN / "diffusers/tokenizer"
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
    assert checkpoint.tokenizer == GOLDEN / "official/google/umt5-xxl"
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


def test_image_encoder_as_published(tmp_path):
    folder = copy_checkpoint("diffusers", tmp_path)
    edit(folder / "image_encoder/model.safetensors", spell_as_published)
    assert_same_model(load(folder, "clip"), golden("diffusers", "clip"))


def test_twin_is_taken_before_the_pth(tmp_path):
    folder = copy_checkpoint("official", tmp_path)
    (folder / "Wan2.1_VAE.pth").write_bytes(b"not looked at")
    assert_same_model(load(folder, "vae"), golden("official", "vae"))


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


@pytest.mark.parametrize(
    ("channels", "model_type", "accepted"), [(16, "i2v", "t2v;"), (36, "ti2v", "t2v, i2v, flf2v;")]
)
def test_a_task_that_does_not_fit_is_refused(channels, model_type, accepted, tmp_path):
    """Frames would go nowhere in a network of 16 channels."""
    checkpoint = Checkpoint(without_images("official", tmp_path, channels, model_type))
    with pytest.raises(InputError, match=f"{channels} input .* model_type = {model_type}; accepted: {accepted}"):
        checkpoint.config("dit")


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
