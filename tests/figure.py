"""Line charts with bands as plain SVG, for figure_search.py and figure_learning.py. Nothing here knows what they show.

A figure is a card that brings its own background: dark on light, or light on dark where the reader's system prefers it.
Curves differ in colour, in dashes and in the label at their end, so that they can be told apart in grey.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

# A panel in pixels, axes and labels included.
WIDTH = 400
HEIGHT = 300
# The edges of its plot. At its right stand the labels of the curves.
LEFT = 44
RIGHT = 288
TOP = 40
BOTTOM = 260
TICKS = 5
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a05a9c")  # of a palette for the colour-blind
DASHES = ("", "7 3", "2 3", "9 3 2 3")
STYLE = """.card{fill:#fff}.ink{fill:#222}.frame{stroke:#888;fill:none}.grid{stroke:#8884}
text{font:13px sans-serif}.title{font-weight:bold}
.curve{fill:none;stroke-width:2.5}.band{opacity:.18}
@media(prefers-color-scheme:dark){.card{fill:#16191d}.ink{fill:#e8e8e8}
.curve,.band,.name{filter:brightness(1.5)}}"""


@dataclass
class Point:
    """Where a curve passes, and its standard error."""

    x: float
    mean: float
    error: float = 0.0


@dataclass
class Curve:
    """Drawn in the `look`-th colour and dashes."""

    label: str
    points: list[Point]
    look: int


@dataclass
class Panel:
    """One plot. Its x axis begins at 0, its y axis goes from `low` to `high`."""

    title: str
    x_label: str
    curves: list[Curve]
    low: float = 0.0
    high: float = 1.0
    steps: int = 5  # between the marks of the x axis

    def last(self) -> float:
        """The end of the x axis."""
        return max(point.x for curve in self.curves for point in curve.points)

    def x(self, value: float) -> float:
        """From the axis to pixels."""
        return LEFT + (RIGHT - LEFT) * value / self.last()

    def y(self, value: float) -> float:
        """The same; what is beyond an end of the axis is drawn at it."""
        share = (value - self.low) / (self.high - self.low)
        share = min(1.0, max(0.0, share))
        return BOTTOM - (BOTTOM - TOP) * share


FIGURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"
height="{height}" role="img"><title>{title}</title><style>{style}</style>
<rect class="card" width="{width}" height="{height}" rx="8"/>
{body}</svg>
"""
TEXT = '<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
LABEL = '<text class="name" fill="{colour}" x="{x}" y="{y:.1f}">{words}</text>'
BAND = '<path class="band" fill="{colour}" d="M{around}Z"/>'
LINE = '<path class="curve" stroke="{colour}" stroke-dasharray="{dashes}" d="M{line}"/>'


def save_figure(path: Path, title: str, panels: list[Panel]) -> None:
    """Panels side by side under a title."""
    body = text_svg(LEFT, 24, title, kind="ink title")
    for place, panel in enumerate(panels):
        shift = place * WIDTH
        body += f'<g transform="translate({shift} 30)">{panel_svg(panel)}</g>\n'
    size = {"width": WIDTH * len(panels), "height": HEIGHT + 30}
    page = FIGURE.format(title=html.escape(title), style=STYLE, body=body, **size)
    path.write_text(page, encoding="utf-8")


def text_svg(x: float, y: float, words: str, anchor: str = "start", kind: str = "ink") -> str:
    """A line of text that begins, ends or is centred at x."""
    return TEXT.format(x=x, y=y, words=html.escape(words), anchor=anchor, kind=kind)


def panel_svg(panel: Panel) -> str:
    """Axes, bands, curves, and a label at the end of each curve."""
    out = text_svg(LEFT, TOP - 14, panel.title)
    for i in range(TICKS + 1):
        value = panel.low + (panel.high - panel.low) * i / TICKS
        y = panel.y(value)
        out += f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        out += text_svg(LEFT - 6, y + 4, f"{value:.2f}", "end")
    for i in range(panel.steps + 1):
        value = panel.last() * i / panel.steps
        out += text_svg(panel.x(value), BOTTOM + 17, f"{value:g}", "middle")
    out += text_svg((LEFT + RIGHT) / 2, BOTTOM + 34, panel.x_label, "middle")
    out += f'<path class="frame" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>'
    for curve in panel.curves:
        out += curve_svg(panel, curve)
    return out + labels_svg(panel)


def curve_svg(panel: Panel, curve: Curve) -> str:
    """The band of one standard error, and the mean on it."""
    upper: list[str] = []
    lower: list[str] = []
    line: list[str] = []
    for point in curve.points:
        x = panel.x(point.x)
        upper.append(f"{x:.1f} {panel.y(point.mean + point.error):.1f}")
        lower.append(f"{x:.1f} {panel.y(point.mean - point.error):.1f}")
        line.append(f"{x:.1f} {panel.y(point.mean):.1f}")
    lower.reverse()
    colour = COLOURS[curve.look]
    band = BAND.format(colour=colour, around="L".join(upper + lower))
    return band + LINE.format(colour=colour, dashes=DASHES[curve.look], line="L".join(line))


def labels_svg(panel: Panel) -> str:
    """The labels at the right, at the height of their curves' ends, moved apart where they would touch."""

    def height(curve: Curve) -> float:
        return panel.y(curve.points[-1].mean) + 4

    at = -100.0
    out = ""
    for curve in sorted(panel.curves, key=height):
        at = max(height(curve), at + 15)
        words = html.escape(curve.label)
        out += LABEL.format(colour=COLOURS[curve.look], x=RIGHT + 6, y=at, words=words)
    return out
