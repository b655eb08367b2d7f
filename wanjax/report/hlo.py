"""What a compiled program costs, read off XLA's own text: memory, collectives, operations.

Operations are those that one device carries out: also what is computed again to save memory and what several devices
all do, but nothing inside of Pallas kernels, which XLA does not see. `wanjax.training.speed` counts before compiling:
the model's own operations, each once, attention's among them. Utilisation is told from those, a compiler's work from
these; neither can be had from the other.

    mesh = topology_mesh("v6e:2x4", "data=2,ulysses=4")
    with jax.set_mesh(mesh):
        program = read(jax.jit(f).lower(*shapes).compile(compiler_options=TPU_OPTIONS))

`wanjax.report.topology` has the mesh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")
WIDTHS = {"pred": 1, "bf16": 2, "s4": 0.5, "u4": 0.5}
"""Bytes of an element where its name does not end in its bits."""


class Collective(NamedTuple):
    """One collective of a program.

    kind: of `KINDS`.
    bytes: of its payload on one device and for one execution: what it returns, or for a reduce-scatter what it takes.
    times: executions in a run of the program; loops of unknown length count once.
    asynchronous: whether something else is computed meanwhile (overlapped; else the communication is exposed).
    operation: where it is in the model, as JAX names it.
    """

    kind: str
    bytes: int
    times: int
    asynchronous: bool
    operation: str


class Program(NamedTuple):
    """Costs on one device.

    peak: bytes in use at the worst moment, arguments included.
    arguments: bytes of the arguments.
    flops: of matrix products outside of kernels, in a run of the program.
    """

    peak: int
    arguments: int
    flops: int
    collectives: tuple[Collective, ...]

    def payload(self, kind: str, asynchronous: bool | None = None) -> int:
        """Bytes that the collectives of a kind move in a run: all, or only the asynchronous or synchronous ones."""
        wanted = (c for c in self.collectives if c.kind == kind and asynchronous in (None, c.asynchronous))
        return sum(c.bytes * c.times for c in wanted)


class Instruction(NamedTuple):
    """A line of a program's text."""

    name: str
    result: str
    opcode: str
    line: str


def read(compiled: Any) -> Program:
    """Costs of a `jax.stages.Compiled`."""
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    # A backend without a schedule does not report a peak.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    total -= memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0) or total
    if getattr(memory, "host_temp_size_in_bytes", 0):  # what waits in the host's memory is in libtpu's peak, too
        peak = min(peak, total)
    computations = parse(text)
    return Program(peak, memory.argument_size_in_bytes, flops(computations), tuple(collectives(computations)))


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation; that of the entry is also called ENTRY."""
    computations: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in whole_instructions(text):
        if head := re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line):
            body = computations[head[2]] = []
            if head[1]:
                computations["ENTRY"] = body
        elif found := re.match(r"\s+(?:ROOT )?%?(\S+) = (.*?[\])}]) ([a-z][a-z0-9-]*)\(", line):
            body.append(Instruction(found[1], found[2], found[3], line))
    return computations


def whole_instructions(text: str) -> Iterator[str]:
    """The lines of a text, those of an instruction that spans several put together."""
    begun = ""
    for line in text.splitlines():
        if begun and line.strip() and not re.match(r"\s+(ROOT )?%?\S+ = |\}|(ENTRY )?%?\S+ \(.*\{$", line):
            begun += " " + line.strip()
            continue
        if begun:
            yield begun
        begun = line if re.match(r"\s+(ROOT )?%?\S+ = ", line) else ""
        if not begun:
            yield line
    if begun:
        yield begun


def walk(computations: dict[str, list[Instruction]], name: str = "ENTRY", times: int = 1) -> Iterator[tuple]:
    """Every `(instruction, executions, computation)` of a run, down into loops, calls and fusions."""
    for i in computations.get(name, ()):
        yield i, times, name
        inner = times * trip_count(computations, name, i) if i.opcode == "while" else times
        called = re.findall(r"(?:body|condition|calls|to_apply|_computation)=%?([^\s,}]+)", i.line)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", i.line):
            called += re.findall(r"[^\s,%]+", group)
        for other in called:
            yield from walk(computations, other, inner)


def trip_count(computations: dict[str, list[Instruction]], name: str, loop: Instruction) -> int:
    """How often a `while` in computation `name` runs, 1 if unknown.

    CPUs and GPUs note it; TPUs do not: there the bound is a constant of the condition and the start one of the caller.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    condition = re.search(r"condition=%?([^\s,}]+)", loop.line)
    assert condition is not None
    inside = {i.name: i.line for i in computations[condition[1]]}
    around = {i.name: i.line for i in computations[name]}
    for i in computations[condition[1]]:
        if i.opcode == "compare" and "direction=LT" in i.line:
            counter, bound = (inside.get(operand, "") for operand in operands(i.line))
            place = re.search(r"get-tuple-element\(.*index=(\d+)", counter)
            carried = operands(around.get(operands(loop.line)[0], ""))
            start = constant(around.get(carried[int(place[1])], "")) if place and carried else None
            stop = constant(bound)
            return 1 if stop is None else max(0, stop - (start or 0))
    return 1


