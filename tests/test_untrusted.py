"""Files that somebody else made: opened in one way, refused in one line, never executed."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import PIL.Image
import pytest
from tiny import DIFFUSERS, ROOT, environment
from tiny_checkpoints import copy_checkpoint, edit_json

from wanjax import media, untrusted
from wanjax.conditioning.images import read_image
from wanjax.config import SampleConfig, load_config
from wanjax.data.listing import read_manifest
from wanjax.errors import InputError
from wanjax.sampling import calibration, compile_cache
from wanjax.sampling.compile_cache import ExecutableCache
from wanjax.weights import Checkpoint
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.tensors import SafetensorsFile

DEEP = "[" * 200_000 + "]" * 200_000


def header(text, body=b""):
    text = text if isinstance(text, bytes) else text.encode()
    return len(text).to_bytes(8, "little") + text + body


def within(seconds, work):
    """What `work` raises; it may not take longer."""
    raised = []

    def run():
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()
    return raised[0]


READERS = {
    "p.png": read_image,
    "n.npy": lambda path: media.load_noise(path, (1, 1, 1, 1, 1)),
    "c.json": calibration.read,
    "m.jsonl": read_manifest,
    "m.csv": read_manifest,
    "c.py": lambda path: load_config(str(path), SampleConfig),
    "l.safetensors": LoRAFile,
    "t.safetensors": SafetensorsFile,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "NUL", "newline", "long"])
def test_what_is_no_file(name, kind, tmp_path):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = {"NUL": "a\0b", "newline": "a\n\x1b[31mb", "long": "x" * 5000}[kind] + name
    error = within(10, lambda: READERS[name](path))
    assert isinstance(error, (InputError, OSError))
    assert isinstance(error, InputError) or error.strerror
    assert str(error).isprintable()


@pytest.mark.parametrize("name", ["c.json", "m.jsonl", "t.safetensors", "l.safetensors"])
def test_json_that_is_nested_too_deeply(name, tmp_path):
    (tmp_path / name).write_bytes(header(DEEP) if name.endswith("safetensors") else DEEP.encode())
    with pytest.raises(InputError):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}', '{"a": -Infinity}', DEEP, "\udc80"])
def test_json_is_as_the_standard_has_it(text):
    with pytest.raises(ValueError, match=r"."):
        untrusted.parse_json(text)


# ---- pictures


def test_a_picture_of_another_format_is_no_picture(tmp_path):
    """PostScript called .png would be run by Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o700)
    (tmp_path / "p.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n%%EndComments\nshowpage\n")
    code = f"from wanjax.conditioning.images import read_image; read_image({str(tmp_path / 'p.png')!r})"
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert "p.png is not a picture; accepted: PNG" in ran.stderr
    assert not (tmp_path / "ran").exists()


def test_a_picture_has_a_largest_size(tmp_path):
    for width, height in ((20_000, 10_000), (12_000, 12_000)):
        PIL.Image.new("1", (width, height)).save(tmp_path / "large.png")
        with pytest.raises(InputError, match=r"large.png: .*up to 134,217,728 pixels are accepted; make it smaller"):
            read_image(tmp_path / "large.png")


def test_damage_beside_the_pixels_is_not_spoken_of(tmp_path):
    PIL.Image.new("RGB", (48, 32)).save(tmp_path / "p.tiff")
    data = (tmp_path / "p.tiff").read_bytes()
    for end in range(8, len(data), 97):  # warnings are errors here
        (tmp_path / "p.png").write_bytes(data[:end])
        with pytest.raises(InputError, match=r"p\.png"):
            read_image(tmp_path / "p.png")


# ---- arrays


