"""Files and folders that appear whole or not at all; what `wanjax.media` writes with them is in test_media."""

import dataclasses
import os
from pathlib import Path

import pytest
from tiny import TRAIN, assert_same_model, golden

from wanjax.files import put, replacing
from wanjax.training.export import write_checkpoint
from wanjax.weights import Checkpoint


def fill(folder, text):
    folder.mkdir()
    (folder / "a.txt").write_text(text)
    return folder


def test_put_replaces_files_and_folders(tmp_path):
    put(fill(tmp_path / "new", "new"), tmp_path / "target")
    put(fill(tmp_path / "new", "newer"), tmp_path / "target")
    assert (tmp_path / "target/a.txt").read_text() == "newer"
    put(tmp_path / "target/a.txt", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["file", "target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_block_that_fails_leaves_what_was_there(error, kind, tmp_path):
    target = fill(tmp_path / "target", "old") if kind == "folder" else tmp_path / "target"
    if kind == "file":
        target.write_text("old")

    def write():
        with replacing(target) as path:
            (fill if kind == "folder" else Path.write_text)(path, "half")
            raise error

    with pytest.raises(error):
        write()
    assert (target / "a.txt" if kind == "folder" else target).read_text() == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_a_trained_model_stays_until_the_next_has_its_place(tmp_path, monkeypatch):
    config = dataclasses.replace(TRAIN, workdir=str(tmp_path))
    clip = golden("diffusers", "clip")
    write_checkpoint(config, {"clip": clip})
    rename = os.rename
    # A disk that cannot exchange two names at once, as most network disks cannot.
    monkeypatch.setattr("wanjax.files._exchange", lambda a, b: False)

    def fail(source, target):
        if source == tmp_path / "model.new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="Input/output"):
            write_checkpoint(config, {"clip": clip})
    checkpoint = Checkpoint(tmp_path / "model")
    assert_same_model(checkpoint.load("clip", checkpoint.config("clip")), clip)
    fill(tmp_path / "beside", "beside")
    write_checkpoint(config, {"clip": clip}, tmp_path / "beside")  # a folder that the other left is in nobody's way
    assert (tmp_path / "model/beside/a.txt").read_text() == "beside"
    assert sorted(os.listdir(tmp_path)) == ["beside", "model"]
