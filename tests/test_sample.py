"""The whole run through the command line, against both references; and every bad input."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from tiny import DIFFUSERS, OFFICIAL, flags, golden_arrays, refused

import sample_jax
from wanjax.sampling.pipeline import Pipeline
from wanjax.weights import Checkpoint, save
from wanjax.weights.quantize import is_quantized


@pytest.mark.parametrize(
    ("layout", "solver", "latents", "video"),
    [
        (DIFFUSERS, "unipc", "pipeline_latents", "pipeline_video"),
        (OFFICIAL, "unipc", "unipc_latents", "unipc_video_f16"),
        (OFFICIAL, "dpmpp", "dpm_latents", "dpm_video_f16"),
    ],
)
def test_whole_run_equals_reference(tmp_path, capsys, layout, solver, latents, video):
    expected = golden_arrays(layout.name)
    noise = expected["init_noise"]
    np.save(tmp_path / "noise.npy", noise.reshape(1, *noise.shape[-4:]))
    files = {"initial_noise": tmp_path / "noise.npy", "save_latents": tmp_path / "l.npy", "output": tmp_path / "v.npy"}
    sample_jax.main(flags(layout, solver=solver, **files))

    ours = np.load(tmp_path / "l.npy")
    assert ours.dtype == np.float32
    assert ours.shape == np.load(tmp_path / "noise.npy").shape
    assert np.abs(ours - expected[latents].reshape(ours.shape)).max() <= 2e-3

    reference = expected[video].astype(np.float32)
    if layout == OFFICIAL:  # stored as [c, F, H, W] in [-1, 1]
        reference = (np.moveaxis(reference, 0, -1) + 1) / 2
    reference = reference.reshape(-1, *reference.shape[-3:])
    frames = np.load(tmp_path / "v.npy")
    assert frames.dtype == np.uint8
    every = frames.shape[1] // reference.shape[1]  # one video is stored with every second pixel
    assert np.abs(frames[:, ::every, ::every] / 255 - reference).max() <= 2 / 255

    out = capsys.readouterr()
    assert out.out.splitlines()[-1] == str(tmp_path / "v.npy")
    assert "denoise" in out.out.splitlines()[-2]


def test_first_frame_alone_and_defaults(tmp_path, capsys):
    """Size from the frame's aspect ratio at the area; a first frame alone is image to video; a seed repeats itself."""
    config = tmp_path / "config.py"
    config.write_text(
        "from wanjax.config import SampleConfig\ndef get_config():\n    return SampleConfig(area=48 * 64)\n"
    )
    run = {"last_frame": None, "height": None, "width": None, "negative_prompt": None, "shift": None, "steps": 2}
    for name in ("a", "b"):
        sample_jax.main(
            ["--config", str(config), *flags(DIFFUSERS, **run, output=tmp_path / f"{name}.npy", conventions="official")]
        )
    assert "first frame to video" in capsys.readouterr().out
    a, b = (np.load(tmp_path / f"{name}.npy") for name in ("a", "b"))
    assert a.shape == (9, 48, 64, 3)
    np.testing.assert_array_equal(a, b)


def t2v_checkpoint(folder):
    """The golden checkpoint with a text-to-video DiT: no image branch, 16 input channels."""
    shutil.copytree(DIFFUSERS, folder, ignore=shutil.ignore_patterns("image_*", "expected.npz"))
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    image = ("image_embedder", "add_k_proj", "add_v_proj", "norm_added_k")
    tensors = {k: v for k, v in tensors.items() if not any(part in k for part in image)}
    tensors["patch_embedding.weight"] = np.ascontiguousarray(tensors["patch_embedding.weight"][:, :16])
    safetensors.numpy.save_file(tensors, file)
    settings = json.loads((folder / "transformer/config.json").read_text())
    settings |= {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None, "in_channels": 16}
    (folder / "transformer/config.json").write_text(json.dumps(settings))
    return folder


def test_text_to_video_without_guidance(tmp_path):
    checkpoint = t2v_checkpoint(tmp_path / "t2v")
    run = {"checkpoint": checkpoint, "first_frame": None, "last_frame": None, "guidance": 1, "steps": 2}
    sample_jax.main(flags(DIFFUSERS, **run, solver="euler", output=tmp_path / "frames"))
    assert sorted(p.name for p in (tmp_path / "frames").iterdir()) == [f"{i:05d}.png" for i in range(9)]


def test_in_8_bits(tmp_path):
    """Not what the exact run gives, but close; and a checkpoint that is quantised already stays as it is."""
    run = {"steps": 2, "guidance": 1, "solver": "euler", "output": tmp_path / "v.npy"}
    latents = {}
    for name, switches in (("exact", {}), ("8 bits", {"quantize": "int8", "attention": "int8fp8"})):
        sample_jax.main(flags(OFFICIAL, **run, **switches, save_latents=tmp_path / f"{name}.npy"))
        latents[name] = np.load(tmp_path / f"{name}.npy")
    assert 0 < np.linalg.norm(latents["8 bits"] - latents["exact"]) < 0.02 * np.linalg.norm(latents["exact"])

    checkpoint = Checkpoint(OFFICIAL)
    dit = checkpoint.load("dit", dataclasses.replace(checkpoint.config("dit"), quantize="int8"))
    save(tmp_path / "int8", "official", {"dit": dit}, base=checkpoint, pth=False)
    for choice in (None, "int8"):
        config = sample_jax.parse(flags(OFFICIAL, checkpoint=tmp_path / "int8", quantize=choice))
        assert is_quantized(config)
        assert Pipeline(config).dit == dit.config
    words = ["--quantize fp8", "quantised to int8", "leave --quantize out"]
    refused(flags(OFFICIAL, checkpoint=tmp_path / "int8", quantize="fp8"), words)


