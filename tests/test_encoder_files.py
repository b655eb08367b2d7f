"""Files of encoders as ComfyUI and open_clip spell them: the tokenizer inside umT5's, CLIP's other names, `.bin`."""

import json
import shutil
import sys
import types

import gguf
import numpy as np
import pytest
import safetensors.numpy
from tiny import GOLDEN, assert_same_model
from tiny_checkpoints import copy_checkpoint

from wanjax.commands import convert as convert_command
from wanjax.conditioning.text import Tokenizer
from wanjax.errors import InputError
from wanjax.weights import Checkpoint, hub
from wanjax.weights.spiece import Piece, read_model, tokenizer_json

NAME = "diffusion_pytorch_model.safetensors"
DIFFUSERS, OFFICIAL = GOLDEN / "diffusers", GOLDEN / "official"


@pytest.fixture(scope="module")
def spiece():
    with np.load(GOLDEN / "spiece.npz") as file:
        return dict(file)


def load(checkpoint, name):
    return checkpoint.load(name, checkpoint.config(name))


def test_sentencepiece_models_tokenize_as_the_library(spiece):
    """Words, bytes of what is unknown, the model's own normalising, no words of control tokens."""
    tokenizer = Tokenizer(tokenizer_json(spiece["model"].tobytes()), 64)
    for i, text in enumerate(spiece["texts"]):
        ids, mask = tokenizer([str(text)])
        if "<pad>" not in text:  # transformers, and umT5's published tokenizer.json, take it for the token
            np.testing.assert_array_equal(ids[mask], spiece[f"ids{i}"], err_msg=text)
        assert ids[mask][-1] == 1
        assert not ids[~mask].any()


def umt5_file(path, model):
    """The golden umT5 as ComfyUI writes it."""
    tensors = safetensors.numpy.load_file(DIFFUSERS / "text_encoder/model.safetensors")
    safetensors.numpy.save_file(tensors | {"spiece_model": np.frombuffer(model, np.uint8)}, path)
    return path


def test_the_tokenizer_inside_is_used_where_there_is_no_other(tmp_path, spiece):
    model = spiece["model"].tobytes()
    files = {"dit": OFFICIAL / NAME, "umt5": umt5_file(tmp_path / "umt5.safetensors", model)}
    inside = Checkpoint(None, files).tokenizer
    assert inside == tokenizer_json(model)
    assert Checkpoint(DIFFUSERS, files).tokenizer == DIFFUSERS / "tokenizer"
    assert Checkpoint(None, files, "mine.json").tokenizer.name == "mine.json"
    argv = [str(tmp_path / "out"), "--layout", "diffusers", "--text-encoder", str(files["umt5"])]
    convert_command.main(argv)
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_bytes() == inside
    for damaged in (b"", model[:-7], b"\x0a\xff\xff\xff\xff\x7f"):
        umt5_file(files["umt5"], damaged + b"\0")
        with pytest.raises(InputError, match=r"its tokenizer is .*; give a tokenizer.json as --tokenizer"):
            _ = Checkpoint(None, files).tokenizer


