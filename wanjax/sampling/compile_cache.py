"""Compile once: a second start of the same command runs the programs that the first one compiled.

    programs = ExecutableCache(cache_folder(None))
    latents, cache = programs(encode_chunk, vae, frames, cache)      # as encode_chunk(vae, frames, cache)

A jitted function's executable is kept in a file whose name is a hash of all that makes it: this package's sources, the
libraries, the devices, flags, and the arguments' tree (which holds the networks' configurations and so the choice of
kernels), shapes, dtypes and shardings. Whoever finds the file neither traces nor compiles. Small programs that JAX runs
by itself are in JAX's own persistent cache beside it, see `use_persistent_cache`.

Files are whole or not there; one that is damaged or cannot be loaded is compiled anew and written again. They are
programs, and pickles: a folder or a file that others own or may write to is left alone, with a line that says so. To
empty the folder, delete it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from wanjax.errors import InputError, one_line
from wanjax.files import check_name, replacing, try_place
from wanjax.untrusted import others_may_write, read_bytes, reason

MOST_BYTES = 4 * 2**30
"""Of a compiled program."""
ENVIRONMENT = "WANJAX_COMPILE_CACHE"
LIBRARIES = (
    *("jax", "jaxlib", "flax", "qwix", "ml_dtypes", "numpy"),
    *("libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12"),
)
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
OPTIONS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_debug_nans",
)


def cache_folder(choice: str | None) -> Path | None:
    """Where compiled programs are kept: as chosen, or by the environment, or the user's cache; None for "off".

    Raises:
      InputError: the chosen place is no folder, nor a place for one.
    """
    choice = choice or os.environ.get(ENVIRONMENT)
    if choice == "off":
        return None
    if choice:
        _check_chosen(Path(choice))
    if choice:
        return Path(choice)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wanjax"
    except RuntimeError:  # a user without a home, as in many containers
        return None


def _check_chosen(folder: Path) -> None:
    check_name(folder, "--compile-cache")
    try:
        place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
        if not folder.exists():  # which raises where the name is too long
            try_place(folder.absolute())
    except (OSError, RuntimeError) as error:  # before Python 3.13 a loop of links is a RuntimeError
        raise InputError(
            f"--compile-cache {folder} cannot be used ({reason(error)}); a folder, or a place for one, is accepted; "
            "choose another, or off"
        ) from error


def use_persistent_cache(folder: Path | None) -> None:
    """Lets JAX keep what it compiles by itself, however small; where the user named a place for that, there."""
    if folder is None or not trusted(folder) or not trusted(folder / "jax"):
        return
    try:
        for place in (folder, folder / "jax"):  # JAX would make some that others may write to, where the umask lets it
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        _say_not_kept(folder, error)
        return
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # if something was compiled before, JAX would not look again


def trusted(place: Path) -> bool:
    """Whether programs may be taken from a folder or file: it is the user's own, or not there yet. Says if not."""
    try:
        why = others_may_write(place)
    except OSError:
        return True
    if why is not None:
        _say(f"compiled programs in {place} are left alone: {why}; see wanjax's SECURITY.md")
    return why is None


@functools.cache
def _say(line: str) -> None:
    """Print it, once."""
    print(one_line(line), file=sys.stderr)


def _say_not_kept(folder: Path, error: Exception) -> None:
    _say(f"compiled programs cannot be kept in {folder} ({reason(error)}); the next start compiles again")


