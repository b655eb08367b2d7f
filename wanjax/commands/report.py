"""What a full-size run takes of every device, without one.

    wanjax report --config configs/flf2v_14b_720p.py                        # counted, in seconds, on any machine
    wanjax report --config configs/flf2v_14b_720p.py --compile v6e:2x4      # as the TPU's compiler says, in minutes

Every program is traced on every mesh that the configuration names (`MESHES`): what does not fit together fails here.
Parameters, optimiser state and inputs are counted exactly, activations are estimated. --compile needs the extra `aot`
(TPUs) or `aot-gpu` (NVIDIA GPUs).
"""

from __future__ import annotations

from wanjax.cli import Parser


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax report", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="configs/*.py")
    parser.add_argument("--mesh", metavar="AXES", help="instead of those the configuration names; without -1")
    parser.add_argument("--compile", metavar="TOPOLOGY", help="for v6e:2x4, h100:8 or the like (extra aot, aot-gpu)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="with --compile: programs, such as 'DiT step'")
    parser.add_argument("--quantize", choices=("fp8", "int8"), help="the DiT's matrices, as wanjax sample does")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = make_parser().parse_args(argv)

    from wanjax.report import memory

    memory.report(args)
