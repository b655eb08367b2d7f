"""One HTML file of one or several runs: curves (Plotly), samples, settings; all of it inside, and no network needed.

write_page([read_run(Path("out/train"), "train")], Path("out/train/run.html"))
"""

from __future__ import annotations

import base64
import datetime
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wanjax.config import TrainConfig
from wanjax.errors import InputError
from wanjax.files import replacing
from wanjax.runs.read import Curve, Run
from wanjax.training.provenance import plain

COLOURS = ("#4338ca", "#c2410c", "#15803d", "#be185d", "#0e7490", "#a16207", "#6d28d9", "#475569")
CHARTS: tuple[tuple[str, str, bool], ...] = (
    ("Loss", r"loss student_loss critic_loss", True),
    ("Held-out loss", "validation/loss", False),
    ("Learning rate", "learning_rate student_learning_rate critic_learning_rate", False),
    ("Gradient norm", "grad_norm student_grad_norm critic_grad_norm", True),
    ("Seconds a step", "seconds", True),
    ("Waiting for data", "data_wait", True),
    ("Utilisation", "utilisation", True),
    ("PSNR of samples, dB", "samples/between_psnr samples/end_frame_psnr", False),
)
"""Title, figures of it, and whether they are noisy: a mean over neighbours is drawn over the points."""
MOST_POINTS, SMOOTH = 1500, 60
"""Of a curve; and how many means a smooth one has."""


def write_page(runs: Sequence[Run], path: Path, most_mb: float = 100.0) -> None:
    """Write the page; samples are in it, the newest first, up to so many MB.

    Raises:
      InputError: Jinja or Plotly is missing, or the place cannot be written to.
    """
    try:
        import jinja2
        import plotly.graph_objects as plotly
    except ImportError as error:
        raise InputError(f'{error.name} is missing, which draws the page; pip install "wanjax[runs]"') from error

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    charts = [chart for chart in (_chart(plotly, runs, *wanted) for wanted in CHARTS) if chart]
    text = page.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        library=plotly_library() if charts else "",
        charts=charts,
        runs=[_summary(run, colour) for run, colour in zip(runs, _colours(runs), strict=True)],
        samples=_samples(runs, most_mb * 1e6),
        settings=_settings(runs),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    try:
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path} cannot be written ({error.strerror}); give another place") from error


