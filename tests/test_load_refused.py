"""Checkpoints that cannot be read: every refusal by name."""

import json

import numpy as np
import pytest
import safetensors.numpy
from tiny import GOLDEN, LAYOUTS
from tiny_checkpoints import DIT_FILE, copy_checkpoint, edit, edit_json, load_refused, shard

from wanjax.errors import InputError
from wanjax.weights import Checkpoint

KEYS = {
    "diffusers": ("blocks.1.attn1.to_q.weight", "blocks.0.ffn.net.2.bias", "proj_out.bias"),
    "official": ("blocks.1.self_attn.q.weight", "blocks.2.ffn.2.bias", "head.head.bias"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
class TestKeys:
    def test_missing(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT_FILE[layout]}.safetensors"
        edit(file, lambda tensors: [tensors.pop(key) for key in KEYS[layout]])
        message = load_refused(tmp_path, "dit", "lacks 3 tensors")
        assert str(file) in message
        assert all(key in message for key in KEYS[layout])

    def test_unknown(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT_FILE[layout]}.safetensors"
        edit(file, lambda tensors: tensors.update({"blocks.3.extra.weight": np.zeros(3, np.float32)}))
        assert str(file) in load_refused(tmp_path, "dit", r"has 1 unknown tensor: blocks\.3\.extra\.weight;")

    def test_renamed(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT_FILE[layout]}.safetensors"
        key = KEYS[layout][0]
        edit(file, lambda tensors: tensors.update({f"{key}s": tensors.pop(key)}))
        load_refused(tmp_path, "dit", rf"has 1 unknown tensor: {key}s and lacks 1 tensor: {key};")

    def test_many_are_counted(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT_FILE[layout]}.safetensors"
        edit(file, lambda tensors: tensors.update({f"zz.{i}": np.zeros(3, np.float32) for i in range(40)}))
        assert len(load_refused(tmp_path, "dit", "has 40 unknown tensors: .* and 35 more")) < 400

    def test_misshapen(self, layout, tmp_path):
        """A transposed tensor of the right size is misshapen too."""
        file = copy_checkpoint(layout, tmp_path) / f"{DIT_FILE[layout]}.safetensors"
        key, given, expected = {
            "diffusers": ("blocks.1.ffn.net.2.weight", r"\[96, 64\]", r"\[64, 96\]"),
            "official": ("blocks.1.ffn.2.weight", r"\[160, 128\]", r"\[128, 160\]"),
        }[layout]
        edit(file, lambda tensors: tensors.update({key: tensors[key].T.copy()}))
        message = load_refused(tmp_path, "dit", f"given {given}, expected {expected}")
        assert key in message
        assert str(file) in message

    def test_quantised(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT_FILE[layout]}.safetensors"
        key = KEYS[layout][0]
        edit(file, lambda tensors: tensors.update({key: tensors[key].astype(np.int8)}))
        assert key in load_refused(tmp_path, "dit", "as int8; give a checkpoint that is not quantised")

    def test_in_two_shards(self, layout, tmp_path):
        file = copy_checkpoint(layout, tmp_path) / f"{DIT_FILE[layout]}.safetensors"
        index = shard(file, 200_000)
        key = next(iter(safetensors.numpy.load_file(sorted(file.parent.glob("*-00001-of-*"))[0])))
        edit(sorted(file.parent.glob("*-00002-of-*"))[0], lambda t: t.update({key: np.zeros(2, np.float32)}))
        assert key in load_refused(tmp_path, "dit", "disagree about 1 tensor")
        assert index.exists()


def test_tensor_under_two_names(tmp_path):
    copy_checkpoint("diffusers", tmp_path)
    name = "post_layernorm.bias"
    edit(tmp_path / "image_encoder/model.safetensors", lambda t: t.update({f"vision_model.{name}": t[name].copy()}))
    load_refused(tmp_path, "clip", r"has the tensor post_layernorm\.bias twice, as .* and as .*; remove one")


def test_other_size_than_the_configuration(tmp_path):
    copy_checkpoint("official", tmp_path)
    edit_json(tmp_path / "config.json", num_layers=2)
    load_refused(tmp_path, "dit", r"unknown tensors: blocks\.2\.")


@pytest.mark.parametrize("size", [0, 5, 200, 100_000, -1])
def test_truncated_file(size, tmp_path):
    file = copy_checkpoint("official", tmp_path) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in load_refused(tmp_path, "dit", "download it again")


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
    assert str(file) in load_refused(tmp_path, "dit", "download it again")


def test_offsets_that_overlap(tmp_path):
    file = copy_checkpoint("official", tmp_path) / "diffusion_pytorch_model.safetensors"
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    assert str(file) in load_refused(tmp_path, "dit", "offsets of b")


def test_index_that_names_a_missing_file(tmp_path):
    file = copy_checkpoint("diffusers", tmp_path) / "transformer/diffusion_pytorch_model.safetensors"
    index = shard(file, 200_000)
    lost = sorted(file.parent.glob("*-00002-of-*"))[0]
    lost.unlink()
    message = load_refused(tmp_path, "dit", "names 1 missing file")
    assert lost.name in message
    assert str(index) in message


def test_index_without_a_map(tmp_path):
    index = shard(copy_checkpoint("diffusers", tmp_path) / "transformer/diffusion_pytorch_model.safetensors", 200_000)
    edit_json(index, weight_map={"a": "../elsewhere.safetensors"})
    load_refused(tmp_path, "dit", "no valid weight_map")


def test_index_beside_a_single_file(tmp_path):
    file = copy_checkpoint("diffusers", tmp_path) / "transformer/diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    shard(file, 200_000)
    file.write_bytes(whole)
    load_refused(tmp_path, "dit", "has both .* remove the one that is old")


def test_pth_without_torch(tmp_path, monkeypatch):
    copy_checkpoint("official", tmp_path)
    (tmp_path / "Wan2.1_VAE.safetensors").rename(tmp_path / "Wan2.1_VAE.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    load_refused(tmp_path, "vae", r"needs torch.*wanjax\[torch\].*Wan2\.1_VAE\.safetensors")


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
    load_refused(tmp_path, network, match)


@pytest.mark.parametrize(
    ("text", "match"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "no JSON object"), ("{}", "no entry")]
)
def test_damaged_configuration(text, match, tmp_path):
    file = copy_checkpoint("diffusers", tmp_path) / "text_encoder/config.json"
    file.unlink() if text is None else file.write_text(text)
    assert str(file) in load_refused(tmp_path, "umt5", match)


def test_official_file_of_something_else(tmp_path):
    copy_checkpoint("official", tmp_path)
    edit(tmp_path / "Wan2.1_VAE.safetensors", lambda t: (t.clear(), t.update({"x": np.zeros(2, np.float32)})))
    load_refused(tmp_path, "vae", r"lacks the tensor encoder\.conv1\.weight")


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"is no Wan checkpoint; give a folder with either"):
        Checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"holds a WanTransformer3DModel alone; give .* the one above"):
        Checkpoint(GOLDEN / "diffusers/transformer")
    copy_checkpoint("official", tmp_path)
    copy_checkpoint("diffusers", tmp_path)
    with pytest.raises(InputError, match="has both layouts"):
        Checkpoint(tmp_path)


def test_one_of_two_experts(tmp_path):
    copy_checkpoint("diffusers", tmp_path / "d")
    edit_json(tmp_path / "d/model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(InputError, match=r"two experts, of which transformer_2/ is missing; download it too"):
        Checkpoint(tmp_path / "d")
    (tmp_path / "o/high_noise_model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"two experts, of which low_noise_model/ is missing; download it too"):
        Checkpoint(tmp_path / "o")


def test_check_refuses_what_load_refuses(tmp_path):
    file = copy_checkpoint("official", tmp_path) / "diffusion_pytorch_model.safetensors"
    Checkpoint(tmp_path).check("dit", Checkpoint(tmp_path).config("dit"))
    edit(file, lambda tensors: tensors.pop("head.head.bias"))
    with pytest.raises(InputError, match=r"lacks 1 tensor: head\.head\.bias"):
        Checkpoint(tmp_path).check("dit", Checkpoint(tmp_path).config("dit"))
