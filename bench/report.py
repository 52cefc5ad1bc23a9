"""What a run of the regression suite has found, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from baseline import Row

UNITS = (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 1.0))


def figure(row: Row, value: float) -> str:
    """Return a time with its unit, or a count, in three or more digits."""
    if row.kind == "instructions":
        return f"{value:,.0f}"
    unit, factor = next((pair for pair in UNITS if value >= pair[1]), UNITS[-1])
    return f"{value / factor:.3g} {unit}" if value / factor < 1000 else f"{value / factor:.0f} {unit}"


def title(row: Row) -> str:
    """Return the name without what all of them have."""
    return row.name.removeprefix("test_").replace(".py::test_", ": ").replace("_", " ")


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table, aligned so that it can be read as it stands."""
    cells = [["benchmark", "kind", "now", "baseline", "ratio", "limit", ""]]
    for row in rows:
        cells.append(
            [
                title(row),
                row.kind,
                figure(row, row.now),
                "" if row.before is None else figure(row, row.before),
                "" if row.ratio is None else f"{row.ratio:.2f}",
                f"{row.limit:.2f}",
                {"same": "", "slower": "SLOWER"}.get(row.verdict, row.verdict),
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [_line(line, widths) for line in cells]
    rule = (
        "|"
        + "|".join("-" * (width + 1) + (":" if 2 <= n <= 5 else "-") for n, width in enumerate(widths))
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _line(cells: list[str], widths: list[int]) -> str:
    padded = (
        cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join(padded) + " |"


# -- the picture -----------------------------------------------------------------------------------------------

LEFT, WIDTH, RIGHT = 330, 520, 130
LINE = 17
TOP = 64

# Two shades of each: a page that is dark shows the second.
STYLE = """
svg { --ink: #1f2328; --faint: #d1d9e0; --dot: #2f6fdb; --bad: #c4231c; --good: #1a7f37 }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --faint: #3d444d; --dot: #6ea8fe; --bad: #ff7b72; --good: #56d364 }
}
text { fill: var(--ink); font: 12px system-ui, sans-serif }
.head { font-weight: 600 }
.faint { stroke: var(--faint) }
.before { stroke: var(--ink); stroke-width: 2 }
.same, .new { fill: var(--dot) }
.slower { fill: var(--bad) }
.faster { fill: var(--good) }
"""


def picture(rows: list[Row], heading: str) -> str:
    """Return an SVG: each row a dot on a logarithmic axis, and a tick where the baseline has it.

    Legible on a light and on a dark page. Times and instructions have an axis each.
    """
    parts, y = [], TOP
    for kinds, label in (
        (("process", "system"), "time of the fastest round"),
        (("instructions",), "instructions"),
    ):
        some = [row for row in rows if row.kind in kinds]
        if some:
            drawn, y = _chart(some, label, y)
            parts.append(drawn)
    width = LEFT + WIDTH + RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" role="img">\n'
        f"<title>{escape(heading)}</title>\n<style>{STYLE}</style>\n"
        f'<text class="head" x="10" y="22">{escape(heading)}</text>\n'
        '<text x="10" y="40">dot: now; tick: baseline; red: slower than the limit, green: faster by as much</text>\n'
        + "".join(parts)
        + "</svg>\n"
    )


def _chart(rows: list[Row], label: str, top: int) -> tuple[str, int]:
    """Return the drawing of ``rows`` below ``top``, and where it ends."""
    values = [value for row in rows for value in (row.now, row.before) if value]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(value: float) -> float:
        return LEFT + WIDTH * (math.log10(value) - low) / (high - low)

    bottom = top + 24 + LINE * len(rows)
    parts = [f'<text class="head" x="10" y="{top + 12}">{escape(label)}</text>']
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<line class="faint" x1="{at:.1f}" x2="{at:.1f}" y1="{top + 18}" y2="{bottom}"/>')
        text = escape(figure(rows[0], 10.0**power))
        parts.append(f'<text x="{at:.1f}" y="{top + 12}" text-anchor="middle">{text}</text>')
    for number, row in enumerate(rows):
        parts.append(
            _mark(row, top + 34 + LINE * number, x(row.now), None if row.before is None else x(row.before))
        )
    return "\n".join(parts) + "\n", bottom + 30


def _mark(row: Row, y: float, now: float, before: float | None) -> str:
    """Return one row of the drawing; ``now`` and ``before`` are positions."""
    ratio = "" if row.ratio is None else f", {row.ratio:.2f}"
    tick = (
        ""
        if before is None
        else f'<line class="before" x1="{before:.1f}" x2="{before:.1f}" y1="{y - 6}" y2="{y + 6}"/>'
    )
    return (
        f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(title(row))}</text>{tick}'
        f'<circle class="{row.verdict}" cx="{now:.1f}" cy="{y}" r="4.5"/>'
        f'<text x="{LEFT + WIDTH + 10}" y="{y + 4}">{escape(figure(row, row.now) + ratio)}</text>'
    )
