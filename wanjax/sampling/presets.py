"""Presets: settings that few-step weights were made for, as files.

    {"about": "what it is for", "solver": "euler", "sigmas": [1, 0.9375, 0.8333333, 0.625], "guidance": 1}

A name is one of `wanjax/presets/`; a path ends in .json, or in .py, which has `get_preset()` that returns such a
dictionary. A preset holds over a configuration file and defaults; what is said beside it holds over the preset.
"""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

from wanjax.config import SampleConfig
from wanjax.errors import InputError
from wanjax.untrusted import read_json

FOLDER = Path(__file__).parents[1] / "presets"
ACCEPTED = (
    *("solver", "steps", "sigmas", "timesteps", "shift", "guidance", "guidance_low", "boundary", "boundary_step"),
    *("conventions", "cache", "cfg_cache"),
)
"""Fields of `SampleConfig` that a preset may set."""
LISTS = ("sigmas", "guidance")
TEXTS = ("solver", "timesteps", "conventions", "cache", "cfg_cache")


def names() -> list[str]:
    """Those that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(preset: str) -> dict[str, Any]:
    """A preset's settings, lists as tuples.

    Args:
      preset: a name, or the path of a file.

    Raises:
      InputError: there is none of that name, the file cannot be read, or it sets what a preset cannot.
    """
    path = FOLDER / f"{preset}.json"
    if not path.is_file() or Path(preset).name != preset:
        path = Path(preset)
    if path.suffix not in (".json", ".py") or not path.is_file():
        raise InputError(f"preset {preset}; accepted: {', '.join(names())}, or a .json or .py file; choose one")
    try:
        settings = read_json(path) if path.suffix == ".json" else runpy.run_path(preset)["get_preset"]()
        settings = dict(settings)
    except (Exception, SystemExit) as error:  # a .py is the user's code: whatever it raises is theirs to read
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"preset {preset} cannot be read ({reason}); a JSON object, or get_preset() that returns a dictionary, is "
            "needed; correct the file"
        ) from error
    settings.pop("about", None)
    return {name: _checked(preset, name, value) for name, value in settings.items()}


def _checked(preset: str, name: str, value: Any) -> Any:
    if name not in ACCEPTED:
        raise InputError(f"preset {preset} sets {name}; accepted: {', '.join(ACCEPTED)}; take it out")
    if isinstance(value, (list, tuple)) and name in LISTS and all(isinstance(x, (int, float)) for x in value):
        return tuple(float(x) for x in value)
    kinds = str if name in TEXTS else (int, float)
    if name == "sigmas" or not isinstance(value, kinds) or isinstance(value, bool):
        raise InputError(f"preset {preset} sets {name} = {value!r}, which it cannot be; see --help for what it can be")
    return value


def apply(config: SampleConfig, preset: str) -> SampleConfig:
    """The configuration with the preset's settings, whatever it had.

    Raises:
      InputError: as `read`.
    """
    return dataclasses.replace(config, **read(preset), preset=None)


def fill(config: SampleConfig) -> SampleConfig:
    """The configuration with the settings of the preset that it names, where it has defaults.

    Raises:
      InputError: as `read`.
    """
    if config.preset is None:
        return config
    defaults = SampleConfig()
    settings = {k: v for k, v in read(config.preset).items() if getattr(config, k) == getattr(defaults, k)}
    return dataclasses.replace(config, **settings, preset=None)
