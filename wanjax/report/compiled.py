"""The compilers' figures of a run's programs, for hardware that is not there.

    case = Case(config, dit, "v6e:2x4", "data=2,ulysses=4")
    for name, figures in measure_all([(case, name) for name in stages(case)], folder): ..

Programs are compiled in processes of their own, as many at once as there are cores; figures are kept in files, whose
names are hashes of the sources, the libraries and all that was asked.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanjax.config import DiTConfig, SampleConfig, TrainConfig
from wanjax.errors import InputError
from wanjax.files import replacing
from wanjax.report.bundles import FLAGS
from wanjax.report.cycles import CHIPS, Count
from wanjax.report.devices import GIB, GPUS, count

if TYPE_CHECKING:
    from wanjax.report.programs import Stage

MAIN = ("DiT step", "training step")
"""The programs that take nearly all of the time, and have kernels."""
LIBRARIES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Case:
    """A run and what it runs on.

    config: of sampling or training.
    dit: the network, with its dtypes and format.
    target: such as v6e:2x4 or h100:8.
    mesh: as `sharding.mesh.parse_mesh` takes it.
    experts: how many networks like `dit` there are.
    """

    config: SampleConfig | TrainConfig
    dit: DiTConfig
    target: str
    mesh: str
    experts: int = 1


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of a program on one device, in bytes.

    peak: in use at the worst moment, arguments included, as the compiler says.
    parts: of the arguments, by what they are; see `wanjax.report.programs.Stage.parts`.
    payload: of collectives by kind, in a run of the program.
    exposed: of these, while nothing is computed.
    operations: of all devices together, by dtype: the model's, each once.
    cycles: by kind of instruction (`wanjax.report.cycles`); empty where they cannot be counted.
    unused: of the network's weights that lie there all the same, as other programs take them.
    refused: the compiler gave up, as the program does not fit; nothing but `peak`, which it named, is known.
    """

    peak: int
    parts: dict[str, int]
    payload: dict[str, int]
    exposed: int
    operations: dict[str, int]
    cycles: dict[str, float]
    unused: int = 0
    refused: bool = False

    @property
    def arguments(self) -> int:
        """Bytes of all arguments."""
        return sum(self.parts.values())

    def as_row(self) -> dict[str, float]:
        """What is in memory and what travels, as a row of `wanjax.report.memory.table`."""
        return {"arguments": self.arguments, "peak": self.peak, **self.payload, "exposed": self.exposed}


def check_compiler(target: str) -> None:
    """Raises `InputError` unless the target is known and its compiler is installed."""
    count(target)
    is_gpu = target.partition(":")[0] in GPUS
    library, extra = ("jax-cuda12-plugin", "aot-gpu") if is_gpu else ("libtpu", "aot")
    if _version(library) is None:
        kind = "NVIDIA GPUs" if is_gpu else "TPUs"
        raise InputError(
            f"--target {target} needs the compiler for {kind}, {library}, which is not installed; "
            f"pip install 'wanjax[{extra}]', or leave --target out for an estimate"
        )


