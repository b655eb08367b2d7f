"""Adapters: exactly nothing at first, the same merged and beside the weights, on a mesh, and in diffusers."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiny import (
    DIFFUSERS,
    OFFICIAL,
    assert_close,
    assert_same_model,
    diffusers_inputs,
    flags,
    golden,
    golden_arrays,
    official_inputs,
    official_velocity,
    on,
    refused,
    values,
    velocity,
)
from tiny_adapters import (
    BLOCKS,
    CHECKPOINT,
    CONFIG,
    NAMES,
    SPELLINGS,
    assert_close_to,
    factors,
    load_files,
    official,
    sizes,
    write,
)

import sample_jax
from sharding.mesh import MeshShape
from sharding.rules import parameter_sharding, shard_parameters
from wanjax.config import DiTConfig, LoRAConfig
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.sampling.pipeline import Conditions, Pipeline
from wanjax.weights import Checkpoint, lora, save
from wanjax.weights.lora_files import METADATA, LoRAFile
from wanjax.weights.quantize import quantize


def attached(rank=4, alpha=None, targets=BLOCKS, dit=None, zero=False):
    """An adapted golden network whose `b` are not zero."""
    config = LoRAConfig(rank=rank, alpha=alpha, targets=targets)
    dit = lora.attach(golden("official", "dit") if dit is None else dit, config, nnx.Rngs(0))
    for i, layer in enumerate(x for x in lora.linear_layers(dit).values() if x.lora is not None and not zero):
        noise = 0.1 * jax.random.normal(jax.random.key(i), layer.lora.b.shape)
        layer.lora.b = layer.lora.b.replace(noise)
    return dit


# ---- in memory


def test_nothing_changes_at_first():
    dit = golden("official", "dit")
    adapted = attached(zero=True)
    np.testing.assert_array_equal(official_velocity(adapted), official_velocity(dit))
    assert all(layer.lora is None for layer in lora.linear_layers(dit).values())
    trained, frozen = lora.split(adapted)
    assert_same_model(lora.join(trained, frozen), adapted)
    assert_same_model(frozen, dit)
    trained = jax.tree.leaves(trained)
    assert len(trained) == 2 * len(NAMES)
    assert sum(x.size for x in trained) == 4 * CONFIG.num_layers * sum(sum(sizes(name)) for name in NAMES)


def test_merged_equals_unmerged():
    others = ("head", "image_embedding", "text_embedding", "time_embedding", "time_projection")
    adapted = attached(alpha=6.0, targets=(*BLOCKS, *others))
    merged = lora.merge(adapted)
    assert all(layer.lora is None for layer in lora.linear_layers(merged).values())
    assert values(merged).keys() == values(golden("official", "dit")).keys()
    ours, base = official_velocity(adapted), official_velocity(golden("official", "dit"))
    assert np.abs(ours - base).max() > 0.1
    assert np.abs(official_velocity(merged) - ours).max() <= 1e-5 * max(1, np.abs(ours).max())
    smaller = adapted.without_context()
    latents, text, image = official_inputs()
    timestep = golden_arrays("official")["dit_t"].astype(np.float32)
    context = jax.jit(lambda m: m.context(text, image))(adapted)
    np.testing.assert_array_equal(jax.jit(lambda m, c: m(latents, timestep, c))(smaller, context), ours)


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (("q",), ["self_attention.q", "cross_attention.q"]),
        (("cross_attention.k_image", "fc_out"), ["cross_attention.k_image", "ffn.fc_out"]),
    ],
)
def test_targets(targets, paths):
    layers = lora.linear_layers(attached(targets=targets))
    in_blocks = [path.removeprefix("blocks.") for path, x in layers.items() if x.lora and path.startswith("blocks.")]
    assert sorted(in_blocks) == sorted(paths)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rank": 0}, ["rank 0", "from 1"]),
        ({"alpha": -1.0}, ["alpha -1.0"]),
        ({"targets": ("to_q", "ffn")}, ["to_q", "blocks.self_attention.q"]),
        ({"targets": ()}, ["targets ()"]),
    ],
)
def test_bad_configs(config, words):
    with pytest.raises(InputError) as caught:
        lora.attach(golden("official", "dit"), LoRAConfig(**config), nnx.Rngs(0))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_beside_quantised_weights(layers, tmp_path):
    """The adapter is exact; the product beside it is as the quantised network's."""
    base = quantize(golden("official", "dit"), "int8", layers)
    adapted = attached(dit=base, targets=("ffn.fc_in",))
    x = jax.random.normal(jax.random.key(9), (5, CONFIG.dim))
    first = jax.tree.map(lambda x: x[0], adapted.stacks[-1].ffn.fc_in)
    plain = jax.tree.map(lambda x: x[0], base.stacks[-1].ffn.fc_in)
    np.testing.assert_allclose(first(x) - plain(x), x @ first.lora.a[...] @ first.lora.b[...], atol=1e-5)
    with pytest.raises(InputError, match=r"ffn\.fc_in is in 8 bits"):
        lora.merge(adapted)
    lora.save(tmp_path / "a.safetensors", adapted)
    (file,) = lora.parse([str(tmp_path / "a.safetensors")])
    assert len(file.terms(base.config)) == len(file.terms(CONFIG)) == CONFIG.num_layers


