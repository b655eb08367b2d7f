"""Malformed inputs for every reader, and what becomes of them: used, or refused in one line within seconds.

    python benchmarks/fuzz.py                    # the seeds of the tests
    python benchmarks/fuzz.py --seeds 500        # as long as you like
    python benchmarks/fuzz.py --only lora

An input is a good one with a fault that a seed draws: bytes turned, cut, doubled, zeroed, replaced by what parsers
stumble over; numbers of JSON replaced by NaN, huge, negative or nested ones; or no file at all, but a pipe, a device, a
loop of links. Then come command lines, each with a value that a flag does not take. Prints a table, and each input that
was neither used nor refused, with its seed; exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys

from fuzzing.run import fuzz, fuzz_command_lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60, help="inputs for each reader (60)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--lines", type=int, default=1, metavar="N", help="every n-th command line (1); 0: none")
    flags = parser.parse_args()
    failures = fuzz(range(flags.first, flags.first + flags.seeds), flags.only, say=print)
    if flags.lines and not flags.only:
        failures += fuzz_command_lines(flags.lines, say=print)[1]
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
