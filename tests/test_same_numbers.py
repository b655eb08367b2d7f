"""The comparison of two checkouts finds one changed number, wherever it is, and nothing where there is none."""

import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization
from tiny import ROOT

from benchmarks.comparison.cases import CASES, choose, spelled
from benchmarks.comparison.files import compare
from wanjax.errors import InputError


def write_array(path, x):
    np.save(path, x)


def write_tensors(dtype):
    return lambda path, x: safetensors.flax.save_file({"a": np.zeros(3, np.float32), "b": x.astype(dtype)}, path)


def write_json(path, x):
    path.write_text(json.dumps({"what": "text", "curve": x.tolist()}))


def write_lines(path, x):
    seconds = np.random.default_rng().random()  # other ones every time
    lines = ({"step": i, "loss": value, "seconds": seconds, "frames_per_second": seconds} for i, value in enumerate(x))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_records(path, x):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for value in x:
        writer.write(serialization.msgpack_serialize({"name": "clip", "latents": np.full((2, 3), value)}))
    writer.close()


WRITERS = {
    ".npy": write_array,
    ".bfloat16.safetensors": write_tensors(ml_dtypes.bfloat16),
    ".fp8.safetensors": write_tensors(ml_dtypes.float8_e4m3fn),
    ".json": write_json,
    ".jsonl": write_lines,
    ".arrayrecord": write_records,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_one_changed_number_is_found(tmp_path, kind):
    x = np.array([1.0, -2.0, 0.5, 4.0])
    exact = kind in (".npy", ".json", ".jsonl")
    changed = np.where(np.arange(4) == 1, np.nextafter(x, 0) if exact else -2.5, x)
    old, same, new = (tmp_path / f"{name}{kind}" for name in ("old", "same", "new"))
    for path, values in ((old, x), (same, x), (new, changed)):
        WRITERS[kind](path, values)
    assert compare(old, same)[0] == "equal"
    verdict, remark = compare(old, new)
    assert verdict == "DIFFERENT"
    assert remark.startswith("6 of 24" if kind == ".arrayrecord" else "1 of ")
    if not exact:
        assert remark.endswith("by up to 0.5, relative 0.25")


def test_bits_count_not_values(tmp_path):
    old, new = tmp_path / "old.npy", tmp_path / "new.npy"
    np.save(old, np.array([np.nan, 0.0, 1.0], np.float32))
    np.save(new, np.array([np.nan, -0.0, 1.0], np.float32))
    assert compare(old, new) == ("DIFFERENT", "1 of 3 numbers, by up to 0, relative 0")
    np.save(new, np.array([1.0, 0.0, 1.0], np.float32))
    assert compare(old, new) == ("DIFFERENT", "1 of 3 numbers, by up to inf, relative inf")
    np.save(new, np.array([np.nan, 0.0, 1.0], np.float64))
    assert compare(old, new)[0] == "DIFFERENT"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"samples/psnr": 20.0001}, "close"),
        ({"samples/psnr": 20.001}, "DIFFERENT"),
        ({}, "equal"),
        ({"validation/loss": 0.25 + 1e-16}, "DIFFERENT"),
        ({"samples/ssim": 0.9}, "DIFFERENT"),
        ({"text": "another"}, "DIFFERENT"),
        ({"about": "another"}, "equal"),
        ({"loss": None}, "DIFFERENT"),
    ],
)
def test_only_figures_of_samples_may_be_close(tmp_path, changes, verdict):
    values = {
        "step": 1,
        "loss": 0.5,
        "samples/psnr": 20.0,
        "validation/loss": 0.25,
        "text": "a",
        "about": "a",
        "seconds": 1.0,
    }
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(json.dumps(values) + "\n")
    new.write_text(json.dumps(values | {"seconds": 2.0} | changes) + "\n")
    assert compare(old, new)[0] == verdict


def test_commands_are_spelled_as_a_checkout_has_them(tmp_path):
    def words(case):
        return spelled(CASES[case], tmp_path, tmp_path / "out")[:3]

    with pytest.raises(InputError, match=r"no command calibrate; looked for wanjax\.sampling\.calibrate"):
        words("calibrate")
    for file in ("calibrate.py", "convert/__main__.py", "data/cache.py"):
        (tmp_path / "wanjax" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "wanjax" / file).touch()
    assert words("calibrate") == ["-m", "wanjax.calibrate", "--config"]
    assert words("convert") == ["-m", "wanjax.convert", "wanjax/demo"]
    assert words("cache") == ["-m", "wanjax.data.cache", "--config"]
    (tmp_path / "wanjax/__main__.py").touch()
    assert words("cache") == ["-m", "wanjax", "cache"]
    assert words("demo")[0] == "sample_jax.py"


def test_what_a_case_needs_comes_before_it():
    assert list(choose(["lora-beside", "demo"])) == ["demo", "cache", "lora", "lora-beside"]
    for name, case in CASES.items():
        assert all(list(CASES).index(need) < list(CASES).index(name) for need in case.needs)
        assert all(CASES[need].devices == case.devices for need in case.needs)
    with pytest.raises(InputError, match="--only demos"):
        choose(["demos"])


def test_one_changed_weight_of_a_checkout_is_found(tmp_path):
    changed = tmp_path / "changed"
    for package in ("wanjax", "sharding"):
        shutil.copytree(ROOT / package, changed / package)
    shutil.copy(ROOT / "sample_jax.py", changed)
    file = changed / "wanjax/demo/vae/diffusion_pytorch_model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)
    program = [sys.executable, str(ROOT / "benchmarks/same_numbers.py"), str(ROOT), str(changed), "--only", "convert"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    *table, last = done.stdout.splitlines()
    assert [row.split()[1] for row in table if "DIFFERENT" in row] == ["official/Wan2.1_VAE.safetensors"]
    assert "1 of " in done.stdout
    assert json.loads(last)["different"] == 1
    assert json.loads(last)["equal"] == len(table) - 1 > 3
