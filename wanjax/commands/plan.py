"""Whether a full-size run fits on hardware that is not here, how long it takes there, and what bounds it.

    wanjax plan --config configs/flf2v_14b_720p.py                                # counted, in seconds, on any machine
    wanjax plan --config configs/flf2v_14b_720p.py --target v6e:2x4               # as the TPU's compiler says
    wanjax plan --config configs/flf2v_14b_720p.py --target h100:8 --search       # and the command line to run there
    wanjax plan --config configs/flf2v_14b_720p.py --target v5p:4x4x4 --train

With --target the real programs are compiled for it, in a minute or two; figures are kept, and come at once the next
time. Memory is the compiler's, to the byte. The time of v5p, v6e and tpu7x is the compiler's schedule, counted; that of
other chips a bound from operations and bytes. Without --target, parameters, optimiser state and inputs are counted
exactly and activations estimated, on every mesh that the configuration names (`MESHES`). Of a training it says what
8 bits and the hosts' memory save, and which of them it needs.
--target needs the extra `aot` (TPUs) or `aot-gpu` (NVIDIA GPUs).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from wanjax.cli import Parser, add_settings, given_settings, printable
from wanjax.config import SampleConfig, TrainConfig
from wanjax.errors import InputError

if TYPE_CHECKING:
    from wanjax.report.compiled import Case
    from wanjax.report.plan import Plan

SAMPLING = ("height", "width", "frames", "steps", "guidance", "fast", "cache", "cfg_cache", "quantize", "attention")
SAMPLING += ("dtype", "mesh", "compile_cache")
TRAINING = ("batch", "remat", "optimizer", "offload_optimizer")


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax plan", description=__doc__)
    parser.add_argument("--config", type=printable, required=True, metavar="FILE", help="configs/*.py")
    parser.add_argument(
        "--target", type=printable, metavar="TOPOLOGY", help="v6e:2x4, v5p:4x4x4, tpu7x:2x2x1, h100:8 or the like"
    )
    parser.add_argument("--train", action="store_true", help="the training of that network: configs/train_*.py")
    parser.add_argument("--search", action="store_true", help="try meshes, 8 bits, remat and batch; recommend one")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="programs to compile, such as 'DiT step'")
    parser.add_argument("--json", action="store_true", help="one line for other programs, and nothing else")
    add_settings(parser, SampleConfig, SAMPLING)
    add_settings(parser, TrainConfig, TRAINING)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = make_parser().parse_args(argv)
    if args.target is None and (args.search or args.only or args.json):
        raise InputError("--search, --only and --json need a --target; such as v6e:2x4 or h100:8; give one")
    path = training_config(args.config) if args.train else args.config
    os.environ["JAX_PLATFORMS"] = "cpu"  # a plan needs no device of this machine

    if args.target is None:
        print_counted(path, args)
        return
    from wanjax.report import compiled
    from wanjax.report.show import shown

    compiled.check_compiler(args.target)
    case = make_case(path, args)
    plan = search(case, args) if args.search else compile_plan(case, args)
    if args.json:
        print(json.dumps({**plan.as_json(), "command": command(plan, path)}))
        return
    print("\n".join(shown(plan)))
    if isinstance(case.config, TrainConfig):
        print_savings(plan.case, plan.memory)
    if plan.fits:
        print(f"\n    {command(plan, path)}")
    elif not args.search:
        print("More devices or 8 bits take less; --search finds what fits.")


def training_config(path: str) -> str:
    """The configuration that trains what another samples.

    Raises:
      InputError: there is none beside it.
    """
    place = Path(path)
    if place.name.startswith("train_"):
        return path
    beside = place.with_name(f"train_{place.name}")
    if not beside.is_file():
        raise InputError(f"--train with {path}, beside which there is no {beside.name}; give a config of training")
    return str(beside)


def configured(path: str, args: argparse.Namespace):
    """The configuration with the flags, its network, its meshes and the number of experts.

    Raises:
      InputError: it cannot be read, or has no such setting.
    """
    from wanjax.report import memory
    from wanjax.sampling.compile_cache import cache_folder
    from wanjax.weights.quantize import requantized

    config, dit, meshes, experts = memory.load(path)
    given = given_settings(args, SampleConfig, SAMPLING) | given_settings(args, TrainConfig, TRAINING)
    cache_folder(SampleConfig(compile_cache=given.pop("compile_cache", None)).compile_cache)  # refuses what is none
    for name in given.keys() - {"attention"}:
        if name not in {field.name for field in dataclasses.fields(config)}:
            kind = "sampling" if isinstance(config, TrainConfig) else "training"
            raise InputError(f"--{name.replace('_', '-')} with {path}; it is a setting of {kind}; leave it out")
    dit = dataclasses.replace(dit, **{name: given.pop(name) for name in ("attention",) if name in given})
    config = dataclasses.replace(config, **given)
    format = config.quantize if isinstance(config, TrainConfig) else given.get("quantize")
    return config, requantized(dit, format), meshes, experts


def make_case(path: str, args: argparse.Namespace) -> Case:
    """What is planned: on the mesh that is given, that the configuration names for the target, or a good one.

    Raises:
      InputError: as `configured`; or the mesh does not fit the target.
    """
    from sharding.mesh import parse_mesh, sampling_mesh
    from sharding.ulysses import check_heads
    from wanjax.report import programs, search
    from wanjax.report.compiled import Case
    from wanjax.report.devices import count
    from wanjax.sampling.steps import is_guided

    config, dit, meshes, experts = configured(path, args)
    devices = count(args.target)
    mesh = args.mesh or meshes.get(args.target)
    if mesh == "data=1":  # one device of the target
        devices = 1
    if mesh is None and isinstance(config, SampleConfig):
        mesh = search.named(sampling_mesh(devices, dit.num_heads, is_guided(config)))
    elif mesh is None:
        mesh = search.named(search.training_mesh(devices, dit.num_heads))
    shape = parse_mesh(mesh, devices)
    check_heads(dit.num_heads, shape.ulysses)
    if args.batch is None:
        config = programs.one_sample_each(config, shape)
    return Case(config, dit, args.target, search.named(shape), experts)


def print_counted(path: str, args: argparse.Namespace) -> None:
    """What is counted on every mesh of the configuration, or on the one that is given.

    Raises:
      InputError: there is no mesh; or as `configured`.
    """
    from wanjax.report import memory
    from wanjax.report.compiled import Case
    from wanjax.report.devices import device

    config, dit, meshes, experts = configured(path, args)
    if args.mesh is not None:
        meshes = {"": args.mesh}
    elif not meshes:
        raise InputError(f"config {path} names no mesh; it needs MESHES = {{topology: mesh}}; or give --mesh")
    rows = {}
    for topology, text in meshes.items():
        rows[f"{text} {topology}".strip()] = memory.count(config, dit, memory.abstract_shape(text), experts)
    print(f"{path}: GiB per device; ~ estimated")
    print(memory.table(rows))
    for topology, text in meshes.items() if isinstance(config, TrainConfig) else ():
        print(f"\n{text} {topology}".rstrip())
        print_savings(Case(config, dit, topology, text), device(topology).memory if topology else None)


def print_savings(case: Case, memory: float | None) -> None:
    """What 8 bits and the hosts' memory save of a training, and which of them it needs."""
    from wanjax.report import memory as counted
    from wanjax.report import savings

    assert isinstance(case.config, TrainConfig)
    print("\n".join(savings.describe(case.config, case.dit, counted.abstract_shape(case.mesh), memory)))


