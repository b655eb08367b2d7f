"""Converted checkpoints in the libraries that they are for: diffusers, transformers, torch.

make parity        # = pytest -m live, with the golden extra installed
"""

import collections
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny import GOLDEN, assert_close, assert_same_model, golden, golden_arrays, load
from tiny_checkpoints import (
    CLIP_FILE,
    UMT5_FILE,
    VAE_FILE,
    copy_checkpoint,
    edit,
    load_refused,
    make_i2v,
    make_t2v,
    spell_as_published,
)

from wanjax.weights import Checkpoint, convert, save

pytestmark = [
    pytest.mark.live,
    # Importing diffusers and transformers warns of their own affairs; ours still raise.
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
PTH = [stem["official"] for stem in (VAE_FILE, UMT5_FILE, CLIP_FILE)]


def with_pth(folder, dtype=None):
    """The golden official checkpoint with .pth files as the release has them: OrderedDicts with `_metadata`."""
    import torch

    copy_checkpoint("official", folder)
    for stem in PTH:
        tensors = read_torch(folder / f"{stem}.safetensors")
        state = collections.OrderedDict((key, x.to(dtype) if dtype else x) for key, x in tensors.items())
        state._metadata = collections.OrderedDict({"": {"version": 1}})
        torch.save(state, folder / f"{stem}.pth")
        (folder / f"{stem}.safetensors").unlink()
    return folder


def read_torch(path):
    import safetensors.torch
    import torch

    return torch.load(path, weights_only=True) if path.suffix == ".pth" else safetensors.torch.load_file(path)


def assert_same_torch(a, b):
    import torch

    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        x, y = (z.contiguous().reshape(-1).view(torch.uint8) for z in (a[key], b[key]))
        assert torch.equal(x, y), key


def open_pipeline(folder):
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(folder)


# ---- .pth


def test_pth_is_read(tmp_path):
    folder = with_pth(tmp_path)
    for network in ("vae", "umt5", "clip"):
        assert_same_model(load(folder, network), golden("official", network))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_pth_of_every_dtype(name, tmp_path):
    import torch

    folder = with_pth(tmp_path, getattr(torch, name))
    checkpoint = Checkpoint(folder)
    dtypes = {info.dtype for _, info in checkpoint.weights("clip").items()}
    assert dtypes == {np.dtype(getattr(ml_dtypes, name, name))}
    config = checkpoint.config("clip", param_dtype=jnp.bfloat16)
    wide = golden("official", "clip").blocks.attention.q.kernel[...]
    narrow = checkpoint.load("clip", config).blocks.attention.q.kernel[...]
    stored = np.asarray(wide).astype(getattr(ml_dtypes, name, name))
    np.testing.assert_array_equal(np.asarray(narrow), stored.astype(ml_dtypes.bfloat16))


def test_pth_is_written_as_torch_would(tmp_path):
    """Official with .pth -> Diffusers -> official with .pth, compared by torch."""
    folder = with_pth(tmp_path / "source")
    convert(folder, tmp_path / "there", "diffusers")
    convert(tmp_path / "there", tmp_path / "back", "official", pth=True)
    for stem in PTH:
        assert_same_torch(read_torch(folder / f"{stem}.pth"), read_torch(tmp_path / "back" / f"{stem}.pth"))


def test_pth_is_what_official_gets_where_torch_is(tmp_path):
    convert(GOLDEN / "diffusers", tmp_path / "new", "official")
    assert {file.stem for file in (tmp_path / "new").glob("*.pth")} == set(PTH)
    for network in ("vae", "umt5", "clip"):
        assert_same_model(load(tmp_path / "new", network), golden("diffusers", network))


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_truncated_pth(size, tmp_path):
    file = with_pth(tmp_path) / "Wan2.1_VAE.pth"
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in load_refused(tmp_path, "vae", "is not a PyTorch state dict or is damaged")


def test_pth_of_something_else(tmp_path):
    import torch

    file = with_pth(tmp_path) / "Wan2.1_VAE.pth"
    torch.save({"state_dict": {"a": torch.zeros(2)}}, file)
    assert str(file) in load_refused(tmp_path, "vae", "something else than a dict of tensors")
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, file)
    assert str(file) in load_refused(tmp_path, "vae", "has a as complex64")


class Harm:
    def __reduce__(self):
        return (print, ("executed",))


def test_pth_with_code_is_not_executed(tmp_path, capsys):
    import torch

    file = with_pth(tmp_path) / "Wan2.1_VAE.pth"
    torch.save({"a": Harm()}, file)
    load_refused(tmp_path, "vae", "is not a PyTorch state dict")
    assert "executed" not in capsys.readouterr().out


# ---- diffusers and transformers


