"""Bytes and collectives of a full-size run on every device, program by program, without the hardware.

    wanjax report --config configs/flf2v_14b_720p.py                        # counted, in seconds, on any machine
    wanjax report --config configs/flf2v_14b_720p.py --compile v6e:2x4      # as the TPU's compiler says, in minutes

The figures that `wanjax plan` makes its verdict of, compiled anew at each call, in this process. Weights, optimiser
state and inputs are exact, activations estimated where nothing is compiled. --compile needs the extra `aot` (TPUs) or
`aot-gpu` (NVIDIA GPUs).
"""

from __future__ import annotations

from wanjax.cli import Parser, printable
from wanjax.errors import InputError


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax report", description=__doc__)
    parser.add_argument("--config", type=printable, required=True, metavar="FILE", help="configs/*.py")
    parser.add_argument(
        "--mesh", type=printable, metavar="AXES", help="instead of those the configuration names; without -1"
    )
    parser.add_argument(
        "--compile", type=printable, metavar="TOPOLOGY", help="for v6e:2x4, h100:8 or the like (extra aot, aot-gpu)"
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", help="with --compile: programs, such as 'DiT step'")
    parser.add_argument("--quantize", choices=("fp8", "int8"), help="the DiT's matrices, as wanjax sample does")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    from wanjax.commands import plan

    args = make_parser().parse_args(argv)
    if args.only and not args.compile:
        raise InputError("--only without --compile; with it, names of programs are accepted; give both or none")
    planned = ["--config", args.config, *(["--target", args.compile] if args.compile else [])]
    for name in ("mesh", "quantize"):
        if getattr(args, name) is not None:
            planned += [f"--{name}", getattr(args, name)]
    planned = plan.make_parser().parse_args(planned)
    if not args.compile:
        plan.print_counted(args.config, planned)
        return

    from wanjax.report import compiled
    from wanjax.report.memory import table

    compiled.check_compiler(args.compile)
    case = plan.make_case(args.config, planned)
    print(f"{args.config} on {case.target}, {case.mesh}: GiB per device, as compiled")
    for name in plan.program_names(case, args.only):
        print(table({f"{name:13}": compiled.measure(case, name).as_row()}), flush=True)
