"""Inputs that find new ways through the readers of binary formats, guided by coverage (extra `fuzz`).

    python benchmarks/fuzzing/guided.py gguf -max_total_time=60        # further flags are libFuzzer's, see -help=1

Formats: safetensors, gguf, npy, pth (with torch), mp4. Ends with the input that a reader neither takes nor refuses.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path[0] = str(Path(__file__).parents[1])  # in place of this file's folder

MODULES = ["wanjax.weights", "wanjax.media", "wanjax.untrusted", "wanjax.data.decode"]
with atheris.instrument_imports(include=MODULES):  # pyright: ignore[reportAttributeAccessIssue]  # it has no types
    from fuzzing.readers import READERS
    from fuzzing.run import REFUSALS

FORMATS = {"safetensors": "file: vae", "gguf": "file: gguf", "npy": "latents", "pth": "file: pth", "mp4": "mp4"}
"""Names of the readers."""


def main() -> None:
    """Run the command line."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if FORMATS.get(name) not in READERS:
        sys.exit(f"error: format {name!r}; one of {', '.join(FORMATS)} is accepted (pth needs torch); name one first")
    make, read = READERS[FORMATS[name]]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as corpus:
        file = make(Path(folder))
        (Path(corpus) / "good").write_bytes(file.read_bytes())
        atheris.Setup([*sys.argv, corpus, "-rss_limit_mb=4096", "-timeout=10"], one(file, lambda: read(Path(folder))))
        atheris.Fuzz()


def one(file: Path, read: Callable[[], object]) -> Callable[[bytes], None]:
    """What is done with an input: the reader takes it or refuses it."""

    def test(data: bytes) -> None:
        file.write_bytes(data)
        try:
            read()
        except REFUSALS as error:
            if not str(error).isprintable():
                raise RuntimeError(f"not a line: {str(error)!r}") from error

    return test


if __name__ == "__main__":
    main()
