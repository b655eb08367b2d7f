"""Cycles of a TPU's kernels, read off the VLIW bundles that libtpu writes down: one bundle is issued a cycle.

    libtpu's flags: --xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles$
    cycles = read_kernels(DIR)["flash_forward.3"].cycles

No stall is in them: a kernel that waits for memory takes longer. A Pallas kernel is one loop over its grid, most of
whose body stands in branches (fetch the next block, the first step of a row, the last). What is no branch, and branches
with matrix products or fetches, are taken to run in every step; other branches once in a row of the grid; loops of
unknown length, which the ragged ends of a sequence go through, never.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles$"
DELAY = 5
"""Bundles from a branch to where it leads: itself and four more, which run in any case."""
PIPELINE_STEPS = 2
"""What a grid's loop runs more often than the grid has steps, to fetch the first block and to write the last."""
TILE = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one call takes.

    Attributes:
      cycles: all of it.
      steps, step: of its longest loop, a Pallas kernel's grid: how many, and bundles of one.
      block: of these, bundles of the innermost branch with most of the products.
      ragged: bundles of one pass of the loop of unknown length in it that has most of the products, 0 if there is none.
      tiles: scores of a step in units of 1024 x 1024, if the first two wide operands are queries and keys.
    """

    cycles: float
    steps: int
    step: float
    block: float
    ragged: float
    tiles: float


@dataclasses.dataclass
class Bundle:
    """A bundle's text, and how many loops it is in."""

    depth: int
    begins_loop: bool
    text: str

    @functools.cached_property
    def products(self) -> int:
        """Pushes of rows into the matrix units."""
        return self.text.count("vmatmul")

    @property
    def fetches(self) -> bool:
        """Whether it starts a copy of an operand's next block."""
        return "hbm_to_vmem" in self.text


@dataclasses.dataclass
class Loop:
    """A loop's body, bundles and loops in order."""

    body: list[Bundle | Loop]

    @functools.cached_property
    def trips(self) -> int | None:
        """How often it runs, None if only the running program knows."""
        tests = (b.text for b in self.body if isinstance(b, Bundle) and "loop exit test" in b.text)
        found = re.search(r"scmp\.\w+[^,]*, (\d+) /\* loop exit test", " ".join(tests))
        return int(found[1]) if found else None

    @functools.cached_property
    def products(self) -> int:
        """Of one pass of the body; what runs for an unknown time does not count."""
        return sum(item.products for item in self.body if isinstance(item, Bundle) or item.trips)

    @functools.cached_property
    def fetches(self) -> bool:
        """As `Bundle.fetches`, of one pass of the body."""
        return any(item.fetches for item in self.body if isinstance(item, Bundle) or item.trips)