@pytest.mark.parametrize("sizes", [{"rank": 4}, {"rank": 3, "alpha": 5.0, "targets": ("v", "text_embedding")}], ids=str)
def test_round_trip(sizes, tmp_path):
    adapted = attached(**sizes)
    lora.save(tmp_path / "a.safetensors", adapted)
    again = load_files(str(tmp_path / "a.safetensors"), merged=False)
    assert_same_model(again, adapted)
    np.testing.assert_array_equal(official_velocity(again), official_velocity(adapted))
    lora.save(tmp_path / "b.safetensors", again)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert all(key.startswith("transformer.") and ".lora_" in key for key in file.keys())  # noqa: SIM118
        settings = json.loads(file.metadata()[METADATA])
    assert settings["transformer.r"] == sizes["rank"]
    assert settings["transformer.lora_alpha"] == sizes.get("alpha", sizes["rank"])
    with pytest.raises(InputError, match="no adapters to write"):
        lora.save(tmp_path / "c.safetensors", golden("official", "dit"))
    with pytest.raises(InputError, match="cannot be written"):
        lora.save(tmp_path / "a.safetensors/c.safetensors", adapted)


def test_merged_before_weights_are_quantised(tmp_path):
    path = write(tmp_path / "a.safetensors", official(factors()))
    config = dataclasses.replace(CONFIG, quantize="int8", quantized_layers=(1, 3))
    assert_same_model(load_files(path, config=config), quantize(load_files(path), "int8", (1, 3)))


def test_a_checkpoint_in_8_bits(tmp_path):
    save(tmp_path / "c", "official", {"dit": quantize(golden("official", "dit"), "int8")}, base=CHECKPOINT, pth=False)
    path = write(tmp_path / "a.safetensors", official(factors()))
    argv = flags(OFFICIAL, checkpoint=tmp_path / "c", lora=path)
    networks = Pipeline(sample_jax.parse(argv)).networks
    assert not networks.merged
    dit = lora.load(networks.checkpoint, networks.configs["dit"], networks.loras["dit"], networks.merged)
    assert dit.blocks.ffn.fc_in.lora.rank == 4
    refused([*argv, "--lora-merge"], ["--lora-merge", "8 bits"])
    difference = np.zeros((CONFIG.ffn_dim, CONFIG.dim), np.float32)
    path = write(tmp_path / "b.safetensors", {"diffusion_model.blocks.0.ffn.0.diff": difference})
    refused(
        flags(OFFICIAL, checkpoint=tmp_path / "c", lora=path), ["blocks.0.ffn.0.diff", "weights would change", "8 bits"]
    )


