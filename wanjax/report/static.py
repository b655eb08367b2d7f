"""Cycles of a full-size program on TPUs that are not there, counted from what libtpu writes down while it compiles.

    cycles = static_cycles(Case(config, dit, "v6e:2x4", "data=2,ulysses=4"))     # a step of sampling, or of training
    cycles.seconds, cycles.layer["attention"], cycles.peak

Needs the extra `aot`. A process of its own compiles, as libtpu reads its flags once. A layer is one pass of each
loop over the layers, forward and backward; all else is "once". What is counted, and what it cannot tell, is in
`wanjax.report.cycles` and `wanjax.report.bundles`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from wanjax.config import CLIPConfig, SampleConfig, TrainConfig, UMT5Config
from wanjax.errors import InputError
from wanjax.report.bundles import FLAGS
from wanjax.report.compiled import Case, compile_stage
from wanjax.report.cycles import CHIPS, Count
from wanjax.report.programs import latent_shape

PROGRAM, FACTS = "program.txt", "facts.json"
"""Files beside the bundles: the compiled program's text, and what was asked for with what only the compiler knows."""
FIXED_LAYERS = {"umT5": UMT5Config().num_layers, "CLIP": CLIPConfig().num_layers - 1, "VAE encode": 0, "VAE decode": 0}
"""Layers that a program runs, where they are not the DiT's. Of CLIP's, the last one is not asked."""


@dataclasses.dataclass(frozen=True)
class Cycles:
    """What a run of a program takes of one device.

    Attributes:
      program: its name.
      layer: cycles of a layer by kind, see `wanjax.report.cycles.KINDS`.
      once: likewise of the rest of a run.
      layers: of the network that the program runs; 0 if no loop goes over them.
      runs: of the program in the making of a video; 1 of training. Of the VAE's chunks the first is a smaller one.
      peak: bytes in use at the worst moment.
      clock: cycles a second, a quotient of nominal figures.
    """

    program: str
    layer: dict[str, float]
    once: dict[str, float]
    layers: int
    runs: int
    peak: int
    clock: float

    @property
    def total(self) -> float:
        """Cycles of a run."""
        return self.layers * sum(self.layer.values()) + sum(self.once.values())

    @property
    def seconds(self) -> float:
        """Of a run, at the nominal clock."""
        return self.total / self.clock


def static_cycles(
    case: Case, program: str | None = None, *, limit: float | None = 1800, folder: Path | None = None
) -> Cycles:
    """Compiles a program, in one to five minutes of a core, and counts.

    Args:
      case: the run, on TPUs.
      program: as `wanjax.report.programs.stages` names it; None: its first, the step.
      limit: seconds that the compiler may take; None: as long as it likes.
      folder: keeps what the compiler writes, for `read`; None: it goes.

    Raises:
      InputError: no cycles are known of the target; it does not compile, or not within the limit.
    """
    target = case.target
    check_target(target)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="wanjax_static") as temporary:
            return static_cycles(case, program, limit=limit, folder=Path(temporary))
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {FLAGS.format(folder=folder.resolve())}".strip()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags, "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "wanjax.report.static", str(folder)]
    try:
        asked = pickle.dumps((case, program))
        done = subprocess.run(command, input=asked, env=environment, stderr=subprocess.PIPE, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{program or 'the step'} for {target} is not compiled after {limit:.0f} s; allow more"
        ) from None
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise InputError(
            f"{program or 'the step'} does not compile for {target} ({reason}); other settings may; change them"
        )
    return read(folder)[1]


def check_target(target: str) -> None:
    """Raises `InputError` where nothing is known of a target's cycles."""
    if target.partition(":")[0] not in CHIPS:
        raise InputError(f"no cycles are known of {target}; accepted: {', '.join(CHIPS)} with a shape, such as v6e:2x4")


def compile_into(folder: Path, case: Case, program: str | None) -> None:
    """Compiles; the program's text and FACTS are in `folder` then, and the bundles, where libtpu's flags say so."""
    import jax

    from wanjax.report import programs
    from wanjax.report.topology import topology_mesh

    mesh = topology_mesh(case.target, case.mesh)
    with jax.set_mesh(mesh):
        stages = programs.stages(programs.one_sample_each(case.config, mesh), case.dit, mesh)
        program = program or next(iter(stages))
        if program not in stages:
            raise InputError(f"no program {program!r}; accepted: {', '.join(stages)}")
        compiled = compile_stage(case, stages[program]())
    (folder / PROGRAM).write_text(compiled.as_text())
    facts = {
        "target": case.target,
        "mesh": case.mesh,
        "program": program,
        "quantize": case.dit.quantize,
        "kernel": case.dit.attention,
        "runs": runs(case.config, program),
        "layers": FIXED_LAYERS.get(program, case.dit.num_layers),
        "peak": compiled.memory_analysis().peak_memory_in_bytes,
    }
    (folder / FACTS).write_text(json.dumps(facts))


def runs(config: SampleConfig | TrainConfig, program: str) -> int:
    """See `Cycles.runs`."""
    if isinstance(config, TrainConfig):
        return 1
    return {"DiT step": config.steps}.get(program) or (latent_shape(config)[0] if program.startswith("VAE") else 1)


def read(folder: Path) -> tuple[Count, Cycles, dict]:
    """The walk through the program that lies in a folder, its cycles, and its FACTS."""
    facts = json.loads((folder / FACTS).read_text())
    count = Count((folder / PROGRAM).read_text(), folder, facts["target"])
    layers, layer = facts["layers"], count.layer(facts["layers"])
    layers = layers if any(layer.values()) else 0
    once = {kind: cycles - layers * layer[kind] for kind, cycles in count.totals().items()}
    return count, Cycles(facts["program"], layer, once, layers, facts["runs"], facts["peak"], count.chip.clock), facts


def main() -> None:
    """In the process of its own: what to compile comes from its parent, by standard input."""
    try:
        compile_into(Path(sys.argv[1]), *pickle.load(sys.stdin.buffer))
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