class ExecutableCache:
    """Calls jitted functions, by executables on disk where there are some.

    Args:
      folder: of the files; made when first needed. None: functions are called as they are.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._programs: dict[str, Any] = {}

    def __call__(self, function: Any, *args: Any) -> Any:
        """`function(*args)`; it has no static arguments."""
        if self.folder is None or not trusted(self.folder):
            return function(*args)
        name = cache_key(function, args)
        if name in self._programs:
            return self._programs[name](*args)
        if (program := self._load(name, args)) is not None:
            try:
                result = program(*args)
            except jax.errors.JaxRuntimeError:  # whole, but not for this machine
                pass
            else:
                self._programs[name] = program
                return result
        self._programs[name] = self._compile(name, function, args)
        return self._programs[name](*args)

    def _load(self, name: str, args: tuple) -> Any:
        assert self.folder is not None
        if not trusted(self.folder / name):
            return None
        try:
            digest, payload = (data := read_bytes(self.folder / name, MOST_BYTES))[:32], data[32:]
            if hashlib.sha256(payload).digest() != digest:
                return None
            serialized, result = pickle.loads(payload)
            in_tree = jax.tree.structure((args, {}))
            return serialize_executable.deserialize_and_load(
                serialized, in_tree, jax.tree.structure(result), execution_devices=_devices()
            )
        except Exception:  # whatever is wrong with a file, compiling mends it
            return None

    def _compile(self, name: str, function: Any, args: tuple) -> Any:
        assert self.folder is not None
        with _without_persistent_cache():
            program = function.lower(*args).compile()
        try:
            serialized, _, out_tree = serialize_executable.serialize(program)
            payload = pickle.dumps((serialized, jax.tree.unflatten(out_tree, range(out_tree.num_leaves))))
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self.folder / name) as path:
                path.touch(mode=0o600)  # whoever could write to it could run code
                path.write_bytes(hashlib.sha256(payload).digest() + payload)
        except Exception as error:  # a platform that cannot, or a full disk: the program runs all the same
            _say_not_kept(self.folder, error)
        return program


def cache_key(function: Any, args: tuple) -> str:
    """The file's name: what is called, and a hash of all that makes its program."""
    text = json.dumps({**environment(), **call_signature(function, args)}, sort_keys=True)
    return f"{function.__name__.strip('_')}-{hashlib.sha256(text.encode()).hexdigest()}"


def call_signature(function: Any, args: tuple) -> dict[str, Any]:
    """What makes a program of a call: the function, and all of its arguments but the arrays' values."""
    leaves, tree = jax.tree.flatten(args)
    return {
        "function": f"{function.__module__}.{function.__qualname__}",
        "tree": str(tree),
        "arrays": [str(_described(x)) for x in leaves],
    }


def _described(x: Any) -> tuple:
    aval = jax.typeof(x)
    where = (str(x.sharding), x.committed) if isinstance(x, jax.Array) else ()
    return (aval.shape, str(aval.dtype), aval.weak_type, *where)


def environment() -> dict[str, Any]:
    """What makes a program beside the call: code, libraries, flags, mesh and devices."""
    devices = _devices()
    return {
        "code": code_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": (devices[0].client.platform_version, _processor(devices[0])),
        "flags": {name: os.environ.get(name) for name in VARIABLES},
        "options": {name: str(getattr(jax.config, name)) for name in OPTIONS},
        "mesh": str(jax.sharding.get_mesh()),
        "devices": [(d.device_kind, d.id, d.process_index) for d in devices],
        "processes": (jax.process_index(), jax.process_count()),
    }


@functools.cache
def code_version() -> str:
    """Hash of the sources of this package and of `sharding`."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(file for package in ("wanjax", "sharding") for file in (root / package).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _without_persistent_cache() -> Iterator[None]:
    """JAX compiles, whatever its cache holds: an executable out of there, serialised again, loads but does not run."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or JAX does not look at the setting again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@functools.cache
def _processor(device: Any) -> str | None:
    """For programs of a CPU, which may be compiled for its very model: what it is and can do."""
    file = Path("/proc/cpuinfo")
    if device.platform != "cpu" or not file.is_file():
        return None
    lines = {line for line in file.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _devices() -> list[Any]:
    """The ambient mesh's; without one, the one that JAX takes."""
    mesh = jax.sharding.get_mesh()
    return jax.devices()[:1] if mesh.empty else list(mesh.devices.flat)


@functools.cache
def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