def test_command_line(tmp_path, capsys, monkeypatch):
    """From the flags to the latents, with features and an image condition that are made up."""

    def encode(pipe, request, stages):
        keys = jax.random.split(jax.random.key(0), 3)
        features = jax.random.normal(keys[0], (1, 512, CONFIG.text_dim))
        image = jax.random.normal(keys[1], (1, CONFIG.image_positions, CONFIG.image_dim))
        return Conditions(features, image, jax.random.normal(keys[2], (*request.noise.shape[:-1], 20)))

    monkeypatch.setattr(Pipeline, "encode", encode)
    monkeypatch.setattr(Pipeline, "decode", lambda *_: np.zeros((17, 64, 96, 3), np.uint8))
    files = [write(tmp_path / f"{i}.safetensors", official(factors(i))) for i in range(2)]
    given = ["--lora", files[0], "--lora", f"{files[1]}:0.5"]
    run = {"steps": 2, "guidance": 1, "solver": "euler", "output": tmp_path / "v.npy"}
    latents = {}
    for name, switches in {"none": [], "merged": given, "beside": [*given, "--no-lora-merge"]}.items():
        sample_jax.main([*flags(OFFICIAL, **run, save_latents=tmp_path / "l.npy"), *switches])
        latents[name] = np.load(tmp_path / "l.npy")
    assert f"{files[1]} at 0.5: adapters of 36 layers\n" in capsys.readouterr().out
    assert np.abs(latents["merged"] - latents["none"]).max() > 0.1
    np.testing.assert_allclose(latents["beside"], latents["merged"], atol=1e-4)


# ---- sharded