def test_switches_that_are_off_change_nothing():
    plain, off = (
        Pipeline(sample_jax.parse(flags(OFFICIAL, **switches)))
        for switches in ({}, {"quantize": "off", "attention": "auto"})
    )
    assert plain.dit == off.dit == dataclasses.replace(plain.networks.checkpoint.config("dit"))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanjax.media.write_video", full)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    refused(flags(DIFFUSERS, steps=1, output=tmp_path / "v.mp4"), ["v.mp4", "No space left", "the video is in"])
    (rescued,) = tmp_path.glob("v-*.npy")
    assert np.load(rescued).shape == (9, 48, 64, 3)


def broken(tmp_path, kind):
    """A copy of the golden checkpoint with one fault."""
    folder = tmp_path / "checkpoint"
    if kind == "t2v":
        return t2v_checkpoint(folder)
    shutil.copytree(DIFFUSERS, folder, ignore=shutil.ignore_patterns("expected.npz"))
    file = folder / ("vae" if kind == "truncated" else "transformer") / "diffusion_pytorch_model.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return folder
    tensors = safetensors.numpy.load_file(file)
    name = "blocks.0.attn1.to_q.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "unknown":
        tensors["blocks.0.attn9.to_q.weight"] = tensors[name]
    elif kind == "misshapen":
        tensors[name] = np.ascontiguousarray(tensors[name][:, 1:])
    safetensors.numpy.save_file(tensors, file)
    return folder


BAD = {
    "frames not 4n+1": ({"frames": 10}, ["10 frames", "4n+1", "use 9 or 13"]),
    "size": ({"height": 40}, ["height 40", "multiples of 16"]),
    "missing image": ({"first_frame": "nowhere.png"}, ["nowhere.png", "does not exist"]),
    "unreadable image": ({"last_frame": DIFFUSERS / "case.json"}, ["case.json", "not a picture"]),
    "last frame alone": ({"first_frame": None}, ["--last-frame", "--first-frame"]),
    "no frame": ({"first_frame": None, "last_frame": None}, ["no frame", "flf2v"]),
    "no checkpoint": ({"checkpoint": "nowhere"}, ["nowhere"]),
    "output": ({"output": "video.avi"}, ["video.avi", ".mp4"]),
    "latents": ({"save_latents": "latents.txt"}, ["latents.txt", ".npy"]),
    "noise": ({"initial_noise": "nowhere.npy"}, ["nowhere.npy"]),
    "steps": ({"steps": 0}, ["--steps 0", "from 1"]),
    "number": ({"steps": "many"}, ["--steps", "many"]),
    "choice": ({"solver": "heun"}, ["heun", "unipc"]),
    "fps": ({"fps": 0}, ["fps 0"]),
    "endless fps": ({"fps": "inf"}, ["fps inf"]),
    "shift": ({"shift": 0}, ["shift 0"]),
    "guidance": ({"guidance": "nan"}, ["guidance nan"]),
    "seed": ({"seed": 2**63}, ["seed 9223372036854775808"]),
    "format": ({"quantize": "int4"}, ["int4", "fp8", "int8"]),
    "kernel": ({"attention": "flash"}, ["attention flash of float32 on cpu", "TPUs", "auto"]),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_bad_flags(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    refused(flags(DIFFUSERS, **({"output": "v.npy"} | changes)), words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["blocks.0.attn1.to_q.weight"]),
        ("unknown", ["blocks.0.attn9.to_q.weight"]),
        ("misshapen", ["blocks.0.attn1.to_q.weight", "64"]),
        ("truncated", ["vae", "diffusion_pytorch_model.safetensors"]),
        ("t2v", ["t2v", "--first-frame"]),
    ],
)
def test_bad_checkpoints_are_found_before_the_work(tmp_path, monkeypatch, kind, words):
    monkeypatch.setattr("wanjax.sampling.pipeline.Pipeline.encode", None)  # not one stage begins
    refused(flags(DIFFUSERS, checkpoint=broken(tmp_path, kind), output=tmp_path / "v.npy"), words)
    assert not (tmp_path / "v.npy").exists()


def test_noise_of_another_shape(tmp_path):
    np.save(tmp_path / "noise.npy", np.zeros((1, 16, 2, 6, 8), np.float32))
    changes = {"initial_noise": tmp_path / "noise.npy", "output": tmp_path / "v.npy"}
    refused(flags(DIFFUSERS, **changes), ["[1, 16, 2, 6, 8]", "[1, 16, 3, 6, 8]"])


@pytest.mark.parametrize(
    ("text", "words"),
    [("", ["get_config"]), ("1 / 0", ["ZeroDivisionError"]), ("def get_config():\n    return 3", ["int"])],
)
def test_bad_config(tmp_path, text, words):
    (tmp_path / "config.py").write_text(text)
    refused(["--config", str(tmp_path / "config.py")], words)


def test_exit_code_and_one_line(tmp_path):
    argv = flags(DIFFUSERS, frames=10, output=tmp_path / "v.npy")
    run = subprocess.run([sys.executable, sample_jax.__file__, *argv], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: 10 frames")
    assert run.stderr.count("\n") == 1
