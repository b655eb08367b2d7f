"""What a mapping table is made of, and the check that a checkpoint fits it exactly.

A table lists, for one network in one layout, every tensor name a checkpoint may hold and the parameter it becomes. In a
name `{i}` stands for the layer. Where the parameter's path has `{i}` too, the parameter is one element of a list;
where it has not, the layers are stacked and the tensor is one slice of the parameter's leading axis.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx

from wanjax.errors import InputError

LayoutName = Literal["diffusers", "official"]
NetworkName = Literal["dit", "dit_low", "vae", "umt5", "clip"]
"""Of two experts "dit" is the one for high noise, "dit_low" that for low noise."""
Shape = tuple[int, ...]
DIFFUSERS_VERSION = "0.33.0"  # written into configs: the first that knows all of these networks


class Transform(NamedTuple):
    """Checkpoint tensor to parameter: the axes `drop`, all of size 1, go; the others are permuted to `order`."""

    drop: tuple[int, ...] = ()
    order: tuple[int, ...] | None = None

    def forward(self, x: np.ndarray) -> np.ndarray:
        """The parameter as a view of the checkpoint's tensor."""
        x = np.squeeze(x, self.drop)
        return x if self.order is None else x.transpose(self.order)

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """The checkpoint's tensor as a view of the parameter."""
        if self.order is not None:
            x = x.transpose(np.argsort(self.order))
        return np.expand_dims(x, self.drop)

    def checkpoint_shape(self, shape: Shape) -> Shape:
        """The checkpoint tensor's shape for a parameter of `shape`."""
        return self.inverse(np.broadcast_to(np.int8(0), shape)).shape


SAME = Transform()
LINEAR = Transform(order=(1, 0))  # [out, in] -> [in, out]
CONV2D = Transform(order=(2, 3, 1, 0))  # [out, in, kh, kw] -> [kh, kw, in, out]
CONV3D = Transform(order=(2, 3, 4, 1, 0))  # [out, in, kt, kh, kw] -> [kt, kh, kw, in, out]
POINTWISE2D = Transform(drop=(2, 3), order=(1, 0))  # [out, in, 1, 1] -> [in, out]


class Rule(NamedTuple):
    """One line of a table. Several paths: the checkpoint holds them as one tensor, joined along its first axis."""

    key: str
    paths: tuple[str, ...]
    transform: Transform


def weight(key: str, path: str, transform: Transform = SAME) -> tuple[Rule, ...]:
    """A single tensor."""
    return (Rule(key, (path,), transform),)


def layer(key: str, path: str, transform: Transform = LINEAR, bias: bool = True) -> tuple[Rule, ...]:
    """`weight` and `bias` of a linear or convolution layer."""
    rules = (Rule(f"{key}.weight", (f"{path}.kernel",), transform),)
    return (*rules, Rule(f"{key}.bias", (f"{path}.bias",), SAME)) if bias else rules


def projection(key: str, path: str) -> tuple[Rule, ...]:
    """A linear layer that may be quantised; `scale`, a scalar, is then beside `weight`."""
    return (*layer(key, path), Rule(f"{key}.scale", (f"{path}.kernel_scale",), SAME))


def norm(key: str, path: str, bias: bool = False) -> tuple[Rule, ...]:
    """`weight`, and if it has one `bias`, of a norm."""
    rules = (Rule(f"{key}.weight", (f"{path}.scale",), SAME),)
    return (*rules, Rule(f"{key}.bias", (f"{path}.bias",), SAME)) if bias else rules


class Table(NamedTuple):
    """All tensors of one network in one layout.

    `prefix`: precedes every name in the published releases, but may be missing. `aliases`: second names of tensors,
    which may be there instead of the first or beside it. `unused`: names (with `*`) of tensors that are known and that
    the network has no use for. `names`: further placeholders for a layer, given its number and the configuration.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    aliases: Mapping[str, str] = {}
    unused: tuple[str, ...] = ()
    names: Callable[[int, Any], Mapping[str, str]] = lambda i, config: {}

    def bare_name(self, key: str) -> str:
        """The name without the optional prefix."""
        return key.removeprefix(self.prefix)

    def first_name(self, key: str) -> str:
        """The bare name, an alias replaced by the name it stands for."""
        return self.aliases.get(self.bare_name(key), self.bare_name(key))

    def is_unused(self, name: str) -> bool:
        """Whether a bare name is that of a known tensor which the network does not use."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.unused)


class Network(NamedTuple):
    """What there is to know about one network's checkpoints.

    `build` makes the network; `read` its configuration from the layout's JSON and the shapes by bare name; `write` the
    JSON from the configuration, where the layout has any; `folder` is the network's place in the Diffusers layout,
    `stems` the names of its files without their endings.
    """

    build: Callable[[Any, nnx.Rngs], nnx.Module]
    tables: Mapping[LayoutName, Table]
    read: Mapping[LayoutName, Callable[[Mapping[str, Any], Mapping[str, Shape]], Any]]
    write: Mapping[LayoutName, Callable[[Any], dict[str, Any]]]
    folder: str
    stems: Mapping[LayoutName, str]


class Slot(NamedTuple):
    """A parameter, or one layer of a stacked one, and its shape."""

    path: str
    layer: int | None
    shape: Shape