def npy(descr="<f4", shape=(1,), data=b"\0" * 4):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04" + bytes(30),
        npy(descr="|O"),
        npy(shape=(2**60,)),
        npy(shape=(1, 1, 1, 1, 2)),
        npy(shape=(-1,)),
        npy(descr="<f8", shape=(1, 1, 1, 1, 1), data=np.float64(1e300).tobytes()),
        npy(descr=[("a", "<f4")]),
        npy()[:20],
    ],
)
def test_arrays_that_are_none(data, tmp_path):
    (tmp_path / "n.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"initial noise .*n.npy .*accepted: an .npy file"):
        media.load_noise(tmp_path / "n.npy", (1, 1, 1, 1, 1))


# ---- checkpoints and adapters


def test_a_header_is_not_read_beyond_its_limit(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((20 * 10**9).to_bytes(8, "little"))
        file.truncate(21 * 10**9)  # on disk it is nothing
    error = within(2, lambda: SafetensorsFile(path))
    assert isinstance(error, InputError)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]},
        {"dtype": [], "shape": [1], "data_offsets": [0, 4]},
        "F32",
        None,
    ],
)
def test_headers_of_something_else(entry, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header(json.dumps({"a": entry}), bytes(4)))
    with pytest.raises(InputError, match=r"x.safetensors has a header that cannot be read"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("layout", "place", "entry", "network"),
    [
        ("diffusers", "transformer", "num_layers", "dit"),
        ("diffusers", "transformer", "attention_head_dim", "dit"),
        ("diffusers", "text_encoder", "num_layers", "umt5"),
        ("diffusers", "image_encoder", "num_hidden_layers", "clip"),
        ("diffusers", "vae", "num_res_blocks", "vae"),
        ("official", ".", "num_layers", "dit"),
        ("official", ".", "dim", "dit"),
        ("official", ".", "text_len", "dit"),
    ],
)
def test_sizes_that_no_tensor_has(layout, place, entry, network, tmp_path):
    """A network of 10^9 layers is not built to find out that it does not fit."""
    copy_checkpoint(layout, tmp_path)
    edit_json(tmp_path / place / "config.json", **{entry: 10**9})
    with pytest.raises(InputError, match=r"0{9}"):  # or the memory is full, and the test does not end
        Checkpoint(tmp_path).config(network)


def lora(tmp_path, metadata=None, **tensors):
    import safetensors.numpy

    x = {"blocks.0.attn1.to_q.lora_A.weight": np.ones((2, 64)), "blocks.0.attn1.to_q.lora_B.weight": np.ones((64, 2))}
    x |= {f"blocks.0.attn1.to_q.{name}": value for name, value in tensors.items()}
    x = {name: np.asarray(value, np.float32) for name, value in x.items()}
    safetensors.numpy.save_file(x, tmp_path / "l.safetensors", metadata)
    return tmp_path / "l.safetensors"


@pytest.mark.parametrize("alpha", [np.nan, np.inf, [1.0, 2.0], []])
def test_alpha_of_a_lora_is_a_number(alpha, tmp_path):
    with pytest.raises(InputError, match=r"alpha is .*; a finite number is accepted"):
        LoRAFile(lora(tmp_path, alpha=alpha))


def test_one_layer_of_rank_0(tmp_path):
    path = lora(tmp_path)
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(path)
    tensors |= {
        "blocks.1.attn1.to_q.lora_A.weight": np.zeros((0, 64), np.float32),
        "blocks.1.attn1.to_q.lora_B.weight": np.zeros((64, 0), np.float32),
    }
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(InputError, match=r"1 tensor.* of another shape"):
        LoRAFile(path).terms(Checkpoint(DIFFUSERS).config("dit"))


@pytest.mark.parametrize(
    "settings",
    [DEEP, "[1]", '{"transformer.lora_alpha": "x"}', '{"transformer.lora_alpha": NaN}',
     '{"transformer.alpha_pattern": {"(a+)+$": 1}}', '{"transformer.alpha_pattern": [1]}',
     '{"transformer.alpha_pattern": {".*": true}}'],
)  # fmt: skip
def test_metadata_of_a_lora(settings, tmp_path):
    path = lora(tmp_path, {"lora_adapter_metadata": settings})
    error = within(5, lambda: LoRAFile(path).terms(Checkpoint(DIFFUSERS).config("dit")))
    assert isinstance(error, InputError)


