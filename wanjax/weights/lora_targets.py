"""Which layers get an adapter, and of which rank: parts of their names, or regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from wanjax.config import LoRAConfig, LoRATarget
from wanjax.errors import InputError


def chosen(config: LoRAConfig, layers: Iterable[str]) -> dict[str, LoRATarget]:
    """The target that each layer belongs to that gets an adapter, by the layer's path.

    Raises:
      InputError: a target or an exclusion names no layer, or is no pattern; or nothing is left.
    """
    layers, unknown = list(layers), []
    named: dict[str, LoRATarget] = {}
    for target in config.targets:
        target = LoRATarget(target, config.rank, config.alpha) if isinstance(target, str) else target
        found = [path for path in layers if _names(target.name, path)]
        unknown += [] if found else [target.name]
        named |= dict.fromkeys(found, target)
    for pattern in config.exclude:
        found = [path for path in layers if _names(pattern, path)]
        unknown += [] if found else [pattern]
        named = {path: target for path, target in named.items() if path not in found}
    if unknown or not named:
        raise InputError(
            f"LoRA targets {', '.join(unknown) or 'of no layer'}; accepted are parts of the names of linear layers, or "
            f"regular expressions for them: {', '.join(sorted(layers))}; correct targets or exclude"
        )
    return {path: named[path] for path in layers if path in named}


def _names(pattern: str, path: str) -> bool:
    """Whether a part of a name, or an expression for the whole of it, names this layer."""
    try:
        return f".{pattern}." in f".{path}." or re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise InputError(
            f"LoRA target {pattern!r} is no regular expression ({error}), nor a part of a layer's name; correct it"
        ) from error