def program_names(case: Case, only: list[str] | None) -> list[str]:
    """The programs of a case, or those of --only.

    Raises:
      InputError: there is none of that name.
    """
    from jax.sharding import AbstractMesh

    from sharding.mesh import AXES, MeshShape
    from wanjax.report import programs

    names = list(programs.stages(case.config, case.dit, AbstractMesh(tuple(MeshShape()), AXES)))
    for name in only or ():
        if name not in names:
            raise InputError(f"--only {name!r}; accepted: {', '.join(names)}; change it")
    return [name for name in names if only is None or name in only]


def compile_plan(case: Case, args: argparse.Namespace) -> Plan:
    """The plan of a case, by all of its programs or those of --only."""
    from wanjax.report import plan

    wanted = [(case, name) for name in program_names(case, args.only)]
    found = measured(wanted, args)
    return plan.make_plan(case, {name: found[case, name] for _, name in wanted})


def search(case: Case, args: argparse.Namespace) -> Plan:
    """The plan to recommend; what was compared is printed."""
    from wanjax.report import plan, search

    guesses = search.guesses(case)
    chosen = search.shortlist(guesses, plan.device(case.target).memory)
    name = search.main_program(case)
    found = measured([(each, name) for each in chosen], args)
    plans = [plan.make_plan(each, {name: found[each, name]}) for each in chosen]
    best = search.best(plans, case)
    if not args.json:
        from wanjax.report.show import compared

        print("\n".join(compared(plans, best, len(guesses))), end="\n\n")
    return compile_plan(best.case, args)


def measured(wanted: list, args: argparse.Namespace) -> dict:
    """Figures by case and program; a bar shows how far it is."""
    from tqdm import tqdm

    from wanjax.report import compiled
    from wanjax.sampling.compile_cache import cache_folder

    found = {}
    with tqdm(
        total=len(wanted), desc="compiling", unit="program", dynamic_ncols=True, leave=False, disable=None
    ) as bar:
        for case, name, figures in compiled.measure_all(wanted, cache_folder(args.compile_cache)):
            found[case, name] = figures
            bar.set_postfix_str(name)
            bar.update()
    return found


def command(plan: Plan, path: str) -> str:
    """The line that runs what is planned."""
    from wanjax.report.plan import environment

    case, config = plan.case, plan.case.config
    if isinstance(config, TrainConfig):
        flags = f"--mesh {case.mesh} --batch {config.batch} --remat {config.remat}"
        flags += "" if case.dit.quantize == "off" else f" --quantize {case.dit.quantize}"
        flags += "" if config.optimizer == "adamw" else f" --optimizer {config.optimizer}"
        flags += " --offload-optimizer" if config.offload_optimizer else ""
        return f"{environment(plan)}wanjax train --config {path} {flags} --workdir DIR"
    flags = f"--mesh {case.mesh}"
    flags += "" if case.dit.quantize == "off" else f" --quantize {case.dit.quantize}"
    task = case.dit.task
    pictures = {"t2v": "", "i2v": " --first-frame first.png", "flf2v": " --first-frame first.png --last-frame last.png"}
    ends = f'--checkpoint DIR{pictures[task]} --prompt "..."'
    return f"{environment(plan)}wanjax sample --config {path} {flags} {ends}"