def read_kernels(folder: Path) -> dict[str, Path]:
    """Files of final bundles by the name of the instruction whose kernel it is; of several programs, of the last one.

    Their names begin with the time.
    """
    files = sorted(folder.glob("*-final_bundles.txt"), key=lambda file: int(file.name.partition("-")[0]))
    return {re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", file.name): file for file in files}


@functools.cache
def read_kernel(path: Path) -> Kernel:
    """Cycles of the kernel in a file of final bundles."""
    bundles = without_strays(list(parse(path.read_text(errors="replace"))))
    tiles, row = grid_of(bundles[0].text if bundles else "")
    total, longest = 0.0, Kernel(0, 1, 0, 0, 0, tiles)
    for item in nest(bundles, 0):
        if isinstance(item, Bundle):
            total += 1
            continue
        steps = max(1, (item.trips or 1 + PIPELINE_STEPS) - PIPELINE_STEPS)
        always, seldom, block = cost(item)
        step = always + seldom / row
        total += step * steps
        if step * steps > longest.step * longest.steps:
            longest = dataclasses.replace(longest, steps=steps, step=step, block=block, ragged=ragged(item))
    return dataclasses.replace(longest, cycles=total)


def parse(text: str) -> Iterator[Bundle]:
    """The bundles of a file, in order."""
    begun: Bundle | None = None
    for line in text.splitlines():
        found = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]+)?\s*:\s*(>*)\s*(\{.*)", line)
        if not found:
            if begun:
                begun.text += line
            continue
        label, marks, bundle = found.groups()
        depth = begun.depth if begun and bundle.startswith("{}") else len(marks)  # empty ones lack the marks
        if begun:
            yield begun
        begun = Bundle(depth, label == "LB", bundle)
    if begun:
        yield begun


def without_strays(bundles: list[Bundle]) -> list[Bundle]:
    """With the loops whole: a bundle in the middle of one, of what comes behind it, is marked as outside of it."""
    next_deeper: list[Bundle] = []  # candidates behind, nearest last
    for bundle in reversed(bundles):
        while next_deeper and next_deeper[-1].depth <= bundle.depth:
            next_deeper.pop()
        if next_deeper and not next_deeper[-1].begins_loop:
            bundle.depth = next_deeper[-1].depth
        else:
            next_deeper.append(bundle)
    return bundles


def nest(bundles: list[Bundle], depth: int) -> list[Bundle | Loop]:
    """Bundles of `depth` as they are, deeper ones in loops."""
    items: list[Bundle | Loop] = []
    inside: list[Bundle] = []
    for bundle in [*bundles, None]:
        another = bundle is None or bundle.depth <= depth or (bundle.depth == depth + 1 and bundle.begins_loop)
        if inside and another:
            items.append(Loop(nest(inside, depth + 1)))
            inside = []
        if bundle is not None and bundle.depth > depth:
            inside.append(bundle)
        elif bundle is not None:
            items.append(bundle)
    return items


def cost(loop: Loop) -> tuple[float, float, float]:
    """Bundles of a body that run in every step; in one step of a row; of the innermost branch with the products."""
    body = loop.body
    weights = [1.0 if isinstance(item, Bundle) else (item.trips or 0) * sum(cost(item)[:2]) for item in body]
    found = branches(body)
    products = [item.products if known(item) else 0 for item in body]
    # A few products are a row's beginning, such as its queries' rotation.
    hot = {b for b in found if sum(products[slice(*b)]) > 0.05 * sum(products)}
    hot |= {b for b in found if any(item.fetches for item in body[slice(*b)] if known(item))}
    if not any(item.products for b in found for item in body[slice(*b)]):  # no products at all: long ones are the work
        hot |= {b for b in found if sum(weights[slice(*b)]) > 0.2 * sum(weights)}
    always = [all(b in hot for b in found if b[0] <= i < b[1]) for i in range(len(body))]
    steady = sum(weight for weight, runs in zip(weights, always, strict=True) if runs)
    inner = [b for b in hot if 2 * sum(products[slice(*b)]) > sum(products)]
    first, last = min(inner, key=lambda b: b[1] - b[0], default=(0, len(body)))
    block = sum(weights[i] for i in range(first, last) if always[i])
    return steady, sum(weights) - steady, block


def ragged(loop: Loop) -> float:
    """See `Kernel.ragged`."""
    unknown = [item for item in loops(loop) if item.trips is None]
    return sum(cost(max(unknown, key=lambda item: item.products))[:2]) if unknown else 0.0


def loops(loop: Loop) -> Iterator[Loop]:
    """Those inside of a loop, however deep."""
    for item in loop.body:
        if isinstance(item, Loop):
            yield item
            yield from loops(item)


def known(item: Bundle | Loop) -> bool:
    """Whether it is known to run."""
    return isinstance(item, Bundle) or item.trips is not None


def branches(body: list[Bundle | Loop]) -> set[tuple[int, int]]:
    """First and behind the last of what branches forward may skip."""
    found = set()
    for i, item in enumerate(body):
        for region in re.findall(r"sbr\.rel \([^)]*\) target = \$region(\d+)", getattr(item, "text", "")):
            mark = re.compile(rf"(?:Start|Start/End empty) region {region}\b")
            ends = (j for j in range(i + 1, len(body)) if mark.search(getattr(body[j], "text", "")))
            end = next(ends, 0)
            if end > i + DELAY:
                found.add((i + DELAY, end))
    return found


def grid_of(text: str) -> tuple[float, int]:
    """Tiles of scores of a step, and steps of a row of the grid, by the windows that the first bundle names."""
    pattern = r"kind: input[^/]*/\*[^/]*?window shape is \w+\[([\d,]*)\], while the full shape is \w+\[([\d,]*)\]"
    windows = [[[int(n) for n in shape.split(",") if n] for shape in pair] for pair in re.findall(pattern, text)]
    wide = [(window, full) for window, full in windows if len(window) > 1 and min(window[-2:]) >= 64]
    if len(wide) < 2:
        return 0.0, 1
    (queries, _), (keys, all_keys) = wide[:2]
    return queries[-2] * keys[-2] / TILE, -(-all_keys[-2] // keys[-2])
