"""Cycles of a compiled TPU program, counted without a TPU: by instruction, kind and source line.

    python benchmarks/tpu_static.py --config configs/flf2v_14b_720p.py --target v6e:2x4

The schedule is walked as one device runs it, loops as often as they do.

- Pallas kernels: their bundles (`wanjax.report.bundles`), or the time that their operands take from memory once if that
  is more.
- All else: XLA's own estimate, which has stalls for memory in it, or bundles where there is none.
- Collectives: a clock runs along the schedule; what is not through when its result is needed makes the program wait.
  They take bytes over half of the chip's links at nominal speed, one after the other. That is an assumption.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wanjax.report import hlo
from wanjax.report.bundles import Kernel, read_kernel, read_kernels

KINDS: tuple[str, ...] = ("attention", "matmul", "elementwise", "copies", "wait")
ATTENTION = re.compile("flash|attention|splash|int8fp8|bounded")
"""Names of attention's kernels."""
PRODUCTS = re.compile("matmul|product")
MOVES = {
    *("bitcast", "bitcast-convert", "broadcast", "concatenate", "constant", "copy", "dynamic-slice", "fusion"),
    *("dynamic-update-slice", "get-tuple-element", "iota", "pad", "parameter", "reshape", "reverse", "slice"),
    *("transpose", "tuple"),
}
"""What a fusion that only moves data is made of."""


class Chip(NamedTuple):
    """Of a device.

    flops: bf16 a second.
    flops_per_cycle: as bundles issue them to its matrix units; the clock is the quotient.
    memory: bytes a second.
    links: bytes a second of all links, both ways.
    """

    flops: float
    flops_per_cycle: int
    memory: float
    links: float

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.flops / self.flops_per_cycle


CHIPS = {
    "v5p": Chip(459e12, 2**18, 2765e9, 600e9),
    "v6e": Chip(918e12, 2**19, 1640e9, 448e9),
    "tpu7x": Chip(1153.5e12, 2**20, 3690e9, 600e9),
}
"""tpu7x's device is one of its two cores; v5p is counted as one core with half of the work of a chip."""


@dataclasses.dataclass
class Item:
    """An instruction of the schedule.

    Attributes:
      kind: of KINDS.
      cycles: of one execution.
      times: executions.
      loops: iterations of the loops around it, outermost first.
      bundles: of its kernel, 0 if it has none.
      instruction, source: what it is and where in the model it comes from.
    """

    kind: str
    cycles: float
    times: int
    loops: tuple[int, ...]
    bundles: float
    instruction: hlo.Instruction
    source: str

    @property
    def total(self) -> float:
        """Cycles of all executions."""
        return self.cycles * self.times

    def passes(self, layers: int) -> int:
        """Iterations of the loop over `layers` layers around it: fewer where the compiler has taken the first or last
        ones out; 0 without such a loop."""
        return max((trips for trips in self.loops if max(2, layers - 2) <= trips <= layers), default=0)


