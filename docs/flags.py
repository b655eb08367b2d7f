"""Writes the README's table of flags from the fields of `SampleConfig`; with --check, says whether it is an old one."""

from __future__ import annotations

import argparse
import re
import sys
import typing
from pathlib import Path

from wanjax.cli import described, flag, flag_fields, options
from wanjax.config import SampleConfig

README = Path(__file__).parents[1] / "README.md"
MARKS = "<!-- flags: written by docs/flags.py -->\n", "<!-- end of flags -->\n"


def table() -> str:
    """A row for each flag, under its heading."""
    annotations, rows, heading = typing.get_type_hints(SampleConfig), ["| flag | |", "|---|---|"], ""
    for field in flag_fields(SampleConfig):
        if field.metadata["group"] != heading:
            heading = field.metadata["group"]
            rows.append(f"| **{heading}** | |")
        takes = options(annotations[field.name], field)
        value = "\\|".join(takes["choices"]) if "choices" in takes else takes.get("metavar") or ""
        rows.append(f"| `{flag(field.name)}{' ' + value if value else ''}` | {described(field).replace('%%', '%')} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the table is an old one")
    check = parser.parse_args().check
    text = README.read_text()
    pattern = re.compile(f"({re.escape(MARKS[0])}).*({re.escape(MARKS[1])})", re.DOTALL)
    new = pattern.sub(lambda match: match[1] + table() + match[2], text)
    if check and new != text:
        print("the README's table of flags is an old one; run python docs/flags.py", file=sys.stderr)
        return 1
    if not check:
        README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
