"""The list of errors in docs/troubleshooting.md, made from the source when the pages are built: every InputError.

python docs/errors.py        # prints it
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "<!-- errors: docs/errors.py -->"
ERRORS = ("InputError", "SettingError")
PLACES = {
    "wanjax/commands": "Commands and flags",
    "wanjax/cli.py": "Commands and flags",
    "wanjax/config": "Settings",
    "wanjax/settings.py": "Settings",
    "wanjax/weights": "Checkpoints and adapters",
    "wanjax/sampling": "Sampling",
    "wanjax/conditioning": "Sampling",
    "wanjax/diffusion": "Sampling",
    "wanjax/models": "Sampling",
    "wanjax/data": "Clips",
    "wanjax/selection": "Clips",
    "wanjax/training": "Training",
    "wanjax/runs": "Training",
    "wanjax/report": "Planning",
    "wanjax/serving": "Server and page",
    "wanjax/page": "Server and page",
    "sharding": "Devices and hosts",
    "wanjax/ops": "Devices and hosts",
}


def text(node: ast.expr) -> str | None:
    """A message with what is filled in as …; None for one that another function makes."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        return re.sub(r"…(\s*…)+", "…", "".join(parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text(node.left), text(node.right)
        return None if left is None or right is None else left + right
    return None


def messages(path: Path) -> Iterator[str]:
    """Those of a source file, in its order."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
            found = text(node.args[0])
            if found is not None and len(re.sub(r"[…\W]", "", found)) > 10:
                yield " ".join(found.split())


def place(path: Path) -> str:
    """The heading that a source file's errors stand under."""
    name = path.relative_to(ROOT).as_posix()
    return next((heading for start, heading in PLACES.items() if name.startswith(start)), "Files")


def listing() -> str:
    """All errors under their headings: what was given and is accepted; what to do."""
    found: dict[str, dict[str, None]] = {}
    for path in sorted([*(ROOT / "wanjax").rglob("*.py"), *(ROOT / "sharding").rglob("*.py")]):
        for message in messages(path):
            found.setdefault(place(path), {})[message] = None
    lines = []
    for heading in dict.fromkeys([*PLACES.values(), "Files"]):
        lines += ["", f"### {heading}", ""]
        lines += [f"- `{message.replace('`', chr(39))}`" for message in sorted(found.get(heading, {}))]
    return "\n".join(lines).strip() + "\n"


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs asks this of every page (mkdocs.yml, `hooks`)."""
    return markdown.replace(MARK, listing())


if __name__ == "__main__":
    print(listing(), end="")
