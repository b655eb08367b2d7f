"""Draws how work is shared, as SVG: mesh.svg, ulysses.svg, ring.svg.

python docs/pictures/drawings.py
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
COLOURS = ("#3f51b5", "#26a69a", "#ef6c00", "#8e24aa")
INK = "#757575"  # read on white and on black


def box(x: float, y: float, w: float, h: float, colour: str, text: str = "", opacity: float = 0.85) -> str:
    """A rectangle with a word in it."""
    shape = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{colour}" fill-opacity="{opacity}"/>'
    return shape + (label(x + w / 2, y + h / 2 + 4, text, "#ffffff") if text else "")


def label(x: float, y: float, text: str, colour: str = INK, size: int = 13, anchor: str = "middle") -> str:
    """Words."""
    font = f'font-family="sans-serif" font-size="{size}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {font} fill="{colour}">{text}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def write(name: str, width: int, height: int, *parts: str) -> None:
    """A file."""
    head = '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    head = f'<defs>{head}<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    (FOLDER / name).write_text("\n".join([start, head, *parts, "</svg>"]) + "\n")


def mesh() -> None:
    """data=2,ulysses=4: two branches of guidance, the tokens of each over four devices."""
    parts = [label(330, 20, "data=2, ulysses=4: eight devices", size=15)]
    for row, branch in enumerate(("with the prompt", "without it")):
        y = 40 + 100 * row
        parts.append(label(118, y + 38, branch, anchor="end"))
        for i in range(4):
            parts.append(box(130 + 125 * i, y, 115, 64, COLOURS[row], f"tokens {i + 1} of 4"))
            parts.append(label(187 + 125 * i, y + 80, f"weights, part {i + 1} of 4", size=11))
    parts.append(label(330, 246, "tokens meet in attention; the branches only at the end of a step", size=12))
    write("mesh.svg", 660, 260, *parts)


def ulysses() -> None:
    """Rows are devices, columns heads; before and in attention."""
    parts = [label(140, 20, "its tokens, all heads"), label(520, 20, "all tokens, its heads")]
    for device in range(4):
        y = 34 + 44 * device
        parts.append(label(24, y + 23, f"{device + 1}"))
        for head in range(4):
            parts.append(box(40 + 50 * head, y, 46, 34, COLOURS[device], f"h{head + 1}"))
            parts.append(box(420 + 50 * head, y, 46, 34, COLOURS[head], f"h{device + 1}"))
    parts += [arrow(258, 90, 402, 90), label(330, 80, "all-to-all"), arrow(402, 140, 258, 140)]
    parts += [label(330, 160, "and back, behind it"), label(330, 232, "colour: whose tokens", size=12)]
    write("ulysses.svg", 660, 244, *parts)


def ring() -> None:
    """Four devices; keys and values move on by one."""
    parts = [label(330, 20, "at each hop: attend to what is there, pass it on")]
    for device in range(4):
        x = 40 + 155 * device
        parts.append(box(x, 40, 115, 40, COLOURS[device], f"queries {device + 1}"))
        parts.append(box(x, 100, 115, 40, COLOURS[device], f"keys {device + 1}", 0.6))
        if device < 3:
            parts.append(arrow(x + 115, 120, x + 153, 120))
    parts.append(f'<path d="M620,140 C640,190 20,190 90,144" fill="none" stroke="{INK}" marker-end="url(#head)"/>')
    parts.append(label(330, 206, "after three hops every query has seen every key"))
    write("ring.svg", 660, 220, *parts)


if __name__ == "__main__":
    mesh()
    ulysses()
    ring()
