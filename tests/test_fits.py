"""What does not fit together, or is no number, is found before the work and told by its name."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny import DIFFUSERS, flags, refused
from tiny_checkpoints import copy_checkpoint, edit, edit_json

from wanjax.conditioning.text import Tokenizer
from wanjax.data.listing import read_manifest
from wanjax.data.videos import Videos
from wanjax.errors import InputError
from wanjax.weights import Checkpoint
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.tensors import is_finite

DIT = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    copy_checkpoint("diffusers", tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_told_by_tensor(checkpoint, dtype, value):
    name = "blocks.1.attn1.to_q.weight"
    edit(checkpoint / DIT, lambda tensors: tensors[name].__setitem__((3, 4), value))
    config = Checkpoint(checkpoint).config("dit", param_dtype=dtype)
    with pytest.raises(InputError, match=rf"{DIT}: tensor {name} holds NaN or infinity.*; finite weights are needed"):
        Checkpoint(checkpoint).load("dit", config)


def test_numbers_that_overflow_the_format(checkpoint):
    name = "blocks.1.ffn.net.0.proj.weight"
    edit(checkpoint / DIT, lambda tensors: tensors[name].__setitem__((0, 0), 3.4e38))
    Checkpoint(checkpoint).load("dit", Checkpoint(checkpoint).config("dit"))
    with pytest.raises(InputError, match="numbers beyond bfloat16"):
        Checkpoint(checkpoint).load("dit", Checkpoint(checkpoint).config("dit", param_dtype=jax.numpy.bfloat16))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_finite_numbers(dtype):
    kind = jax.numpy.dtype(dtype)
    values = np.array([0, 1, -1, float(jax.numpy.finfo(kind).max), float(jax.numpy.finfo(kind).min)], kind)
    assert is_finite(values)
    assert is_finite(values[:0])
    for bad in (np.nan, -np.nan):
        assert not is_finite(np.append(values, np.array(bad, kind)))


def test_a_lora_of_no_numbers(tmp_path):
    ones = {"A": np.ones((2, 64), np.float32), "B": np.full((64, 2), np.nan, np.float32)}
    tensors = {f"blocks.0.attn1.to_q.lora_{name}.weight": x for name, x in ones.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "l.safetensors")
    file = LoRAFile(tmp_path / "l.safetensors")
    (term,) = file.terms(Checkpoint(DIFFUSERS).config("dit"))
    with file.open() as reader, pytest.raises(InputError, match=r"to_q.lora_B.weight holds NaN or infinity"):
        term.read(reader)


@pytest.mark.parametrize("network", ["umt5", "clip", "vae"])
def test_a_network_of_another_model(checkpoint, network):
    """Whole in itself, but it makes what this DiT does not take."""
    folder = {"umt5": "text_encoder", "clip": "image_encoder", "vae": "vae"}[network]
    if network == "clip":  # as wide, but of larger pictures: more tokens than the DiT has positions for
        config = json.loads((checkpoint / "image_encoder/config.json").read_text())
        size = config["image_size"] + config["patch_size"]
        edit_json(checkpoint / "image_encoder/config.json", image_size=size)
        tokens = 1 + (size // config["patch_size"]) ** 2

        def widen(tensors):
            name = next(name for name in tensors if "position_embedding" in name)
            tensors[name] = np.zeros((tokens, tensors[name].shape[1]), np.float32)

        edit(checkpoint / "image_encoder/model.safetensors", widen)
    elif network == "umt5":
        shutil.rmtree(checkpoint / folder)
        _narrow_umt5(checkpoint / folder)
    else:
        edit_json(checkpoint / "vae/config.json", temperal_downsample=[False, True, False])
        edit(checkpoint / "vae/diffusion_pytorch_model.safetensors", _without_a_time_convolution)
    refused(flags(DIFFUSERS, checkpoint=checkpoint), [str(checkpoint), ";"])


def _narrow_umt5(folder):
    shutil.copytree(DIFFUSERS / "text_encoder", folder)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", d_model=config["d_model"] * 2)

    def widen(tensors):
        for name, x in tensors.items():
            axes = [n * 2 if n == config["d_model"] else n for n in x.shape]
            tensors[name] = np.zeros(axes, np.float32)

    edit(folder / "model.safetensors", widen)


def _without_a_time_convolution(tensors):
    for name in [name for name in tensors if "time_conv" in name][:1]:
        del tensors[name]


def test_a_tokenizer_of_another_vocabulary(checkpoint):
    file = checkpoint / "tokenizer/tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["vocab"] += [[f"word{i}", -20.0] for i in range(1000)]
    file.write_text(json.dumps(settings))
    refused(flags(DIFFUSERS, checkpoint=checkpoint), ["tokenizer.json has 1,0", "the text encoder 128", "same release"])
    with pytest.raises(InputError, match=r"has 99 words, the text encoder 256,384"):
        Tokenizer(DIFFUSERS / "tokenizer").check(256_384)


# ---- manifests


@pytest.mark.parametrize("times", ['"start": 1e300', '"start": 0, "end": 1e12', '"start": NaN', '"end": "inf"'])
def test_impossible_times(times, tmp_path):
    (tmp_path / "m.jsonl").write_text(f'{{"path": "a.mp4", "caption": "x", {times}}}\n')
    with pytest.raises(InputError, match=r"m.jsonl, row 1: .*; accepted: .*"):
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.parametrize("column", ['"height": 1e9', '"seconds": 1e12'])
def test_columns_that_no_video_has(column, tmp_path):
    facts = ['"height": 64', '"width": 64', '"seconds": 2']
    facts = [fact for fact in facts if fact.split(":")[0] != column.split(":")[0]]
    (tmp_path / "m.jsonl").write_text(f'{{"path": "a.mp4", "caption": "x", {", ".join([*facts, column])}}}\n')
    with pytest.raises(Exception, match=r"a.mp4: columns of"):
        Videos(tmp_path / "m.jsonl", frames=5, area=4096).shape(0)
