"""The page with goals and figures says of each row and each machine what was measured, and whether that was enough."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "figures.md"
ABSENT = "\N{EN DASH}"


def table() -> list[list[str]]:
    """The cells of each line of the page's table, without the one below the head."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [head, *body]


def problem_with(row: list[str], machines: int) -> str:
    """What a line of the table lacks; empty if nothing."""
    name, *rest = row
    if len(rest) != 1 + 2 * machines:
        return f"{1 + len(rest)} cells"
    if name.startswith("**"):
        return "figures beside the title of a group" if any(rest) else ""
    goal, *cells = rest
    if not goal:
        return "no goal"
    for figure, verdict in zip(cells[::2], cells[1::2], strict=True):
        if not figure or (figure == ABSENT) != (verdict == ABSENT):
            return f"{figure!r} is {verdict!r}"
        if figure != ABSENT:
            if not verdict.startswith(("yes", "no", "not for certain")):
                return f"{verdict!r} does not say whether the goal was reached"
            if ("; aim" in goal) != ("the aim" in verdict):
                return f"{verdict!r} for a goal of {goal!r}"
    return ""


def test_every_goal_has_a_verdict_for_each_machine() -> None:
    head, *body = table()
    machines = (len(head) - 2) // 2
    assert machines >= 2
    assert head[3::2] == ["reached"] * machines
    assert not {row[0]: problem for row in body if (problem := problem_with(row, machines))}


def test_what_is_missing_is_seen() -> None:
    assert not problem_with(["call", "\u2264 1; aim 0.5", "0.7", "yes; the aim: no", ABSENT, ABSENT], 2)
    for row in (
        ["call", "\u2264 1", "0.7", "yes"],
        ["call", "\u2264 1", "0.7", "yes", "", ""],
        ["call", "\u2264 1", "0.7", "yes", "0.8", ABSENT],
        ["call", "\u2264 1; aim 0.5", "0.7", "yes", ABSENT, ABSENT],
        ["call", "\u2264 1", "0.7", "perhaps", ABSENT, ABSENT],
        ["call", "", "0.7", "yes", "0.8", "yes"],
        ["**Calls**", "", "0.7", "", "", ""],
    ):
        assert problem_with(row, 2), row