# ---- configurations


@pytest.mark.parametrize(
    "body", ["import sys; sys.exit(0)", "raise KeyError('x')", "return {}['x']", "raise InputError('x')"]
)
def test_a_config_that_ends_the_program(body, tmp_path):
    (tmp_path / "c.py").write_text(f"from wanjax.errors import InputError\ndef get_config():\n    {body}\n")
    with pytest.raises(InputError, match=r"config .*c.py.*x?"):
        load_config(str(tmp_path / "c.py"), SampleConfig)


# ---- compiled programs


def test_programs_that_others_may_write_are_left_alone(tmp_path, capsys):
    import jax

    def ran(folder):
        return float(ExecutableCache(folder)(jax.jit(lambda x: x + 1), 1.0))

    folder = tmp_path / "programs"
    assert ran(folder) == 2
    (program,) = (file for file in folder.iterdir() if file.is_file())
    assert program.stat().st_mode & 0o077 == 0
    assert capsys.readouterr().err == ""
    program.chmod(0o666)
    program.write_bytes(b"planted")
    assert ran(folder) == 2
    assert f"compiled programs in {program} are left alone: others may write to it" in capsys.readouterr().err
    folder.chmod(0o777)
    program.unlink()
    assert ran(folder) == 2
    assert not program.exists()
    assert f"compiled programs in {folder} are left alone: others may write to it" in capsys.readouterr().err
    compile_cache.use_persistent_cache(folder)
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_programs_of_another_user_are_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not compile_cache.trusted(tmp_path)
    assert "owns it" in capsys.readouterr().err


# ---- videos


def test_a_video_is_no_list_of_other_files(tmp_path):
    from wanjax.data.decode import Damaged, probe

    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    (tmp_path / "play.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    media.write_video(tmp_path / "other.mp4", np.zeros((5, 32, 32, 3), np.uint8), 16)
    for name in ("list.mp4", "play.mp4", "pipe.mp4"):
        assert isinstance(within(10, lambda name=name: probe(tmp_path / name)), Damaged)


# ---- where to write


@pytest.mark.parametrize(
    "path",
    ["gs://bucket/v.mp4", "a\0.mp4", "a\nb.mp4", "loop/v.mp4", "pipe.mp4", "x" * 5000 + ".mp4", ".mp4", "v.mp4."],
)
def test_outputs_that_are_none(path, tmp_path, monkeypatch):
    from wanjax.files import check_output

    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.mp4")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"^output .*accepted") as caught:
        check_output(path)
    assert str(caught.value).isprintable()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loop", "pipe.mp4"]


SAMPLES = """
import re, sys
from pathlib import Path
from wanjax import commands

try:
    commands.main(["sample", "--checkpoint", sys.argv[1], "--prompt", "x", "--compile-cache", "off"])
finally:  # what getrusage says begins with the memory of the process that started this one
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
SIZES_OF_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}


def claim_28_gb(file):
    """A header whose first tensor has 28 GB, in a file of that size with nothing in it."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = next(name for name in header if name != "__metadata__")
    lie = {name: {"dtype": "F32", "shape": [7 * 10**9], "data_offsets": [0, 28 * 10**9]}}
    text = json.dumps(lie).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + 28 * 10**9)


@pytest.mark.parametrize("lie", ["sizes", "layers", "header"])
def test_a_lie_of_14b_costs_no_memory(tmp_path, lie):
    """Where files claim what they do not have, headers alone are read."""
    copy_checkpoint("diffusers", tmp_path / "c")
    if lie == "header":
        claim_28_gb(tmp_path / "c/transformer/diffusion_pytorch_model.safetensors")
    else:
        edit_json(tmp_path / "c/transformer/config.json", **(SIZES_OF_14B if lie == "sizes" else {"num_layers": 10**9}))
    command, place = [sys.executable, "-c", SAMPLES, str(tmp_path / "c")], {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, env=environment(1, **place), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert int(run.stdout) < 500_000, f"{run.stdout} kB"
