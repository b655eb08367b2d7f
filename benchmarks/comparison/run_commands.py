"""Runs commands of the checkout that it is started in, one after the other in one process.

    python run_commands.py '[["demo", ["sample_jax.py", "--steps", "4"]], ["cache", ["-m", "wanjax", "cache"]]]'

One process, since most of a small run's time is the start and compiling. A line of JSON on standard output says how
each command ended; what it prints goes to standard error. Imports nothing of the project itself, as it runs old ones.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
import time
import traceback
from pathlib import Path


def main() -> None:
    """Run the commands."""
    sys.path[0] = str(Path.cwd())  # in place of this file's folder
    import wanjax

    assert wanjax.__file__ is not None
    if not Path(wanjax.__file__).resolve().is_relative_to(Path.cwd()):
        raise SystemExit(f"the interpreter takes wanjax from {wanjax.__file__}, not from {Path.cwd()}")
    for name, argv in json.loads(sys.argv[1]):
        print(f"== {name}: {' '.join(argv)}", file=sys.stderr)
        start = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            code = run(argv)
        print(json.dumps({"case": name, "code": code, "seconds": time.process_time() - start}), flush=True)


def run(argv: list[str]) -> int | str:
    """The exit code of a script, or of a module behind -m."""
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except Exception:  # whatever one command raises, the next one runs
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
