"""What is not written and why, what is left behind, and the command."""

import importlib
import shutil

import numpy as np
import pytest
from tiny import GOLDEN, golden
from tiny_checkpoints import CLIP_FILE, DIT_FILE, EXTRA, UMT5_FILE, VAE_FILE, copy_checkpoint, edit, edit_json

from wanjax.commands import main
from wanjax.errors import InputError
from wanjax.weights import Checkpoint, convert, save

# The package's `save` is the function; this is the module that it is in.
save_module = importlib.import_module("wanjax.weights.save")


def assert_nothing_left(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_target_that_is_not_empty(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty; give another folder"):
        convert(GOLDEN / "official", tmp_path / "new", "diffusers")
    assert_nothing_left(tmp_path, "new")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        convert(GOLDEN / "official", tmp_path / "file", "diffusers")
    assert (tmp_path / "file").read_text() == "mine"


def test_empty_target_is_taken(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    save(tmp_path / "link", "diffusers", {"clip": golden("diffusers", "clip")})
    assert Checkpoint(tmp_path / "new").has("clip")
    assert_nothing_left(tmp_path, "new", "link")


def test_target_inside_the_source(tmp_path):
    source = copy_checkpoint("official", tmp_path / "source")
    for place in (source / "new", source / "google/umt5-xxl/new", tmp_path / "x/../source/new"):
        with pytest.raises(InputError, match=r"inside .* give a folder outside"):
            convert(source, place, "diffusers")
    assert not (source / "new").exists()


def test_target_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(save_module._Writer, "write", lambda *_: pytest.fail("work began"))
    with pytest.raises(InputError, match="cannot be written"):
        convert(GOLDEN / "official", tmp_path / "file/new", "diffusers")


def test_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs 0\.0 GB, but 0\.0 GB are free"):
        convert(GOLDEN / "official", tmp_path / "new", "diffusers")
    assert_nothing_left(tmp_path)


def test_what_came_into_the_target_meanwhile_stays(tmp_path, monkeypatch):
    def take_the_place(*_):
        (tmp_path / "new").mkdir()
        (tmp_path / "new/mine.txt").write_text("mine")

    monkeypatch.setattr(Checkpoint, "check", take_the_place)  # the last that is done
    with pytest.raises(InputError, match="exists and is not empty"):
        save(tmp_path / "new", "diffusers", {"clip": golden("diffusers", "clip")})
    assert (tmp_path / "new/mine.txt").read_text() == "mine"
    assert_nothing_left(tmp_path, "new")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_on_the_way_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(*_):
        assert len(list(tmp_path.iterdir())) == 1
        assert not (tmp_path / "new").exists()
        raise error

    monkeypatch.setattr(Checkpoint, "check", fail)  # the last that is done
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        save(tmp_path / "new", "diffusers", {"clip": golden("diffusers", "clip")})
    assert_nothing_left(tmp_path)


def test_same_layout(tmp_path):
    with pytest.raises(InputError, match="has the official layout already; nothing to convert"):
        convert(GOLDEN / "official", tmp_path / "new", "official")


def test_nothing_to_write(tmp_path):
    with pytest.raises(InputError, match="no network to write"):
        save(tmp_path / "new", "official", {})


def test_unsound_source_is_refused_before_the_work(tmp_path):
    source = copy_checkpoint("diffusers", tmp_path / "source")
    edit(source / "vae/diffusion_pytorch_model.safetensors", lambda t: t.pop("quant_conv.bias"))
    with pytest.raises(InputError, match=r"lacks 1 tensor: quant_conv\.bias"):
        convert(source, tmp_path / "new", "official", pth=False)
    assert_nothing_left(tmp_path, "source")


def test_tensors_to_be_joined_in_different_dtypes(tmp_path):
    source = copy_checkpoint("diffusers", tmp_path / "source")
    key = "encoder.layers.0.self_attn.k_proj.weight"
    edit(source / "image_encoder/model.safetensors", lambda t: t.update({key: t[key].astype(np.float16)}))
    with pytest.raises(InputError, match=rf"{key}.* in different dtypes"):
        convert(source, tmp_path / "new", "official", pth=False)


def test_pth_without_torch(tmp_path, monkeypatch):
    """Asked for: refused. Not asked for: twins that wanjax reads, and a line that says so."""
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"Writing \.pth needs torch"):
        convert(GOLDEN / "diffusers", tmp_path / "new", "official", pth=True)
    lines = []
    convert(GOLDEN / "diffusers", tmp_path / "new", "official", say=lines.append)
    assert {file.name for file in (tmp_path / "new").glob("*.safetensors")} == {
        f"{stem['official']}.safetensors" for stem in (DIT_FILE, VAE_FILE, UMT5_FILE, CLIP_FILE)
    }
    assert sum("not as .pth, which needs torch" in line for line in lines) == 3


def test_damaged_extra(tmp_path):
    convert(GOLDEN / "official", tmp_path / "new", "diffusers")
    edit_json(tmp_path / "new" / EXTRA / "extra.json", surprise=1)
    with pytest.raises(InputError, match=r"extra\.json is damaged"):
        Checkpoint(tmp_path / "new")


# ---- the command


def test_command(tmp_path, capsys):
    new = [str(GOLDEN / "official"), str(tmp_path / "new"), "--layout", "diffusers", "--max-shard-gb", "0.001"]
    main(["convert", *new])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{tmp_path / 'new'} has the diffusers layout."
    written = {line.split()[1] for line in lines if line.startswith("wrote ")}
    assert "transformer/diffusion_pytorch_model-00001-of-00004.safetensors" in written
    assert "model_index.json" in written
    assert all((tmp_path / "new" / name).is_file() for name in written)
    assert "The schedule's shift is not in the source: 16.0 is taken, the official default." in lines
    back = [str(tmp_path / "new"), str(tmp_path / "back"), "--layout", "official", "--no-pth", "--flow-shift", "3"]
    main(["convert", *back])
    assert Checkpoint(tmp_path / "back").flow_shift == 3.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nothing", "new"], "nothing is not a folder"),
        ([str(GOLDEN / "diffusers"), "new"], "has the diffusers layout already"),
        (
            [str(GOLDEN / "official"), "new", "--max-shard-gb", "0"],
            "--max-shard-gb 0; a number above 0 to 1000000 is accepted",
        ),
        (
            [str(GOLDEN / "official"), "new", "--flow-shift", "nan"],
            "--flow-shift nan; a number above 0 to 1000 is accepted",
        ),
        ([str(GOLDEN / "official"), str(GOLDEN)], "exists and is not empty"),
    ],
)
def test_command_refuses_in_one_line(arguments, match, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *arguments, "--layout", "diffusers"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert match in printed.err
    assert printed.err.count("\n") == 1