class Entry(NamedTuple):
    """One tensor of a checkpoint: the slots it fills (joined along its first axis if several) and its shape."""

    slots: tuple[Slot, ...]
    transform: Transform
    shape: Shape

    def split(self, x: np.ndarray) -> list[tuple[Slot, np.ndarray]]:
        """The checkpoint's tensor as views, one per slot."""
        parts = np.split(x, len(self.slots)) if len(self.slots) > 1 else [x]
        return [(slot, self.transform.forward(part)) for slot, part in zip(self.slots, parts, strict=True)]

    def join(self, values: list[np.ndarray]) -> np.ndarray:
        """The checkpoint's tensor from its slots' values."""
        parts = [self.transform.inverse(value) for value in values]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def expand(table: Table, shapes: Mapping[str, Shape], config: Any) -> dict[str, Entry]:
    """The table of one particular network: every bare name with what it fills.

    Args:
      table: the network's table.
      shapes: shape of every parameter of the network, by path; rules for parameters that are not there are left out.
      config: the network's configuration.
    """
    entries: dict[str, Entry] = {}
    for rule in table.rules:
        for i, slots in _slots(rule, shapes):
            item = rule.transform.checkpoint_shape(slots[0].shape)
            shape = (len(slots) * item[0], *item[1:]) if len(slots) > 1 else item
            key = rule.key if i is None else rule.key.format(i=i, **table.names(i, config))
            assert key not in entries, f"two rules for {key}"
            entries[key] = Entry(slots, rule.transform, shape)
    _check_covered(entries, shapes)
    return entries


def _slots(rule: Rule, shapes: Mapping[str, Shape]) -> Iterable[tuple[int | None, tuple[Slot, ...]]]:
    if "{i}" in rule.paths[0]:
        pattern = re.compile(re.escape(rule.paths[0]).replace(r"\{i\}", r"(\d+)"))
        for i in sorted(int(m[1]) for m in map(pattern.fullmatch, shapes) if m):
            paths = [path.format(i=i) for path in rule.paths]
            yield i, tuple(Slot(path, None, shapes[path]) for path in paths)
    elif "{" in rule.key:
        yield from _layers(rule, shapes)
    elif rule.paths[0] in shapes:
        yield None, tuple(Slot(path, None, shapes[path]) for path in rule.paths)


def _layers(rule: Rule, shapes: Mapping[str, Shape]) -> Iterable[tuple[int, tuple[Slot, ...]]]:
    """The layers that have a stacked parameter, which is one or, for layers of several kinds, a list of stacks."""
    if rule.paths[0] in shapes:
        for i in range(shapes[rule.paths[0]][0]):
            yield i, tuple(Slot(path, i, shapes[path][1:]) for path in rule.paths)
        return
    first = 0
    for n in itertools.count():
        paths = [path.replace(".", f".{n}.", 1) for path in rule.paths]
        stack = paths[0][: paths[0].index(".") + len(f".{n}.")]
        count = next((shape[0] for path, shape in shapes.items() if path.startswith(stack)), 0)
        if count == 0:
            return
        for i in range(count if paths[0] in shapes else 0):
            yield first + i, tuple(Slot(path, i, shapes[path][1:]) for path in paths)
        first += count


def _check_covered(entries: Mapping[str, Entry], shapes: Mapping[str, Shape]) -> None:
    """Every element of every parameter is filled once: a table that fails this is a bug, not the user's mistake."""
    filled = dict.fromkeys(shapes, 0)
    for entry in entries.values():
        for slot in entry.slots:
            filled[slot.path] += math.prod(slot.shape)
    wrong = [path for path, shape in shapes.items() if filled[path] != math.prod(shape)]
    assert not wrong, f"not filled exactly once by the mapping table: {wrong}"


def count_layers(shapes: Mapping[str, Shape], key: str) -> int:
    """How many layers there are, by a tensor that each of them has."""
    count = 0
    while key.format(i=count) in shapes:
        count += 1
    return count


def match(table: Table, entries: Mapping[str, Entry], found: Mapping[str, Shape], where: str) -> dict[str, Entry]:
    """Pairs the tensors of a checkpoint with the table's entries, each exactly once.

    Args:
      table, entries: what is accepted.
      found: shape of every tensor in the checkpoint, by its name there.
      where: the file or folder, for messages.

    Returns:
      Entry of every tensor to read, by its name in the checkpoint. Aliases and known unused tensors are left out.

    Raises:
      InputError: a tensor is unknown, missing, there under two names, or has another shape than the network.
    """
    matched, unknown = _by_name(table, entries, found, where)
    missing = [name for name in entries if name not in matched]
    faults = [f"has {some(unknown, 'unknown tensor')}"] if unknown else []
    faults += [f"lacks {some(missing, 'tensor')}"] if missing else []
    if faults:
        raise InputError(
            f"{where} {' and '.join(faults)}; give a complete Wan2.1 checkpoint, of the size its configuration says."
        )
    wrong = [
        f"{key} (given {list(found[key])}, expected {list(entries[name].shape)})"
        for name, key in matched.items()
        if tuple(found[key]) != entries[name].shape
    ]
    if wrong:
        raise InputError(
            f"{where} has {some(wrong, 'tensor')} of another shape than its configuration says; download both."
        )
    return {key: entries[name] for name, key in matched.items()}


def _by_name(
    table: Table, entries: Mapping[str, Entry], found: Iterable[str], where: str
) -> tuple[dict[str, str], list[str]]:
    """The checkpoint's name of every tensor of the table that it has, by its name there; and names it does not know."""
    matched: dict[str, str] = {}
    unknown = []
    for key in found:
        name = table.first_name(key)
        if table.is_unused(name):
            continue
        if name != table.bare_name(key) and any(table.bare_name(other) == name for other in found):
            continue  # an alias, and the tensor is there under its first name too
        if name not in entries:
            unknown.append(key)
        elif name in matched:
            raise InputError(f"{where} has the tensor {name} twice, as {matched[name]} and as {key}; remove one.")
        else:
            matched[name] = key
    return matched, unknown


def some(items: list[str], noun: str, limit: int = 5) -> str:
    """How many there are and the first of them, for messages."""
    head = ", ".join(sorted(items)[:limit])
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}: {head}{more}"
