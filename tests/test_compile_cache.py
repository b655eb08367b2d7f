"""A second start of the same command compiles nothing; a change of anything that makes the programs compiles anew."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from tiny import DIFFUSERS, DIT, ROOT, SCHEDULE, STEPS, environment, flags

from sharding.mesh import MeshShape, make_mesh
from wanjax.config import SampleConfig
from wanjax.diffusion import solvers
from wanjax.models.dit import DiT
from wanjax.sampling import compile_cache
from wanjax.sampling.cache_rules import make_rules
from wanjax.sampling.compile_cache import ExecutableCache

# Runs the command line and counts, by JAX's own events, what was traced to a program, compiled, and found compiled.
COUNTED = """
import json, sys
from collections import Counter
import jax
counts = Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: counts.update([name]))
import sample_jax
at_first_step = {}
from wanjax.diffusion import solvers
original = solvers.init
def init(*args):
    at_first_step.update(counts)
    return original(*args)
solvers.init = init
sample_jax.main(sys.argv[1:])
print(json.dumps([counts, at_first_step]))
"""
MISSES, REQUESTS = "/jax/compilation_cache/cache_misses", "/jax/compilation_cache/compile_requests_use_cache"
HITS, LOWERED = "/jax/compilation_cache/cache_hits", "/jax/core/compile/jaxpr_to_mlir_module_duration"


@jax.jit
def double(x, y):
    return {"sum": x + 2 * y, "pair": (x, None)}


def start(folder, source=ROOT, **changes):
    """Events of a whole run in a process of its own, and of its part before the first step."""
    variables = environment(1, PYTHONPATH=str(source))
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    argv = flags(DIFFUSERS, **({"steps": 2, "compile_cache": folder, "output": folder / "v.npy"} | changes))
    run = subprocess.run(
        [sys.executable, "-c", COUNTED, *argv], cwd=source, env=variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_second_start_compiles_nothing(tmp_path):
    first, _ = start(tmp_path)
    assert first[MISSES] > 5
    stages = {file.name.split("-")[0] for file in tmp_path.iterdir() if "-" in file.name}
    assert stages == {"text_features", "image_features", "encode_chunk", "make_context", "denoise", "decode_chunk"}
    video = np.load(tmp_path / "v.npy")
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir() if "-" in file.name}

    second, before = start(tmp_path)
    for counts in (second, before):
        assert counts.get(MISSES, 0) == 0
        assert counts[HITS] == counts[REQUESTS]
    assert second[LOWERED] < first[LOWERED]  # the stages were not even traced
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), video)
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir() if "-" in file.name}


@pytest.fixture
def counts():
    seen = []

    def listen(name, *_, **__):
        seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: seen.count("/jax/core/compile/backend_compile_duration")
    jax.monitoring.unregister_event_duration_listener(listen)


X = np.arange(6, dtype=np.float32)


def called(folder, x=X, y=1.0):
    """The call in a new start, as far as the files are concerned."""
    return ExecutableCache(folder)(double, x, y)


def test_changed_parts_compile_anew(tmp_path, monkeypatch, counts):
    """Each part of the key by itself."""

    def compiles(*args):
        jax.clear_caches()
        before = counts()
        called(tmp_path, *args)
        return counts() - before

    assert compiles() == 1
    assert compiles() == 0
    parts = compile_cache.environment()
    assert set(parts) == {"code", "libraries", "platform", "flags", "options", "mesh", "devices", "processes"}
    for part in parts:
        with monkeypatch.context() as patch:
            patch.setattr(compile_cache, "environment", lambda part=part: parts | {part: "another"})
            assert compiles() == 1, part
            assert compiles() == 0, part
    assert compiles(np.arange(7, dtype=np.float32)) == 1  # shape
    assert compiles(np.arange(6, dtype=np.float16)) == 1  # dtype
    assert compiles(X, np.float32(1)) == 1  # weak type
    assert compiles((X, X)[0], {"y": 1.0}["y"]) == 0  # only values and names differ
    monkeypatch.setenv("XLA_FLAGS", "--another")
    assert compiles() == 1
    with jax.default_matmul_precision("highest"):
        assert compiles() == 1
    mesh = make_mesh(MeshShape(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = jax.device_put(X, jax.NamedSharding(mesh, jax.P("data")))
        assert compiles(placed) == 1
        assert compiles(placed) == 0
        assert compiles(jax.device_put(X, jax.NamedSharding(mesh, jax.P()))) == 1


def test_the_configuration_is_in_the_key():
    """Whatever changes the program without changing a shape."""

    def name(solver="unipc", steps=STEPS, rules=True, **changes):
        dit = DiT(dataclasses.replace(DIT, **changes), nnx.Rngs(0))
        kept = make_rules(SampleConfig(cache="fixed:2"), SCHEDULE) if rules else None
        return compile_cache.cache_key(double, (dit, solvers.make_schedule(solver, steps, 5.0), kept))

    changes = [{"attention": "int8fp8"}, {"attention": "reference"}, {"eps": 1e-5}, {"num_heads": 2}]
    others = [name(**change) for change in [*changes, {"dtype": jnp.bfloat16}, {"steps": 9}, {"rules": False}]]
    assert len({name(), *others}) == 1 + len(others)
    assert name() == name(solver="euler")  # solvers differ in numbers only: one program for all


def test_the_libraries_are_those_that_make_the_program():
    assert {"jax", "jaxlib", "flax", "qwix", "libtpu"} <= set(compile_cache.LIBRARIES)
    versions = compile_cache.environment()["libraries"]
    assert all(versions[library] == importlib.metadata.version(library) for library in ("jax", "jaxlib", "qwix"))


def test_the_code_is_all_sources(tmp_path, monkeypatch):
    for package in ("wanjax", "sharding"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compile_cache, "__file__", str(tmp_path / "wanjax/sampling/compile_cache.py"))
    version = compile_cache.code_version.__wrapped__
    original = compile_cache.code_version()
    assert version() == original
    with (tmp_path / "sharding/ring.py").open("a") as file:
        file.write("\n")
    assert version() != original


def test_results_are_those_of_the_call(tmp_path):
    expected = double(X, 3.0)
    for _ in range(2):
        result = called(tmp_path, X, 3.0)
        assert jax.tree.structure(result) == jax.tree.structure(expected)
        np.testing.assert_array_equal(result["sum"], expected["sum"])


@pytest.mark.parametrize("damage", ["truncated", "bits", "empty", "pickle"])
def test_damaged_files_are_written_anew(tmp_path, damage):
    called(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    broken = {
        "truncated": whole[:-10],
        "bits": whole[:-1] + bytes([whole[-1] ^ 1]),
        "empty": b"",
        "pickle": hashlib.sha256(b"nothing").digest() + b"nothing",
    }[damage]
    file.write_bytes(broken)
    np.testing.assert_array_equal(called(tmp_path)["sum"], X + 2)
    assert file.read_bytes() != broken
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_program_that_does_not_run_is_compiled_anew(tmp_path, monkeypatch):
    def unfit(*_):
        raise jax.errors.JaxRuntimeError("NOT_FOUND")

    called(tmp_path)
    monkeypatch.setattr(serialize_executable, "deserialize_and_load", lambda *_, **__: unfit)
    np.testing.assert_array_equal(called(tmp_path)["sum"], X + 2)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_jax_kept_is_not_kept_twice(tmp_path):
    """A program that JAX's own cache holds already is compiled once more for ours: the other's would not run."""
    compile_cache.use_persistent_cache(tmp_path / "a")
    try:
        for _ in range(2):
            jax.clear_caches()
            double(X, 1.0)  # from the second time on out of JAX's cache
        np.testing.assert_array_equal(called(tmp_path / "b")["sum"], X + 2)
        np.testing.assert_array_equal(called(tmp_path / "b")["sum"], X + 2)
        assert jax.config.values["jax_enable_compilation_cache"]
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def test_a_folder_that_cannot_be_written_is_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    np.testing.assert_array_equal(called(tmp_path / "file")["sum"], X + 2)


def test_a_place_that_jax_cannot_write_is_no_harm(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    compile_cache.use_persistent_cache(tmp_path / "file/folder")
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert "compiled programs cannot be kept in" in capsys.readouterr().err


def test_folders_are_the_users_own_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        compile_cache.use_persistent_cache(tmp_path / "a")
        assert compile_cache.trusted(tmp_path / "a")
        assert compile_cache.trusted(tmp_path / "a/jax")
    finally:
        os.umask(before)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def test_others_may_not_write_programs(tmp_path):
    """They are pickles: whoever writes one runs code. The folder may be a user's own, with any permissions."""
    before = os.umask(0)
    try:
        called(tmp_path)
    finally:
        os.umask(before)
    (file,) = (file for file in tmp_path.iterdir() if file.name.startswith("double-"))
    assert file.stat().st_mode & 0o777 == 0o600


def test_place(monkeypatch, tmp_path):
    monkeypatch.delenv(compile_cache.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.cache_folder(None) == tmp_path / "wanjax"
    assert compile_cache.cache_folder("off") is None
    assert compile_cache.cache_folder("here") == Path("here")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**20 + 7)  # whom no list of users has
    assert compile_cache.cache_folder(None) is None
    monkeypatch.setenv(compile_cache.ENVIRONMENT, "off")
    assert compile_cache.cache_folder(None) is None
    assert compile_cache.cache_folder("here") == Path("here")
    assert jnp.all(called(None)["sum"] == X + 2)
