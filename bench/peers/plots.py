"""Bars as SVG, on a logarithmic scale, legible on a light and on a dark page."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH = 760
LABEL_WIDTH = 130
VALUE_WIDTH = 80
ROW = 17
HEAD = 34

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 }
.other { fill: #8c959f }
.ours { fill: #1a7f64 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .other { fill: #6e7681 }
  .ours { fill: #3fb68b }
}
"""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One value and what stands beside it."""

    label: str
    value: float
    text: str
    ours: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """Bars of one kind."""

    title: str
    bars: Sequence[Bar]


def _width(value: float, values: Sequence[float]) -> float:
    """Return the length of a bar: a tenth of the room for the power of ten below all, and all of it for the largest."""
    floor = math.floor(math.log10(min(values)) - 1e-9)
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    return room * (math.log10(value) - floor) / (math.log10(max(values)) - floor)


def _panel(panel: Panel, top: int) -> list[str]:
    values = [bar.value for bar in panel.bars]
    lines = [f'<text class="title" x="0" y="{top + 20}">{html.escape(panel.title)}</text>']
    for index, bar in enumerate(panel.bars):
        y = top + HEAD + index * ROW
        width = _width(bar.value, values)
        kind = "ours" if bar.ours else "other"
        lines += [
            f'<text x="{LABEL_WIDTH - 6}" y="{y + 10}" text-anchor="end">{html.escape(bar.label)}</text>',
            f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{width:.0f}" height="{ROW - 5}"/>',
            f'<text x="{LABEL_WIDTH + width + 5:.0f}" y="{y + 10}">{html.escape(bar.text)}</text>',
        ]
    return lines


def plot(panels: Sequence[Panel]) -> str:
    """Return the panels, one below the other."""
    lines, top = [], 0
    for panel in panels:
        lines += _panel(panel, top)
        top += HEAD + len(panel.bars) * ROW + 8
    lines.append(f'<text x="{LABEL_WIDTH}" y="{top + 12}">The scale is logarithmic.</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 20}" width="{WIDTH}" role="img">'
    return "\n".join(
        [head, "<title>zmqcore beside others</title>", f"<style>{STYLE}</style>", *lines, "</svg>", ""]
    )