@pytest.mark.parametrize("merged", [True, False])
def test_on_a_mesh(merged, tmp_path):
    pairs = factors(names=("self_attn.q", "cross_attn.k_img", "ffn.0", "ffn.2"))
    key = "diffusion_model.patch_embedding"
    extra = {f"{key}.diff": np.ones((128, 36, 1, 2, 2), np.float32), f"{key}.diff_b": np.ones(128, np.float32)}
    path = write(tmp_path / "a.safetensors", official(pairs) | extra)
    alone = load_files(path, merged=merged)
    expected, bare = official_velocity(alone), official_velocity(golden("official", "dit"))
    with on(MeshShape(fsdp=2, ring=2, ulysses=2)):
        placed = load_files(path, merged=merged, sharding=parameter_sharding)
        layer = placed.blocks.ffn.fc_in
        parameter = layer.kernel if merged else layer.lora.a
        assert len({str(shard.index) for shard in parameter[...].addressable_shards}) == 8
        for x, y in zip(values(placed).values(), values(alone).values(), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
        assert np.abs(official_velocity(placed) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
        if not merged:
            lora.save(tmp_path / "b.safetensors", placed)
            merged_there = values(lora.merge(placed))
            again = lora.attach(CHECKPOINT.load("dit", CONFIG, parameter_sharding), LoRAConfig(rank=2), nnx.Rngs(0))
            again = shard_parameters(again)
            assert len({str(shard.index) for shard in again.blocks.ffn.fc_in.lora.a[...].addressable_shards}) == 8
            assert np.abs(official_velocity(again) - bare).max() <= 1e-4 * max(1, np.abs(bare).max())
    if not merged:
        lora.save(tmp_path / "c.safetensors", alone)
        assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
        assert_close_to(lora.merge(alone), merged_there)


def test_14b_fits_the_rules():
    """A rank-32 file's adapters of 14B: sizes and names, without any weights."""
    c = DiTConfig()
    dit = jax.eval_shape(lambda: lora.attach(DiT(c, nnx.Rngs(0)), LoRAConfig(rank=32), nnx.Rngs(0)))
    count = sum(x.lora.a.size + x.lora.b.size for x in lora.linear_layers(dit).values() if x.lora is not None)
    square, ffn = 4 + 6, 2  # of self- and cross-attention, two of the latter for images
    assert count == c.num_layers * 32 * (square * 2 * c.dim + ffn * (c.dim + c.ffn_dim))


# ---- diffusers


def reference():
    """The golden transformer as diffusers has it, and the inputs of its golden step."""
    import diffusers
    import torch

    transformer = diffusers.WanTransformer3DModel.from_pretrained(DIFFUSERS / "transformer").eval()
    expected = golden_arrays("diffusers")
    latents = np.concatenate([expected["init_noise"], expected["condition"]], axis=1)
    names = ("dit_timestep", "prompt_embeds", "clip_features")
    inputs = [torch.from_numpy(np.array(x)) for x in (latents, *(np.atleast_1d(expected[name]) for name in names))]

    def run():
        with torch.no_grad():
            return np.moveaxis(transformer(*inputs).sample.numpy(), 1, -1)

    latents, text, image = diffusers_inputs()
    timestep = np.atleast_1d(expected["dit_timestep"]).astype(np.float32)
    return transformer, run, lambda dit: velocity(dit, latents, timestep, text, image)


@pytest.mark.live
def test_diffusers_reads_ours(tmp_path):
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    targets = (*BLOCKS, "text_embedding", "time_projection", "image_embedding", "head")
    adapted = attached(dit=golden("diffusers", "dit"), rank=3, alpha=7.0, targets=targets)
    lora.save(tmp_path / "pytorch_lora_weights.safetensors", adapted)
    transformer, run, ours = reference()
    before = run()
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(tmp_path), return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, transformer, metadata=metadata)
    assert np.abs(run() - before).max() > 0.1
    assert_close(ours(adapted), run())
    assert_close(ours(lora.merge(adapted)), run())


@pytest.mark.live
def test_ours_reads_diffusers(tmp_path):
    import peft
    import torch
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
    from diffusers.training_utils import _collate_lora_metadata

    transformer, run, ours = reference()
    targets = ["to_q", "to_k", "to_out.0", "add_k_proj", "ffn.net.2", "patch_embedding", "proj_out"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False,
        rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 5, "proj_out": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    transformer.add_adapter(config)
    layers = peft.get_peft_model_state_dict(transformer)
    metadata = _collate_lora_metadata({"transformer": transformer})
    WanLoraLoaderMixin.save_lora_weights(str(tmp_path), layers, **metadata)
    checkpoint = Checkpoint(DIFFUSERS)
    files = (LoRAFile(tmp_path),)
    for merged in (True, False):
        assert_close(ours(lora.load(checkpoint, checkpoint.config("dit"), files, merged)), run())


@pytest.mark.live
@pytest.mark.parametrize("spelling", ["lightx2v", "kohya"])
def test_ours_and_diffusers_read_the_same(spelling, tmp_path):
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    checkpoint = Checkpoint(DIFFUSERS)
    c = checkpoint.config("dit")
    rng = np.random.default_rng(5)
    pairs = {}
    for i, name in itertools.product(range(c.num_layers), NAMES):
        fan_in, fan_out = {"ffn.0": (c.dim, c.ffn_dim), "ffn.2": (c.ffn_dim, c.dim)}.get(name, (c.dim, c.dim))
        shapes = (4, fan_in), (fan_out, 4)
        pairs[f"blocks.{i}.{name}"] = tuple(0.2 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    tensors = SPELLINGS[spelling](pairs)
    if spelling == "lightx2v":
        differences = {name: rng.standard_normal(len(b)).astype(np.float32) for name, (_, b) in pairs.items()}
        tensors |= {f"diffusion_model.{name}.diff_b": x for name, x in differences.items()}
    path = write(
        tmp_path / "a.safetensors", {k: np.asarray(x, np.float32) for k, x in tensors.items()}, {"format": "pt"}
    )
    transformer, run, ours = reference()
    WanLoraLoaderMixin.load_lora_into_transformer(WanLoraLoaderMixin.lora_state_dict(path), transformer)
    assert_close(ours(lora.load(checkpoint, c, lora.parse([path]), merged=True)), run())