def constant(line: str) -> int | None:
    """The value of an integer constant; None for another instruction."""
    found = re.search(r" s32\[\]\S* constant\((\d+)\)", line)
    return int(found[1]) if found else None


def collectives(computations: dict[str, list[Instruction]]) -> Iterator[Collective]:
    """The collectives of a run.

    Asynchronous ones are pairs of start and done with work between them, or, on TPUs, go on inside of the fusions
    between the two: there the first fusion, which starts them, counts. A TPU's reduce-scatter may be written as a
    fusion of an all-reduce and the slice that a device keeps.
    """
    kernels = {name: " ".join(i.line for i in body if i.opcode == "custom-call") for name, body in computations.items()}
    fused = {name for name, text in kernels.items() if "AsyncCollectiveStart" in text}
    begun = {channel(i.line) for name in fused for i in computations[name] if i.opcode in KINDS}
    wrappers = ("async-start", "call-start")  # the latter where another core than the one that computes does it
    starts = [(i, body) for body in computations.values() for i in body if i.opcode in wrappers and overlapped(i, body)]
    wrapped = {name for i, _ in starts for name in re.findall(r"(?:calls|to_apply)=%?([^\s,}]+)", i.line)}
    plain = called_by_fusions(computations)
    for i, times, name in walk(computations):
        kind = i.opcode.removesuffix("-start")
        if kind not in KINDS or (name in plain - fused and channel(i.line) in begun):
            continue
        started = i.opcode.endswith("-start")
        # A start also returns its operands and what it waits on.
        result = sum(size(shape) for shape in shapes((done(i, computations[name]) if started else i).result))
        if kind == "reduce-scatter":
            result *= group_size(i.line)
        elif kind == "all-reduce" and name in plain and sliced(i, computations[name]):
            kind = "reduce-scatter"
        operation = re.search(r'op_name="([^"]*)"', i.line)
        asynchronous = name in fused | wrapped or (started and overlapped(i, computations[name]))
        yield Collective(kind, int(result), times, asynchronous, operation[1] if operation else "")


def done(start: Instruction, body: list[Instruction]) -> Instruction:
    """What waits for a start."""
    return next(i for i in body if i.opcode.endswith("-done") and start.name in operands(i.line))


def overlapped(start: Instruction, body: list[Instruction]) -> bool:
    """Whether something is computed between a start and its done, in the order of the text, which is the schedule's;
    what is not overlapped is exposed."""
    between = body[body.index(start) : body.index(done(start, body))]
    return any(i.opcode in ("fusion", "custom-call", "dot", "convolution", "while", "call") for i in between)


def sliced(reduced: Instruction, body: list[Instruction]) -> bool:
    """Whether only a slice of an all-reduce's result is used."""
    users = [i for i in body if reduced.name in operands(i.line)]
    return bool(users) and all(i.opcode == "dynamic-slice" for i in users)


def called_by_fusions(computations: dict[str, list[Instruction]]) -> set[str]:
    """Names of the computations that are fusions."""
    lines = (i.line for body in computations.values() for i in body if i.opcode == "fusion")
    return {name for line in lines for name in re.findall(r"calls=%?([^\s,}]+)", line)}


def flops(computations: dict[str, list[Instruction]]) -> int:
    """Operations of the matrix products that a device executes in a run; a TPU writes them as convolutions.

    `wanjax.training.speed.operations` counts what the model needs instead, for utilisation.
    """
    total = 0
    for i, times, name in walk(computations):
        if i.opcode not in ("dot", "convolution"):
            continue
        results = {other.name: other.result for other in computations[name]}
        left, right = (shape_of(results[operand]) for operand in operands(i.line)[:2])
        if i.opcode == "dot":
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.line)
            contracted = math.prod(left[int(d)] for d in dims[1].split(",") if d) if dims else 1
        else:
            labels = re.search(r"dim_labels=\w+_(\w+)->", i.line)
            assert labels is not None
            contracted = math.prod(n for n, label in zip(right, labels[1], strict=True) if label != "o")
        total += 2 * times * math.prod(shape_of(i.result)) * contracted
    return total


def operands(line: str) -> list[str]:
    """Names between the parentheses behind the opcode."""
    found = re.search(r" [a-z][a-z0-9-]*\(([^)]*)\)", line)
    return re.findall(r"%([^\s,()]+)", found[1]) if found else []


def channel(line: str) -> str:
    """What tells the pieces of one collective."""
    found = re.search(r"channel_id=(\d+)", line)
    return found[1] if found else line


def group_size(line: str) -> int:
    """Devices that take part in a collective with one another."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 1


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Arrays in the type of a result, as dtype and shape."""
    found = re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", text)
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found]


def shape_of(text: str) -> tuple[int, ...]:
    """The shape of a result that is one array."""
    return shapes(text)[0][1]


def size(array: tuple[str, Iterable[int]]) -> int:
    """Bytes of an array."""
    dtype, dims = array
    bits = re.search(r"(\d+)", dtype)
    width = WIDTHS.get(dtype, int(bits[1]) / 8 if bits else 0)
    return int(width * math.prod(dims))
