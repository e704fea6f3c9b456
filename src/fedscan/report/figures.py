"""Plain numbers to charts: SVG that stands inside the page, in the page's own type and colours."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, NamedTuple

from markupsafe import Markup, escape

# Colours that stand for the page's CSS variables, so that a chart follows light, dark and print.
INK, MUTED, LINE, PAPER = "#101011", "#606061", "#d0d0d1", "#fefefd"
GOOD, BAD, POOLED = "#0072b1", "#d55e01", "#009e72"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", GOOD: "good", BAD: "bad", POOLED: "pooled"}
_VERDICT = {"helped": GOOD, "harmed": BAD}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a hospital may have a dollar sign in its name
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}


class Arrow(NamedTuple):
    """A hospital's mean score alone and federated, with pooled data where known, and what that means for it."""

    name: str
    alone: float | None
    federated: float | None
    pooled: float | None
    verdict: str
    text: str  # the gain, written out


class Curve(NamedTuple):
    """A score by round, and the rounds in which the hospital was absent or refused."""

    name: str
    rounds: Sequence[int]
    values: Sequence[float]
    absent: Sequence[int] = ()
    refused: Sequence[int] = ()


class Dot(NamedTuple):
    """A mean with its confidence interval, where there is one."""

    name: str
    mean: float
    low: float | None
    high: float | None
    points: Sequence[float] = ()  # e.g. the mean of each hospital


def _short(name: str, most: int = 40) -> str:
    """A name that leaves room for the chart; the tables have it whole."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches in the page's style. Missing glyphs are no fault: the browser draws the text."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _svg(figure: Any, title: str) -> Markup:
    """A figure as an inline SVG that takes the page's colours, named ``title`` for those who cannot see it."""
    import matplotlib as mpl

    for axes in figure.axes:
        axes.set_facecolor("none")
    stream = StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure.savefig(stream, format="svg")
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the names repeat from chart to chart
    box = re.search(r'viewBox="([^"]*)"', svg)
    size = box.group(1) if box else "0 0 720 360"
    head = f'<svg class="chart" viewBox="{size}" role="img" aria-label="{escape(title)}">'
    svg = head + svg[svg.index(">") + 1 :]
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)


def arrows(rows: Sequence[Arrow], title: str, xlabel: str) -> Markup:
    """One line per hospital: an arrow from its score alone to its score in the federation; a tick for pooled data."""
    with _figure(10, 0.75 + 0.46 * len(rows)) as figure:
        figure.get_layout_engine().set(rect=(0, 0, 0.78, 1))  # the gains stand at the right
        axes = figure.subplots()
        for y, row in enumerate(rows):
            colour = _VERDICT.get(row.verdict, MUTED)
            if row.alone is not None and row.federated is not None:
                axes.plot([row.alone, row.federated], [y, y], color=colour, lw=3, solid_capstyle="butt", zorder=1)
            if row.alone is not None:
                axes.plot(row.alone, y, "o", ms=9, mfc=PAPER, mec=colour, mew=2)
            if row.federated is not None:
                side = ">" if row.alone is None or row.federated >= row.alone else "<"
                axes.plot(row.federated, y, side, ms=11, color=colour)
            if row.pooled is not None:
                axes.plot(row.pooled, y, "|", ms=15, mew=2.4, color=POOLED)
            place = {"transform": axes.get_yaxis_transform(), "va": "center", "in_layout": False}
            axes.text(1.03, y, row.text, color=colour, weight="bold", **place)
        axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows], color=INK)
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(xlabel)
        return _svg(figure, title)


def curves(overall: Curve, sites: Sequence[Curve], ylabel: str, title: str) -> Markup:
    """A large panel for the mean of the hospitals with their range; a small one per hospital with its missed rounds."""
    columns = min(max(len(sites), 1), 5)
    rows = -(-len(sites) // columns)
    low = min((v for c in sites for v in c.values), default=0.0)
    high = max((v for c in sites for v in c.values), default=1.0)
    pad = 0.08 * max(high - low, 0.05)
    height = 3.3 + 1.8 * rows  # inches: the large panel with its margins, and 1.8 for every row of small ones
    with _figure(10, height) as figure:
        figure.set_layout_engine("none")
        edges = {"left": 0.055, "right": 0.995, "wspace": 0.1}
        top = figure.add_subplot(figure.add_gridspec(1, 1, bottom=1 - 2.75 / height, top=1 - 0.3 / height, **edges)[0])
        grid = figure.add_gridspec(rows, columns, bottom=0.5 / height, top=1 - 3.4 / height, hspace=0.5, **edges)
        _band(top, sites)
        top.plot(overall.rounds, overall.values, color=INK, lw=2.4, marker="o", ms=4)
        top.set_title(overall.name, loc="left", weight="bold")
        top.set_ylabel(ylabel)
        panels = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(len(sites))]
        for axes, site in zip(panels, sites, strict=True):
            axes.plot(overall.rounds, overall.values, color=LINE, lw=1.4)
            axes.plot(site.rounds, site.values, color=GOOD, lw=2, marker="o", ms=2.5)
            axes.set_title(_short(site.name, 24), loc="left", color=INK)
            base = low - pad
            axes.plot(site.absent, [base] * len(site.absent), "o", ms=6, mfc=PAPER, mec=INK, mew=1.3, clip_on=False)
            axes.plot(site.refused, [base] * len(site.refused), "X", ms=7, color=BAD, mew=0, clip_on=False)
        for axes in (top, *panels):
            axes.set_ylim(low - 2 * pad, high + pad)
            axes.set_xlim(min(overall.rounds) - 0.5, max(overall.rounds) + 0.5)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(axis="y")
            axes.tick_params(length=0)
        for i, axes in enumerate(panels):
            axes.tick_params(labelleft=i % columns == 0)
            axes.set_xlabel("round" if i + columns >= len(panels) else "")
        return _svg(figure, title)


def _band(axes: Any, sites: Sequence[Curve]) -> None:
    """Shades from the worst to the best hospital of each round."""
    by_round: dict[int, list[float]] = {}
    for site in sites:
        for r, value in zip(site.rounds, site.values, strict=True):
            by_round.setdefault(r, []).append(value)
    at = sorted(by_round)
    axes.fill_between(
        at, [min(by_round[r]) for r in at], [max(by_round[r]) for r in at], color=GOOD, alpha=0.13, linewidth=0
    )


def forest(dots: Sequence[Dot], title: str, xlabel: str) -> Markup:
    """One line per method: the mean with its confidence interval, and a small ring per hospital."""
    with _figure(10, 0.75 + 0.5 * len(dots)) as figure:
        axes = figure.subplots()
        for y, dot in enumerate(dots):
            axes.plot(dot.points, [y] * len(dot.points), "o", ms=5, mfc="none", mec=MUTED, mew=1, alpha=0.7)
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [y, y], color=GOOD, lw=3, alpha=0.55, solid_capstyle="butt")
            axes.plot(dot.mean, y, "D", ms=8, color=GOOD)
        axes.axvline(dots[0].mean, color=LINE, lw=1.2, zorder=0)
        axes.set_yticks(range(len(dots)), [_short(dot.name) for dot in dots], color=INK)
        axes.set_ylim(len(dots) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(xlabel)
        return _svg(figure, title)
