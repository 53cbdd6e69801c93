"""Drawings as inline SVG that takes the page's colours, with words for those who cannot see them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

Row = tuple[str, float, float, float]  # name, value, low, high

# Matplotlib wants colours; the page has variables that change with light and dark. Each stand-in
# occurs nowhere else, so that the finished SVG can be given the variable in its place.
INK, MUTED, GRID = "#010203", "#020304", "#030405"
SERIES = ("#0a0b0c", "#0b0c0d", "#0c0d0e", "#0d0e0f")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", **{c: f"--series-{n}" for n, c in enumerate(SERIES, 1)}}
MOST_POINTS = 300
MOST_TICKS = 6  # different values on an axis of parallel coordinates that are all named
# Inches at which 9 points read well in the page's columns: three, two, one of them.
NARROW, MIDDLE, WIDE = 3.9, 5.8, 11.0


@dataclass(frozen=True)
class Line:
    """Values over steps; ``low`` and ``high`` make a band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Drawing:
    title: str
    svg: Markup
    words: str  # what it shows, in a sentence


def curves(
    title: str, lines: Sequence[Line], *, unit: str, x_label: str = "step", level: float | None = None
) -> Drawing | None:
    """Lines over steps; None where there is nothing to draw.

    Args:
        unit: of the vertical axis.
        level: a dashed horizontal line to compare with.
    """
    lines = [line for line in lines if len(line.x)]
    if not any(len(line.x) > 1 for line in lines):
        return None
    with _axes(title) as (axes, finish):
        for colour, line in zip(SERIES, lines, strict=False):
            x, y = _thin(line.x), _thin(line.y)
            axes.plot(x, y, color=colour, linewidth=1.4, label=line.name, marker="o" if len(x) < 8 else None, ms=3)
            if line.low is not None and line.high is not None:
                axes.fill_between(x, _thin(line.low), _thin(line.high), color=colour, alpha=0.18, linewidth=0)
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel(x_label)
        axes.xaxis.get_major_locator().set_params(integer=x_label == "step")
        axes.set_ylabel(unit)
        if len(lines) > 1:
            _legend(axes)
        ends = "; ".join(f"{line.name} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines)
        return finish(f"{title} over {len(lines[0].x)} points: {ends}.")


def histogram(title: str, groups: dict[str, Any], *, unit: str, level: float | None = None) -> Drawing | None:
    """Overlaid histograms of ``groups`` on common bins; None where there is nothing to draw."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
    arrays = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    arrays = {name: values for name, values in arrays.items() if len(values)}
    if not arrays:
        return None
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins=30)
    with _axes(title) as (axes, finish):
        for colour, (name, values) in zip(SERIES, arrays.items(), strict=False):
            axes.hist(values, bins=edges, color=colour, alpha=0.5, label=name)
        if level is not None:
            axes.axvline(level, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel(unit)
        axes.set_ylabel("pairs")
        if len(arrays) > 1:
            _legend(axes)
        said = "; ".join(
            f"{name}: median {np.median(v):.4g}, middle half {np.quantile(v, 0.25):.4g} to {np.quantile(v, 0.75):.4g}"
            for name, v in arrays.items()
        )
        return finish(f"{title}, {said}.")


def intervals(
    title: str, rows: Sequence[Row], *, unit: str, level: float | None = None, width: float = NARROW
) -> Drawing | None:
    """A dot with its interval a row, the first on top; None where there is nothing to draw."""
    if not rows:
        return None
    with _axes(title, width, height=0.75 + 0.24 * len(rows)) as (axes, finish):
        places = np.arange(len(rows))[::-1]
        for place, (_, value, low, high) in zip(places, rows, strict=True):
            axes.plot([low, high], [place, place], color=SERIES[0], linewidth=2, alpha=0.5, solid_capstyle="round")
            axes.plot([value], [place], color=SERIES[0], marker="o", ms=4)
        if level is not None:
            axes.axvline(level, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_yticks(places, [name if len(name) <= 28 else f"{name[:27]}…" for name, *_ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(unit)
        said = "; ".join(f"{name} {value:.3f} ({low:.3f} to {high:.3f})" for name, value, low, high in rows)
        return finish(f"{title}: {said}.")


def overlay(title: str, lines: Sequence[Line], first: int, *, unit: str, level: float | None = None) -> Drawing | None:
    """Many lines over steps, one of them (``lines[first]``) in front; None where there is nothing to draw."""
    shown = [(n, line) for n, line in enumerate(lines) if len(line.x)]
    if not shown:
        return None
    with _axes(title, MIDDLE, 3.0) as (axes, finish):
        for n, line in shown:
            front = n == first
            colour, width, order = (SERIES[0], 1.8, 3) if front else (MUTED, 0.7, 2)
            axes.plot(
                _thin(line.x), _thin(line.y), color=colour, linewidth=width, alpha=1 if front else 0.5, zorder=order
            )
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(unit)
        ends = "; ".join(f"{line.name} ends at {line.y[-1]:.4g}" for _, line in shown[:8])
        return finish(f"{title} of {len(shown)} trials, the best in front: {ends}.")


def parallel(title: str, names: Sequence[str], rows: Sequence[Sequence[float | str]], first: int) -> Drawing | None:
    """One line a row across an axis a name, each axis over its own range; row ``first`` in front.

    Args:
        names: of the axes; text values stand in order of first appearance.
        rows: one value an axis.
    """
    if len(rows) < 2 or len(names) < 2:
        return None
    with _axes(title, WIDE, 4.2) as (axes, finish):
        columns = [_places([row[n] for row in rows]) for n in range(len(names))]
        for n in range(len(rows)):
            front = n == first
            colour, width = (SERIES[0], 2.0) if front else (MUTED, 0.8)
            heights = [column[0][n] for column in columns]
            axes.plot(
                range(len(names)), heights, color=colour, linewidth=width, alpha=1 if front else 0.55, zorder=2 + front
            )
        for n, (_, ticks) in enumerate(columns):
            for height, text in ticks:
                axes.annotate(text, (n, height), color=MUTED, ha="left", xytext=(4, 0), textcoords="offset points")
        axes.set_xticks(range(len(names)), [name if len(name) <= 22 else f"…{name[-21:]}" for name in names])
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(names) - 0.6)
        return finish(f"{title}: {len(rows)} trials across {', '.join(names)}.")


def _places(values: Sequence[float | str]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] and the labelled ticks of one axis; numbers over several powers of ten stand by logarithm."""
    if all(isinstance(value, int | float) for value in values):
        numbers = np.asarray(values, dtype=np.float64)
        low, high = float(numbers.min()), float(numbers.max())
        scaled = np.log(numbers) if low > 0 and high / low > 20 else numbers
        span = float(np.ptp(scaled)) or 1.0
        heights = [float(height) for height in (scaled - scaled.min()) / span]
        ticks = dict(zip(heights, numbers, strict=True))
        if len(ticks) > MOST_TICKS:
            ticks = {0.0: low, 1.0: high}
        return heights, [(height, f"{number:.3g}") for height, number in ticks.items()]
    kinds = list(dict.fromkeys(str(value) for value in values))
    steps = max(1, len(kinds) - 1)
    return [kinds.index(str(v)) / steps for v in values], [(n / steps, k[:18]) for n, k in enumerate(kinds)]


@contextmanager
def _axes(title: str, width: float = NARROW, height: float = 2.1) -> Iterator[Any]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # letters stay text: searchable, and in the page's font
        "svg.hashsalt": title,  # equal drawings give equal files
        "text.parse_math": False,  # a topic called $x$ is a name, not a formula
        "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "axes.titlecolor": INK,
        "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
        "grid.color": GRID, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.formatter.useoffset": False,
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
        "path.simplify": True,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")

        def finish(words: str) -> Drawing:
            file = io.StringIO()
            # savefig would draw twice, once to measure for a bounding box that is not asked for
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            FigureCanvasSVG(figure).print_svg(file, metadata=metadata)
            return Drawing(title, _page_svg(file.getvalue(), words), words)

        yield figure.add_subplot(), finish


def _page_svg(text: str, words: str) -> Markup:
    """The <svg> element alone, sized by the page, in the page's colours, with its description."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)  # the same names in every drawing of a page
    for stand_in, variable in _VARIABLES.items():
        body = body.replace(stand_in, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{escape(words)}">'
    # Matplotlib escapes every text it draws; Markup says so to the template.
    return Markup(opening + body[body.index(">") + 1 :])


def _legend(axes: Any) -> None:
    axes.legend(loc="best", fontsize=8, labelcolor=MUTED)


def _thin(values: Sequence[float]) -> np.ndarray:
    """At most MOST_POINTS values: means of neighbours, so that a spike moves its point and noise averages out."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= MOST_POINTS:
        return array
    return np.asarray([np.nanmean(part) for part in np.array_split(array, MOST_POINTS)])