class Count:
    """Walks a program. `items` and `kernels` by instruction, `payload` in bytes by kind of collective."""

    def __init__(self, text: str, folder: Path, topology: str):
        """`text` of the compiled program, `folder` of the bundles, `topology` such as v6e:2x4."""
        self.computations = hlo.parse(text)
        self.files = read_kernels(folder)
        self.chip = CHIPS[topology.partition(":")[0]]
        self.sources = dict(frames(text))
        self.items: dict[tuple[str, str], Item] = {}
        self.kernels: dict[str, Kernel] = {}
        self.payload: dict[str, float] = collections.defaultdict(float)
        self.flight: dict[str, float] = {}  # when collectives are through
        self.now = self.links_free = 0.0
        self.shapes = {i.name: i.result for body in self.computations.values() for i in body}
        every = (i for body in self.computations.values() for i in body)
        self.alike = {self.likeness(i): self.files[i.name] for i in every if i.name in self.files}
        self.run("ENTRY")

    def totals(self) -> dict[str, float]:
        """Cycles by kind."""
        found = dict.fromkeys(KINDS, 0.0)
        for item in self.items.values():
            found[item.kind] += item.total
        return found

    def layer(self, layers: int) -> dict[str, float]:
        """Cycles by kind of one pass of each loop over so many layers."""
        found = dict.fromkeys(KINDS, 0.0)
        for item in self.items.values():
            if passes := item.passes(layers):
                found[item.kind] += item.total / passes
        return found

    def run(self, name: str, times: int = 1, loops: tuple[int, ...] = ()) -> None:
        """Walk a computation that runs `times` times, in loops of so many iterations."""
        body = self.computations.get(name, [])
        results = {
            hlo.operands(i.line)[0]: i.result for i in body if i.opcode.endswith("-done") and hlo.operands(i.line)
        }
        for i in body:
            kind = re.sub("-(start|done)$", "", i.opcode)
            if i.opcode == "while":
                count = max(1, hlo.trip_count(self.computations, name, i))
                inner = attribute(i, r"body=%?([^\s,}]+)")
                for share in (1, count - 1)[: min(count, 2)]:  # twice: in the second, the clock is the steady one
                    self.run(inner, times * share, (*loops, count))
            elif kind in hlo.KINDS:
                key = hlo.operands(i.line)[0] if i.opcode.endswith("-done") else i.name
                if not i.opcode.endswith("-done"):
                    self.send(key, i, results.get(i.name, i.result), times)
                if not i.opcode.endswith("-start"):
                    self.wait(key, i, times, loops)
            elif i.opcode in ("call", "conditional"):
                self.run(called(i)[-1], times, loops)
            else:
                self.compute(i, times, loops)

    def compute(self, i: hlo.Instruction, times: int, loops: tuple[int, ...]) -> None:
        """An instruction that is no collective, but may carry a step of one."""
        inner = list(self.inside(i))
        moved = next((j for j in inner if re.sub("-start$", "", j.opcode) in hlo.KINDS), None)
        targets = {attribute(j, r'custom_call_target="([^"]*)"') for j in (i, *inner) if j.opcode == "custom-call"}
        if moved and (i.opcode.endswith("-start") or "AsyncCollectiveStart" in targets):
            self.send(i.name if i.opcode.endswith("-start") else hlo.channel(moved.line), moved, moved.result, times)
        if i.opcode.endswith("-start"):
            return
        if i.opcode.endswith("-done"):
            self.wait(hlo.operands(i.line)[0], i, times, loops)
            return
        kind, cycles, bundles = self.judge(i, inner, targets)
        if cycles:
            self.add(kind, cycles, bundles, i, times, loops)
        if "AsyncCollectiveDone" in targets and moved:
            self.wait(hlo.channel(moved.line), i, times, loops)

    def judge(self, i: hlo.Instruction, inner: list[hlo.Instruction], targets: set[str]) -> tuple[str, float, float]:
        """Kind, cycles and bundles of one execution."""
        path = self.files.get(i.name) or self.alike.get(self.likeness(i))  # of equal kernels the compiler makes one
        kernel = read_kernel(path) if path else None
        bundles = kernel.cycles if kernel else 0.0
        codes = {j.opcode for j in (i, *inner)} - set(hlo.KINDS)
        if "tpu_custom_call" in targets:
            calls = [j for j in (i, *inner) if j.opcode == "custom-call"]
            names = " ".join(j.name + attribute(j, r'op_name="([^"]*)"') for j in calls)
            kind = "attention" if ATTENTION.search(names) else "matmul" if PRODUCTS.search(names) else "elementwise"
            if kernel:
                self.kernels[i.name] = kernel
            return kind, max(bundles, self.from_memory(calls)), bundles
        kind = "matmul" if codes & {"convolution", "dot"} else "copies" if codes <= MOVES else "elementwise"
        return kind, float(attribute(i, r'"estimated_cycles":"(\d+)"') or bundles), bundles

    def likeness(self, i: hlo.Instruction) -> tuple[str, ...]:
        """What two instructions with the same kernel have in common; kernels of one name may differ in operands."""
        given = (self.shapes.get(operand, "") for operand in hlo.operands(i.line))
        return i.opcode, i.result, attribute(i, r"kind=(k\w+)"), attribute(i, r'estimated_cycles":"(\d+)"'), *given

    def from_memory(self, calls: list[hlo.Instruction]) -> float:
        """Cycles in which operands and results of kernels travel once."""
        texts = [j.result for j in calls] + [self.shapes.get(o, "") for j in calls for o in hlo.operands(j.line)]
        size = sum(hlo.size(array) for text in texts for array in hlo.shapes(text))
        return size / self.chip.memory * self.chip.clock

    def inside(self, i: hlo.Instruction) -> Iterator[hlo.Instruction]:
        """All that an instruction calls."""
        for name in called(i):
            for j in self.computations.get(name, ()):
                yield j
                yield from self.inside(j)

    def add(
        self, kind: str, cycles: float, bundles: float, i: hlo.Instruction, times: int, loops: tuple[int, ...]
    ) -> None:
        """Count an instruction; the clock moves on by one execution."""
        self.now += cycles
        before = self.items.get((i.name, kind))
        source = self.sources.get(attribute(i, r"stack_frame_id=(\d+)"), "")
        self.items[i.name, kind] = Item(
            kind, cycles, times + (before.times if before else 0), loops, bundles, i, source
        )

    def send(self, key: str, i: hlo.Instruction, result: str, times: int) -> None:
        """A collective sets out."""
        kind, group = re.sub("-start$", "", i.opcode), hlo.group_size(i.line)
        size = sum(hlo.size(array) for array in hlo.shapes(result))
        size *= group if kind == "reduce-scatter" else 2 if kind == "all-reduce" else 1
        size *= 1 if kind == "collective-permute" else (group - 1) / group
        self.payload[kind] += size * times
        cycles = size / (self.chip.links / 2) * self.chip.clock
        self.links_free = self.flight[key] = max(self.links_free, self.now) + cycles

    def wait(self, key: str, i: hlo.Instruction, times: int, loops: tuple[int, ...]) -> None:
        """Until a collective is through."""
        if key in self.flight:
            self.add("wait", max(0.0, self.flight.pop(key) - self.now), 0.0, i, times, loops)


