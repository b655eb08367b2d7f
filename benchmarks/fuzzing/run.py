"""Feeds malformed inputs to readers, and says what became of each: used, or refused in one line within seconds."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from wanjax.data.clip import UnusableClip
from wanjax.data.decode import Damaged
from wanjax.errors import InputError

from .command_lines import GOOD, argv_with, lines, try_line, workplace
from .faults import misplace, spoiled
from .limits import SLOWEST, limited
from .readers import READERS, Reader

MISPLACED = 0.05
"""Share of inputs that are no plain file."""
REFUSALS = (InputError, UnusableClip, Damaged)


def fuzz(seeds: Iterable[int], only: str | None = None, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Feeds each reader its inputs of these seeds; what was neither used nor refused, in words."""
    failures = []
    say(f"{'reader':36s} inputs   used  refused  slowest  failures")
    for name, reader in READERS.items():
        if only in (None, name):
            outcomes, slowest = Counter(), 0.0
            with tempfile.TemporaryDirectory() as folder:
                for seed in seeds:
                    outcome, seconds = try_one(reader, Path(folder), seed)
                    slowest = max(slowest, seconds)
                    if outcome not in ("used", "refused"):
                        failures.append(f"{name}, seed {seed}: {outcome}")
                        say(failures[-1])
                        outcome = "failure"
                    outcomes[outcome] += 1
            counts = [outcomes[kind] for kind in ("used", "refused", "failure")]
            say(f"{name:36s} {sum(counts):6} {counts[0]:6} {counts[1]:8} {slowest:6.2f} s {counts[2]:9}")
    return failures


def fuzz_command_lines(
    every: int = 1, first: int = 0, say: Callable[[str], None] = lambda line: None
) -> tuple[int, list[str]]:
    """Tries every n-th command line that has to be refused; how many these were, and which were not, in words."""
    tried, failures = 0, []
    with tempfile.TemporaryDirectory() as folder, workplace(Path(folder)):
        for name in GOOD:
            if (outcome := try_line(name, GOOD[name])) != "accepted":
                failures.append(f"{name} {' '.join(GOOD[name])}: {outcome}")
        for name, flag, value in itertools.islice(lines(), first, None, every):
            tried += 1
            if (outcome := try_line(name, argv_with(name, flag, value))) != "refused":
                failures.append(f"{name} {flag} {value[:80]!r}: {outcome}")
                say(failures[-1])
    say(f"{'command lines':36s} {tried:6} {'':6} {tried - len(failures):8} {'':10} {len(failures):9}")
    return tried, failures


def try_one(reader: Reader, parent: Path, seed: int) -> tuple[str, float]:
    """What became of an input, and how long it took."""
    folder, rng, refusals = parent / "input", random.Random(seed), REFUSALS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file = reader.make(folder)
    if rng.random() < MISPLACED:
        misplace(file, rng)
        refusals = (*REFUSALS, OSError)  # the one that says where, of which commands make a line
    elif file.is_file():
        file.write_bytes(spoiled(file.read_bytes(), rng, file.suffix))
    start = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()), limited():
            reader.read(folder)
        outcome = "used"
    except refusals as error:
        outcome = "refused" if str(error).isprintable() or isinstance(error, OSError) else f"not a line: {error!r}"
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a library in Rust is no Exception
        outcome = traceback.format_exc(limit=-4)
    seconds = time.process_time() - start
    return (outcome if seconds < SLOWEST else f"{seconds:.0f} s"), seconds
