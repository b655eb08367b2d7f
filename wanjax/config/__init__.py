"""Frozen dataclasses: one per network, one for sampling, one for training. Settings, and nothing that they do.

A field carries its own sentence, its range and, if it has a flag, the heading under which `--help` and the README show
it, see `wanjax.settings`: a configuration that exists has only values that its fields take.

`dtype` is what activations are computed in, `param_dtype` what the large weights are stored in. Norms, modulation,
RoPE, softmax statistics and solvers are float32 whatever these say.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any, TypeVar

from wanjax.config.networks import (
    LATENTS_MEAN,
    LATENTS_STD,
    WAN_VAE,
    Attention,
    CLIPConfig,
    DiTConfig,
    UMT5Config,
    VAEConfig,
    check_network,
)
from wanjax.config.sampling import (
    NETWORK_FIELDS,
    SampleConfig,
)
from wanjax.config.training import (
    CachedData,
    Data,
    Density,
    DistillationConfig,
    LoRAConfig,
    LoRATarget,
    MixedData,
    Remat,
    ShapesData,
    SyntheticData,
    TaskMix,
    TowersConfig,
    TrainConfig,
    VideoData,
    Weighting,
)
from wanjax.errors import InputError
from wanjax.untrusted import check_file

__all__ = [
    "LATENTS_MEAN",
    "LATENTS_STD",
    "NETWORK_FIELDS",
    "WAN_VAE",
    "Attention",
    "CLIPConfig",
    "CachedData",
    "Data",
    "Density",
    "DiTConfig",
    "DistillationConfig",
    "LoRAConfig",
    "LoRATarget",
    "MixedData",
    "Remat",
    "SampleConfig",
    "ShapesData",
    "SyntheticData",
    "TaskMix",
    "TowersConfig",
    "TrainConfig",
    "UMT5Config",
    "VAEConfig",
    "VideoData",
    "Weighting",
    "check_network",
    "load_config",
    "read_config",
]

T = TypeVar("T")


def _run_file(path: str) -> dict[str, Any]:
    """The names that a configuration file defines. It may import others of its folder, as `configs.NAME`."""
    root = str(Path(path).absolute().parent.parent)
    if root not in sys.path:  # where a command is started, it is not, unlike with `python train_jax.py`
        sys.path.append(root)
    return runpy.run_path(path)


def load_config(path: str, kind: type[T]) -> T:
    """What `get_config()` of a configuration file returns.

    Raises:
      InputError: as `read_config`.
    """
    return read_config(path, (kind,))[0]


def read_config(path: str, kinds: tuple[type[T], ...]) -> tuple[T, dict[str, Any]]:
    """What `get_config()` of a configuration file returns, and the file's other names.

    Raises:
      InputError: the file is missing or fails, has no `get_config()`, or that returns none of `kinds`.
    """
    try:
        check_file(path)
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(f"config {path} {what}; a Python file with get_config() is needed; see configs/") from error
    try:
        names = _run_file(path)
        get_config = names.get("get_config")
        if get_config is None:
            raise InputError(f"config {path} has no get_config(); it must define that; see configs/")
        config = get_config()
    except InputError as error:  # the settings' own
        raise InputError(f"config {path}: {error}") from error
    except (Exception, SystemExit) as error:  # the file is the user's code: whatever it raises is theirs to read
        raise InputError(f"config {path} cannot be read ({type(error).__name__}: {error}); correct the file") from error
    if not isinstance(config, kinds):
        needed = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(
            f"config {path} returns {type(config).__name__}; {needed} is needed; give the config of this script"
        )
    return config, names