def plotly_library() -> str:
    """Plotly's JavaScript, which goes into the page once."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


# ------------------------------------------------------------------------------------------------------------- curves


def _chart(plotly: Any, runs: Sequence[Run], title: str, names: str, is_noisy: bool) -> dict[str, str] | None:
    """A chart's HTML, or None where no run has such figures."""
    figure = plotly.Figure()
    several, wanted = len(runs) > 1, [name for name in names.split() if any(name in run.curves for run in runs)]
    for run, colour in zip(runs, _colours(runs), strict=True):
        for number, name in enumerate(name for name in wanted if name in run.curves):
            steps, values = thinned(run.curves[name], MOST_POINTS)
            dash = ("solid", "dash", "dot")[number % 3]
            own = name.rpartition("/")[2] if len(wanted) > 1 or not several else ""
            label = html.escape(f"{run.name if several else ''} {own}".strip())
            shown = {"name": label, "legendgroup": label, "line": {"color": colour, "dash": dash, "width": 2}}
            if is_noisy and len(steps) > 2 * SMOOTH:
                faint = shown | {"line": {"color": colour, "width": 1}, "opacity": 0.25, "showlegend": False}
                figure.add_scatter(x=steps, y=values, mode="lines", hoverinfo="skip", **faint)
                steps, values = thinned(run.curves[name], SMOOTH)
            figure.add_scatter(x=steps, y=values, mode="lines+markers" if len(steps) < 30 else "lines", **shown)
    if not figure.data:
        return None
    lines = len({trace.legendgroup for trace in figure.data})
    figure.update_layout(
        template="plotly_white",
        height=270,
        margin={"l": 54, "r": 12, "t": (8, 30, 70)[min(lines // 2, 2)], "b": 36},
        showlegend=lines > 1,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        hovermode="x unified",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#64748b"},
    )
    figure.update_xaxes(title="step", gridcolor="rgba(100,116,139,.18)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(100,116,139,.18)", zeroline=False, exponentformat="e")
    options = {"displayModeBar": False, "responsive": True}
    return {"title": title, "html": figure.to_html(full_html=False, include_plotlyjs=False, config=options)}


def thinned(curve: Curve, most: int) -> Curve:
    """A curve of at most so many points: means over neighbours, the same number of them everywhere but at the end."""
    steps, values = curve
    size = -(-len(steps) // most)
    starts = range(0, len(steps), size or 1)
    ends = [min(start + size, len(steps)) for start in starts]
    means = [float(np.mean(values[start:end])) for start, end in zip(starts, ends, strict=True)]
    return [steps[end - 1] for end in ends], means


# --------------------------------------------------------------------------------------------------- samples, settings


def _summary(run: Run, colour: str) -> dict[str, Any]:
    steps = run.config.get("steps")
    last = {name: values[-1] for name, (_, values) in run.curves.items() if values}
    seconds = run.curves.get("seconds", ([], []))[1]
    figures = [("step", f"{run.step:,}" + (f" of {steps:,}" if isinstance(steps, int) else ""))]
    loss = run.curves.get("loss", ([], []))[1][-50:]
    figures += [("loss, mean of 50 steps", f"{np.mean(loss):.4g}")] if loss else []
    for name, label in (("validation/loss", "held-out loss"), ("samples/between_psnr", "PSNR of samples, dB")):
        figures += [(label, f"{last[name]:.4g}")] if name in last else []
    if seconds:
        figures += [
            ("seconds a step", f"{np.median(seconds):.3g}"),
            ("hours of steps", f"{np.sum(seconds) / 3600:.3g}"),
        ]
    saved = ", ".join(map(str, run.checkpoints)) or "none"
    return {"name": run.name, "folder": run.folder, "colour": colour, "figures": figures, "checkpoints": saved,
            "starts": run.starts}  # fmt: skip


def _samples(runs: Sequence[Run], most: float) -> list[dict[str, Any]]:
    """By run and by what is sampled: videos by step, in the page as far as there is room, the newest first."""
    every = sorted(
        ((step, path) for run in runs for of in run.samples.values() for step, path in of), key=lambda x: -x[0]
    )
    inside: dict[Path, str] = {}
    for _, path in every:
        data = path.read_bytes() if path.stat().st_size <= most else b""
        most -= len(data)
        if data:
            inside[path] = "data:video/mp4;base64," + base64.b64encode(data).decode()
    return [
        {"run": run.name if len(runs) > 1 else "", "of": of,
         "videos": [{"step": step, "data": inside.get(path), "name": path.name} for step, path in videos]}
        for run in runs for of, videos in run.samples.items()
    ]  # fmt: skip


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each setting that is not at its default, or that the runs do not share."""
    usual, rows = plain(TrainConfig()), []
    names = list(dict.fromkeys(name for run in runs for name in run.config if name != "type"))
    for name in names:
        values = [run.config.get(name) for run in runs]
        differs = any(value != values[0] for value in values)
        if differs or values[0] != usual.get(name):
            rows.append({"name": name, "values": [_said(value) for value in values], "differs": differs})
    return sorted(rows, key=lambda row: not row["differs"])


def _said(value: Any) -> str:
    """A setting in Python's words, without fields that are none or empty."""
    if isinstance(value, dict):
        fields = (f"{k}={_said(x)}" for k, x in value.items() if k != "type" and x not in (None, [], {}))
        return f"{value.get('type', '')}({', '.join(fields)})"
    return f"({', '.join(map(_said, value))})" if isinstance(value, list) else str(value)
