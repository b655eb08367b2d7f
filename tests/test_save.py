"""Writing checkpoints: there and back bit for bit, modules saved and loaded."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from tiny import GOLDEN, LAYOUTS, assert_same_model, golden, load
from tiny_checkpoints import (
    CLIP_FILE,
    DIT_FILE,
    EXTRA,
    copy_checkpoint,
    edit,
    edit_json,
    fsdp,
    make_i2v,
    make_i2v_by_latents,
    make_t2v,
    spell_as_published,
    without_images,
)

from wanjax.weights import Checkpoint, convert, save
from wanjax.weights.layouts import NETWORKS

OTHER = {"diffusers": "official", "official": "diffusers"}


def official_checkpoint(folder):
    """The official layout with the second tokenizer, which only the official code reads."""
    copy_checkpoint("official", folder)
    shutil.copytree(folder / "google/umt5-xxl", folder / "xlm-roberta-large")
    return folder


def tensors(folder):
    """Every tensor of a checkpoint by its place and name, whatever its shards; not what is kept for the way back."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        place = str(file.relative_to(folder)).split("-0000")[0].removesuffix(".safetensors")
        if not place.startswith(EXTRA):
            for key, x in safetensors.numpy.load_file(file).items():
                assert (place, key) not in found
                found[place, key] = x
    return found


def files(folder):
    """Every other file by its place."""
    return {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.json") if EXTRA not in str(file)
    }


def assert_same_tensors(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        assert a[key].tobytes() == b[key].tobytes(), key


def there_and_back(folder, tmp_path):
    """The checkpoint converted to the other layout and back."""
    layout = Checkpoint(folder).layout
    convert(folder, tmp_path / "there", OTHER[layout], pth=False, max_shard_bytes=300_000)
    convert(tmp_path / "there", tmp_path / "back", layout, pth=False)
    return tmp_path / "back"


# ---- there and back


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_for_bit(layout, tmp_path):
    folder = copy_checkpoint(layout, tmp_path / "source")
    back = there_and_back(folder, tmp_path)
    assert_same_tensors(folder, back)
    assert files(folder) == files(back)
    assert not (back / EXTRA).exists()
    assert any(file.name.endswith(".index.json") for file in (tmp_path / "there").rglob("*.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [make_t2v, make_i2v, make_i2v_by_latents])
def test_round_trip_of_other_tasks(make, layout, tmp_path):
    folder = make(layout, tmp_path / "source")
    assert_same_tensors(folder, there_and_back(folder, tmp_path))
    there, source = Checkpoint(tmp_path / "there"), Checkpoint(folder)
    assert there.config("dit") == source.config("dit")
    assert there.has("clip") == source.has("clip")
    if there.layout == "diffusers":
        index = json.loads((there.path / "model_index.json").read_text())
        assert index["_class_name"] == ("WanPipeline" if make is make_t2v else "WanImageToVideoPipeline")
        assert index.get("image_encoder", [None])[0] == ("transformers" if make is make_i2v else None)
    else:
        assert json.loads((there.path / "config.json").read_text())["model_type"] == source.config("dit").task


def test_what_a_network_is_for_is_kept(tmp_path):
    """Where its inputs do not say it, Diffusers' config.json has no place for it."""
    source = without_images("official", tmp_path / "source", 36, "flf2v")
    there_and_back(source, tmp_path)
    for folder in ("source", "there", "back"):
        assert Checkpoint(tmp_path / folder).config("dit").task == "flf2v"


def test_round_trip_of_the_published_spelling(tmp_path):
    """Prefix, buffer, unused projection, an embedding stored twice: all of it is there again, the copy only once."""
    folder = copy_checkpoint("diffusers", tmp_path / "source")
    edit(folder / "image_encoder/model.safetensors", spell_as_published)
    edit(folder / "image_encoder/model.safetensors", lambda t: t.update({"visual_projection.weight": np.ones((3, 40))}))
    edit(
        folder / "text_encoder/model.safetensors",
        lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].copy()}),
    )
    assert_same_tensors(folder, there_and_back(folder, tmp_path))
    extra = json.loads((tmp_path / "there" / EXTRA / "extra.json").read_text())
    assert extra["copies"] == {"umt5": {"encoder.embed_tokens.weight": "shared.weight"}}
    kept = safetensors.numpy.load_file(tmp_path / "there" / EXTRA / "clip.safetensors")
    assert set(kept) == {"vision_model.embeddings.position_ids", "visual_projection.weight"}
    assert not (tmp_path / "there" / EXTRA / "umt5.safetensors").exists()