def measure_all(
    wanted: Sequence[tuple[Case, str]], folder: Path | None, processes: int | None = None
) -> Iterator[tuple[Case, str, Figures]]:
    """Figures as they come, of programs named as `wanjax.report.programs.stages` names them.

    Args:
      wanted: cases and names of programs.
      folder: keeps the figures; None: every program is compiled.
      processes: that compile at once; as many as there are cores by default. 0: this one does.
    """
    missing = []
    for case, name in wanted:
        kept = _read(folder, case, name)
        if kept is None:
            missing.append((case, name))
        else:
            yield case, name, kept
    if processes == 0:
        for case, name in missing:
            _write(folder, case, name, figures := measure(case, name))
            yield case, name, figures
        return
    if not missing:
        return
    workers = min(processes or os.cpu_count() or 1, len(missing))
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="wanjax-plan-", ignore_cleanup_errors=True) as bundles,
        concurrent.futures.ProcessPoolExecutor(workers, spawn, max_tasks_per_child=1) as pool,
    ):
        futures = {pool.submit(measure_alone, case, name, bundles): (case, name) for case, name in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                case, name = futures[future]
                _write(folder, case, name, figures := future.result())
                yield case, name, figures
        except BaseException:
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                process.kill()  # libtpu takes any other signal for a crash, and prints pages
            raise


def measure_alone(case: Case, name: str, place: str) -> Figures:
    """`measure` in a process that does nothing else, as libtpu reads its flags once; a folder for what it writes."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # for no device of this machine
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of what XLA says, errors
    if name not in MAIN or case.target.partition(":")[0] not in CHIPS:
        return measure(case, name)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        flags = FLAGS.format(folder=folder)
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
        return measure(case, name, Path(folder))


def measure(case: Case, name: str, bundles: Path | None = None) -> Figures:
    """Compile a program of a case.

    Args:
      case, name: as `measure_all` takes them.
      bundles: folder that this process's libtpu writes kernels into.

    Raises:
      InputError: the target, or the mesh on it, cannot be used.
    """
    import jax

    from wanjax.report import programs
    from wanjax.report.memory import bytes_per_device
    from wanjax.report.topology import topology_mesh

    mesh = topology_mesh(case.target, case.mesh)
    with jax.set_mesh(mesh):
        stage = programs.stages(case.config, case.dit, mesh)[name]()
        parts = {part: bytes_per_device(tree) for part, tree in stage.parts().items()}
        try:
            compiled = compile_stage(case, stage)
        except jax.errors.JaxRuntimeError as error:
            if (needed := _needed(str(error))) is None:
                raise
            return Figures(needed, parts, {}, 0, {}, {}, refused=True)
    found = read_figures(compiled, parts, programs.operations(case.config, case.dit, name))
    if case.target.partition(":")[0] not in CHIPS or (name in MAIN and bundles is None):
        return found
    # Programs without kernels are counted by XLA's own estimates.
    cycles = Count(compiled.as_text(), bundles or Path(os.devnull), case.target).totals()
    return dataclasses.replace(found, cycles=cycles)


def compile_stage(case: Case, stage: Stage) -> Any:
    """A program of a case, compiled on the ambient mesh with the options of its target."""
    from sharding.xla_options import GPU_OPTIONS, TPU_OPTIONS, TPU_OPTIONS_8_BIT

    options: dict[str, Any] = TPU_OPTIONS if case.dit.quantize == "off" else TPU_OPTIONS_8_BIT
    if case.target.partition(":")[0] in GPUS:
        options = GPU_OPTIONS
    # Optimised even where the environment says otherwise, as the tests' does for CPUs.
    return stage.lower().compile(compiler_options={**options, "xla_backend_optimization_level": 3})


def read_figures(compiled: Any, parts: dict[str, int], operations: dict[str, int]) -> Figures:
    """Figures of a compiled program, but for its cycles."""
    from wanjax.report.hlo import KINDS, read

    program = read(compiled)
    more = program.arguments - sum(
        parts.values()
    )  # the schedule and rounding to tiles, or weights that it does not take
    unused = -more if more < 0 else 0
    parts = parts | {"inputs": parts["inputs"] + max(0, more), "weights": parts["weights"] - unused}
    payload = {kind: program.payload(kind) for kind in KINDS}
    exposed = sum(program.payload(kind, asynchronous=False) for kind in KINDS)
    return Figures(program.peak, parts, payload, exposed, operations, {}, unused)


def _needed(error: str) -> int | None:
    """Bytes that a compiler names where a program does not fit; None where it failed for another reason."""
    number = r"([\d.]+)([BKMGT]?)"
    found = re.search(rf"Used {number} of [\d.]+[BKMGT]? hbm", error)
    found = found or re.search(rf"memory required for HLO temporaries \({number}\)", error)
    return int(float(found[1]) * UNITS[found[2] or "B"]) if found else None


# ----------------------------------------------------------------------------------------------------- kept on the disk


def _file(folder: Path, case: Case, name: str) -> Path:
    from wanjax.sampling.compile_cache import code_version

    asked = [code_version(), {library: _version(library) for library in LIBRARIES}, repr(case), name]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return folder / "plans" / f"{name.replace(' ', '-')}-{digest}.json"


def _read(folder: Path | None, case: Case, name: str) -> Figures | None:
    if folder is None:
        return None
    try:
        return Figures(**json.loads(_file(folder, case, name).read_text()))
    except (OSError, ValueError, TypeError):  # not there, or damaged: compiled anew
        return None


def _write(folder: Path | None, case: Case, name: str, figures: Figures) -> None:
    if folder is None:
        return
    try:
        with replacing(_file(folder, case, name)) as path:
            path.write_text(json.dumps(dataclasses.asdict(figures)))
    except OSError:  # a folder that cannot be written to: it is compiled again next time
        return


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