def test_diffusers_computes_the_official_outputs_with_a_converted_checkpoint(tmp_path):
    """The whole pipeline loads, and every network in it gives what the official modules gave."""
    import torch

    convert(with_pth(tmp_path / "source"), tmp_path / "new", "diffusers", max_shard_bytes=10**6)
    pipe = open_pipeline(tmp_path / "new")
    assert type(pipe).__name__ == "WanImageToVideoPipeline"
    assert pipe.scheduler.config.flow_shift == 16.0
    assert pipe.scheduler.config.use_flow_sigmas
    assert pipe.image_processor.size["shortest_edge"] == 42
    expected = golden_arrays("official")
    given = {key: torch.from_numpy(value.copy()) for key, value in expected.items()}
    length = int(expected["prompt_len"])
    with torch.no_grad():
        mask = (torch.arange(512) < length)[None]
        context = pipe.text_encoder.float()(given["prompt_ids"][None].long(), mask.long()).last_hidden_state
        assert_close(context[0, :length].detach(), expected["prompt_context"], 2e-5)
        features = pipe.image_encoder(given["clip_pixels"], output_hidden_states=True).hidden_states[-2]
        assert_close(features.detach(), expected["clip_features"], 2e-5)
        video = given["vae_video_u8"].float() / 127.5 - 1
        assert_close(pipe.vae.encode(video[None]).latent_dist.mean[0].detach(), expected["vae_mu"], 2e-5)
        context = context * mask[..., None]
        velocity = pipe.transformer(
            torch.cat([given["init_noise"], given["y"]])[None], given["dit_t"], context, given["clip_features"]
        )
        assert_close(velocity.sample[0].detach(), expected["dit_velocity"], 2e-5)


def assert_loads_the_same(folder, source, tmp_path):
    """What diffusers makes of the folder, saved by diffusers, is what was in the source."""
    pipe = open_pipeline(folder)
    pipe.save_pretrained(tmp_path / "again")
    again = Checkpoint(tmp_path / "again")
    for network in ("dit", "vae", "umt5", "clip"):
        if source.has(network):
            config = again.config(network)
            assert_same_model(again.load(network, config), source.load(network, source.config(network)))
    return pipe


@pytest.mark.parametrize(("make", "kind"), [(make_t2v, "WanPipeline"), (make_i2v, "WanImageToVideoPipeline")])
def test_diffusers_loads_other_tasks(make, kind, tmp_path):
    source = Checkpoint(make("official", tmp_path / "source"))
    convert(source.path, tmp_path / "new", "diffusers")
    assert type(assert_loads_the_same(tmp_path / "new", source, tmp_path)).__name__ == kind


def test_diffusers_loads_what_came_back(tmp_path):
    convert(GOLDEN / "diffusers", tmp_path / "there", "official")
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    assert_loads_the_same(tmp_path / "back", Checkpoint(GOLDEN / "diffusers"), tmp_path)


def test_diffusers_loads_saved_modules(tmp_path):
    """Modules with a checkpoint that gives the tokenizer; shards; no file of another library's making."""
    models = {network: golden("diffusers", network) for network in ("dit", "vae", "umt5", "clip")}
    base = Checkpoint(GOLDEN / "diffusers")
    convert(base.path, tmp_path / "official", "official")
    (tmp_path / "official/wanjax_extra/files/model_index.json").unlink()
    save(
        tmp_path / "new",
        "diffusers",
        models,
        base=Checkpoint(tmp_path / "official"),
        max_shard_bytes=200_000,
        flow_shift=5.0,
    )
    pipe = assert_loads_the_same(tmp_path / "new", base, tmp_path)
    settings = json.loads((GOLDEN / "diffusers/vae/config.json").read_text())
    assert pipe.vae.config.latents_mean == settings["latents_mean"]


def test_published_spelling_means_the_same_to_transformers(tmp_path):
    """The image encoder with prefix and buffer, the text encoder's embedding under both names."""
    folder = copy_checkpoint("diffusers", tmp_path / "source")
    edit(folder / "image_encoder/model.safetensors", spell_as_published)
    edit(
        folder / "text_encoder/model.safetensors",
        lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].copy()}),
    )
    assert_loads_the_same(folder, Checkpoint(folder), tmp_path)


def test_torch_and_numpy_read_the_same_bits(tmp_path):
    """Our writer's header and order are the format's: both of the format's own readers agree about it."""
    convert(GOLDEN / "official", tmp_path / "new", "diffusers", max_shard_bytes=10**6)
    for file in (tmp_path / "new").rglob("*.safetensors"):
        ours = safetensors.numpy.load_file(file)
        for key, x in read_torch(file).items():
            assert x.contiguous().reshape(-1).view(__import__("torch").uint8).numpy().tobytes() == ours[key].tobytes()