def test_round_trip_of_second_names_and_differing_copies(tmp_path):
    folder = copy_checkpoint("diffusers", tmp_path / "a" / "source")
    edit(
        folder / "text_encoder/model.safetensors",
        lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"] + 1}),
    )
    assert_same_tensors(folder, there_and_back(folder, tmp_path / "a"))
    edit(folder / "text_encoder/model.safetensors", lambda t: t.pop("shared.weight"))
    assert_same_tensors(folder, there_and_back(folder, tmp_path / "b"))


def test_round_trip_keeps_odd_dtypes_and_numbers(tmp_path):
    """Half precision, not-a-numbers with a payload, minus zero: bits, not values."""
    folder = copy_checkpoint("official", tmp_path / "source")

    def change(t):
        t["head.head.bias"] = t["head.head.bias"].astype(np.float16)
        t["blocks.0.ffn.0.weight"] = t["blocks.0.ffn.0.weight"].astype(ml_dtypes.bfloat16)
        bits = t["blocks.0.modulation"].view(np.uint32)
        bits[0, 0, :3] = [0x7FC12345, 0xFF800001, 0x80000000]

    edit(folder / f"{DIT_FILE['official']}.safetensors", change)
    assert_same_tensors(folder, there_and_back(folder, tmp_path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_checkpoint_loads_the_same(layout, tmp_path):
    """Numbers that the other layout cannot say (heads of CLIP, statistics of the VAE, the shift) are kept for us."""
    source = Checkpoint(GOLDEN / layout)
    convert(source.path, tmp_path / "new", OTHER[layout], pth=False)
    new = Checkpoint(tmp_path / "new")
    assert new.layout == OTHER[layout]
    assert new.flow_shift == (16.0 if layout == "official" else source.flow_shift)
    assert new.tokenizer.joinpath("tokenizer.json").is_file()
    for network in NETWORKS:
        assert new.config(network) == source.config(network)
        assert_same_model(load(new.path, network), golden(layout, network))


def test_what_official_has_no_place_for_is_kept_aside(tmp_path):
    convert(official_checkpoint(tmp_path / "source"), tmp_path / "new", "diffusers")
    kept = safetensors.numpy.load_file(tmp_path / "new" / EXTRA / "clip.safetensors")
    unused = {
        key
        for key in safetensors.numpy.load_file(GOLDEN / f"official/{CLIP_FILE['official']}.safetensors")
        if not key.startswith("visual.") or key == "visual.head"
    }
    assert set(kept) == unused
    assert (tmp_path / "new" / EXTRA / "files/xlm-roberta-large/tokenizer.json").is_file()
    assert "other libraries ignore it" in json.loads((tmp_path / "new" / EXTRA / "extra.json").read_text())["about"]


def test_shift_of_the_schedule(tmp_path):
    def shift(folder):
        return json.loads((folder / "scheduler/scheduler_config.json").read_text())["flow_shift"]

    convert(GOLDEN / "official", tmp_path / "a", "diffusers")
    assert shift(tmp_path / "a") == 16.0
    convert(GOLDEN / "official", tmp_path / "b", "diffusers", flow_shift=3.0)
    assert shift(tmp_path / "b") == 3.0
    convert(tmp_path / "b", tmp_path / "c", "official", pth=False)
    assert Checkpoint(tmp_path / "c").flow_shift == 3.0
    edit_json(tmp_path / "a/scheduler/scheduler_config.json", flow_shift=7.0)
    convert(tmp_path / "a", tmp_path / "d", "official", pth=False)
    assert Checkpoint(tmp_path / "d").flow_shift == 7.0
    convert(GOLDEN / "diffusers", tmp_path / "e", "official", pth=False)
    convert(tmp_path / "e", tmp_path / "f", "diffusers", flow_shift=9.0)
    assert shift(tmp_path / "f") == 9.0


def test_parts_of_a_checkpoint(tmp_path):
    """Only the transformer: it is converted, and there is no pipeline that could not be loaded."""
    lines = []
    convert(GOLDEN / "diffusers_t2v", tmp_path / "a", "official", pth=False)
    assert_same_model(load(tmp_path / "a", "dit"), load(GOLDEN / "diffusers_t2v", "dit"))
    shutil.rmtree(tmp_path / "a" / EXTRA)
    convert(tmp_path / "a", tmp_path / "b", "diffusers", say=lines.append)
    assert not (tmp_path / "b/model_index.json").exists()
    assert "There is no model_index.json, because this is missing: umt5, vae, tokenizer." in lines


# ---- modules


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("origin", LAYOUTS)
def test_saved_modules_are_loaded_again(origin, layout, tmp_path):
    models = {network: golden(origin, network) for network in NETWORKS}
    save(tmp_path / "new", layout, models, pth=False, max_shard_bytes=300_000, flow_shift=4.0)
    new = Checkpoint(tmp_path / "new")
    assert new.layout == layout
    assert new.flow_shift == 4.0
    for network, model in models.items():
        assert new.config(network) == model.config
        assert_same_model(load(new.path, network), model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trained_transformer_in_a_whole_checkpoint(layout, tmp_path):
    """The rest comes from the checkpoint that training started from, here of the official layout."""
    base = Checkpoint(official_checkpoint(tmp_path / "base"))
    trained = jax.tree.map(lambda x: x + 1, golden("official", "dit"))
    save(tmp_path / "new", layout, {"dit": trained}, base=base, pth=False)
    assert_same_model(load(tmp_path / "new", "dit"), trained)
    for network in ("vae", "umt5", "clip"):
        assert_same_model(load(tmp_path / "new", network), golden("official", network))
    if layout == "official":
        old, new = (
            safetensors.numpy.load_file(p / f"{CLIP_FILE['official']}.safetensors")
            for p in (base.path, tmp_path / "new")
        )
        assert old.keys() == new.keys()
        assert (tmp_path / "new/xlm-roberta-large/tokenizer.json").is_file()


def test_saving_keeps_what_an_earlier_conversion_kept(tmp_path):
    source = official_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "a", "diffusers")
    base = Checkpoint(tmp_path / "a")
    save(tmp_path / "b", "diffusers", {"dit": golden("official", "dit")}, base=base)
    convert(tmp_path / "b", tmp_path / "c", "official", pth=False)
    assert_same_tensors(source, tmp_path / "c")
    assert files(source) == files(tmp_path / "c")


def test_dtypes_of_modules_are_kept(tmp_path):
    checkpoint = Checkpoint(GOLDEN / "official")
    model = checkpoint.load("dit", checkpoint.config("dit", param_dtype=jnp.bfloat16))
    save(tmp_path / "new", "diffusers", {"dit": model})
    written = safetensors.numpy.load_file(tmp_path / "new/transformer/diffusion_pytorch_model.safetensors")
    assert written["blocks.0.attn1.to_q.weight"].dtype == ml_dtypes.bfloat16
    assert written["blocks.0.scale_shift_table"].dtype == np.float32


def test_sharded_module_under_an_explicit_mesh(tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    checkpoint = Checkpoint(GOLDEN / "official")
    with jax.set_mesh(mesh):
        models = {n: checkpoint.load(n, checkpoint.config(n), fsdp(mesh)) for n in ("dit", "clip")}
        save(tmp_path / "new", "official", models, pth=False)
    for network in models:
        assert_same_model(load(tmp_path / "new", network), golden("official", network))


def test_shards_are_what_other_libraries_expect(tmp_path):
    save(tmp_path / "new", "diffusers", {"dit": golden("official", "dit")}, max_shard_bytes=500_000)
    folder = tmp_path / "new/transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    total = 0
    for name in set(index["weight_map"].values()):
        with safetensors.safe_open(folder / name, "np") as file:
            assert file.metadata() == {"format": "pt"}
            shard = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        size = sum(x.nbytes for x in shard.values())
        assert size <= 500_000
        assert {key for key, place in index["weight_map"].items() if place == name} == set(shard)
        total += size
    assert index["metadata"] == {"total_size": total}