def gguf_file(path, spiece, kind="t5", kinds=None):
    """The golden umT5 as llama.cpp writes it, with its tokenizer and a few words that fill its table up."""
    pieces, charsmap = read_model(spiece["model"].tobytes())
    pieces += [Piece(f"[PAD{i}]", -10000.0, 5) for i in range(3)]
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tokenizer_model(kind)
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.kind for piece in pieces] if kinds is None else kinds)
    if charsmap:
        writer.add_precompiled_charsmap(charsmap)
    names = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    for key, x in safetensors.numpy.load_file(DIFFUSERS / "text_encoder/model.safetensors").items():
        if key != "encoder.embed_tokens.weight":
            writer.add_tensor(names.get(key, key), x.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_tokenizer_of_a_gguf_is_used(tmp_path, spiece):
    files = {"dit": OFFICIAL / NAME, "umt5": gguf_file(tmp_path / "umt5.gguf", spiece)}
    inside = json.loads(Checkpoint(None, files).tokenizer)
    assert inside == json.loads(tokenizer_json(spiece["model"].tobytes()))
    files["umt5"] = gguf_file(tmp_path / "other.gguf", spiece, "llama")
    with pytest.raises(InputError, match=r"its tokenizer is one of the kind 'llama'.*; give a tokenizer.json"):
        _ = Checkpoint(None, files).tokenizer
    files["umt5"] = gguf_file(tmp_path / "short.gguf", spiece, kinds=[1, 1])
    with pytest.raises(InputError, match=r"its tokenizer is one of .* words, .* and 2 kinds; give a tokenizer.json"):
        _ = Checkpoint(None, files).tokenizer


def open_clip(tensors):
    """The official tower's tensors as open_clip has them, and a few of its text tower's."""
    names = {
        "visual.patch_embedding.": "visual.conv1.", "visual.pre_norm.": "visual.ln_pre.", "visual.head": "visual.proj",
        "visual.post_norm.": "visual.ln_post.", "visual.pos_embedding": "visual.positional_embedding",
        "visual.cls_embedding": "visual.class_embedding", "visual.transformer.": "visual.transformer.resblocks.",
        ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".to_qkv.": ".in_proj_", ".attn.proj.": ".attn.out_proj.",
        ".mlp.0.": ".mlp.c_fc.", ".mlp.2.": ".mlp.c_proj.",
    }  # fmt: skip
    out = {"logit_scale": np.ones((), np.float32), "token_embedding.weight": np.ones((4, 2), np.float32),
           "transformer.resblocks.0.ln_1.weight": np.ones(2, np.float32)}  # fmt: skip
    for key, x in tensors.items():
        if not key.startswith("visual."):
            continue
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        out[key] = x.reshape(x.shape[-2:]) if "positional" in key else x.reshape(-1) if "class_" in key else x
    return out


def test_clip_in_open_clips_spelling(tmp_path):
    official = Checkpoint(OFFICIAL)
    (source,) = official.weights("clip").files
    with source.open() as reader:
        tensors = {key: np.array(reader.view(key)) for key in source.infos}
    path = tmp_path / "clip.safetensors"
    safetensors.numpy.save_file(open_clip(tensors), path)
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in safetensors.numpy.load_file(path)
    ours = Checkpoint(None, {"clip": path})
    assert ours.config("clip") == official.config("clip")
    assert_same_model(load(ours, "clip"), load(official, "clip"))
    with pytest.raises(InputError, match="is a CLIP, as its tensors say; give a umT5's file"):
        Checkpoint(None, {"umt5": path})


def test_bin(tmp_path, monkeypatch):
    """PyTorch's own files are read by torch; here by a stand-in that knows one."""
    folder = copy_checkpoint("diffusers", tmp_path / "c")
    part = folder / "transformer"
    tensors = safetensors.numpy.load_file(part / NAME)
    (part / NAME).rename(part / "diffusion_pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.bin needs torch, .* pip install 'wanjax\[torch\]'"):
        Checkpoint(folder).config("dit")

    class Tensor:
        def __init__(self, x):
            self.x, self.dtype = x, f"torch.{x.dtype}"

        def element_size(self):
            return self.x.itemsize

        def view(self, dtype):
            return types.SimpleNamespace(numpy=lambda: self.x.view(dtype))

    stand_in = types.SimpleNamespace(
        Tensor=Tensor, int32=np.int32, load=lambda path, **_: {key: Tensor(x) for key, x in tensors.items()}
    )
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    assert_same_model(load(Checkpoint(folder), "dit"), load(Checkpoint(DIFFUSERS), "dit"))


def test_a_snapshot_of_the_hub(tmp_path, monkeypatch):
    """Its folder is links into a store of files without endings; as the hub's library leaves it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    for i, file in enumerate(sorted(x for x in DIFFUSERS.rglob("*") if x.is_file() and x.suffix != ".npz")):
        link = snapshot / file.relative_to(DIFFUSERS)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / f"{i:064x}")
        link.symlink_to(blobs / f"{i:064x}")
    library = types.SimpleNamespace(snapshot_download=lambda name, **_: str(snapshot))
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    folder = hub.checkpoint_folder("Wan-AI/Some-Diffusers")
    assert folder == snapshot
    assert_same_model(load(Checkpoint(folder), "umt5"), load(Checkpoint(DIFFUSERS), "umt5"))
    assert Tokenizer(Checkpoint(folder).tokenizer)(["a red"])[1].any()
