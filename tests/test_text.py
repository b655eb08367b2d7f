"""Cleaning, tokenising and encoding of prompts."""

import json
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import GOLDEN, golden_arrays

from wanjax.conditioning.text import NEGATIVE_PROMPTS, Tokenizer, clean, encode_text
from wanjax.errors import InputError
from wanjax.weights import Checkpoint

TOKENIZER = GOLDEN / "official/google/umt5-xxl"
CASE = json.loads((GOLDEN / "official/case.json").read_text())
EXPECTED = golden_arrays("official")


def test_cleaning_equals_official():
    assert [clean(text) for text in CASE["tok_texts"]] == CASE["tok_cleaned"]


def test_ids_equal_official():
    ids, mask = Tokenizer(TOKENIZER)(CASE["tok_texts"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, EXPECTED["tok_ids"])
    np.testing.assert_array_equal(mask, np.arange(512) < EXPECTED["tok_len"][:, None])


@pytest.mark.parametrize("text", ["prompt", "negative"])
def test_prompt_ids_equal_official(text):
    prompt = CASE["prompt" if text == "prompt" else "negative_prompt"]
    ids, mask = Tokenizer(TOKENIZER)([prompt])
    np.testing.assert_array_equal(ids[0], EXPECTED[f"{text}_ids"])
    assert mask.sum() == EXPECTED[f"{text}_len"]


def test_a_cut_text_keeps_its_end_token_and_says_so(caplog):
    ids, mask = Tokenizer(TOKENIZER, length=8)(["a", "a small blue bird takes off from the ground"])
    assert ids.shape == (2, 8)
    assert ids[1, -1] == 1
    assert mask[1].all()
    assert not mask[0].all()
    assert [record.getMessage() for record in caplog.records] == [
        "text longer than 8 tokens, the rest is ignored: a small blue bird takes off from the ground..."
    ]


def test_default_negative_prompts():
    assert NEGATIVE_PROMPTS["flf2v"] == CASE["official_defaults"]["negative_prompt"]
    assert NEGATIVE_PROMPTS["flf2v"] == "镜头切换，" + NEGATIVE_PROMPTS["i2v"]
    assert NEGATIVE_PROMPTS["i2v"] == "镜头晃动，" + NEGATIVE_PROMPTS["t2v"]


@pytest.mark.parametrize("text", ["prompt", "negative"])
def test_features_are_zero_past_the_text(text):
    checkpoint = Checkpoint(GOLDEN / "diffusers")
    encoder = checkpoint.load("umt5", checkpoint.config("umt5"))
    case = json.loads((checkpoint.path / "case.json").read_text())
    ids, mask = Tokenizer(checkpoint.tokenizer)([case["prompt" if text == "prompt" else "negative_prompt"]])
    features = np.asarray(jax.jit(encode_text)(encoder, ids, mask))
    reference = golden_arrays(checkpoint.path.name)[f"{text}_embeds"]
    assert np.abs(features - reference).max() <= 1e-4 * max(1, np.abs(reference).max())
    assert not features[~mask].any()


def test_no_network_and_no_transformers(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refuse)
    assert Tokenizer(TOKENIZER)(["a"])[1].sum() > 1
    monkeypatch.undo()
    program = "import sys, wanjax.conditioning.text; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_unusable_folders(tmp_path):
    with pytest.raises(InputError, match=r"holds no tokenizer.json; .*; copy"):
        Tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot be read \(.*\); expected .*; copy"):
        Tokenizer(tmp_path)
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**settings, "post_processor": None}))
    with pytest.raises(InputError, match="adds no </s>"):
        Tokenizer(tmp_path)


def test_a_file_that_the_library_panics_at(tmp_path, capfd):
    """Its special tokens are not those of its template."""
    settings = json.loads((GOLDEN / "diffusers/tokenizer/tokenizer.json").read_text())
    settings["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"tokenizer.json cannot be read \(.*\); expected a tokenizers file; copy it"):
        Tokenizer(tmp_path)
    assert capfd.readouterr().err == ""