def attribute(i: hlo.Instruction, pattern: str) -> str:
    """The first group of a pattern in an instruction's line, empty if it is not there."""
    return (re.search(pattern, i.line) or ["", ""])[1]


def called(i: hlo.Instruction) -> list[str]:
    """Computations that an instruction calls; of a conditional, all branches."""
    names = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([^\s,}]+)", i.line)
    return names + re.findall(r"[^\s,%]+", attribute(i, r"(?:branch|called)_computations=\{([^}]*)\}"))


def frames(text: str) -> Iterator[tuple[str, str]]:
    """Every stack frame of a program's text, and its file and line."""
    tables: dict[str, dict[str, str]] = {}
    table: dict[str, str] = {}
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif tables and (found := re.match(r"(\d+) (.*)", line)):
            table[found[1]] = found[2]
        elif line.endswith("{") and tables:
            break
    for number, frame in tables.get("StackFrames", {}).items():
        place = tables["FileLocations"].get(field(frame, "file_location_id"), "")
        path = tables["FileNames"].get(field(place, "file_name_id"), "").strip('"')
        yield number, f"{'/'.join(path.split('/')[-2:])}:{field(place, 'line')}"


def field(text: str, name: str) -> str:
    """The number behind `name=`."""
    return (re.search(rf"\b{name}=(\d+)", text) or ["", ""])[1]
