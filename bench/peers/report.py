"""What a run of ``against.py`` has measured, as tables and plots: on the terminal, in README.md and in docs/.

In a document the generated part stands between two comments, ``<!-- peers: begin -->`` and ``<!-- peers: end -->``; all
else is left as it is.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peers.plots import Bar, Panel, plot

OURS = "zmqcore"
README_PEERS = ("zmqcore", "c", "pyzmq", "zeroapi", "rpyc", "pyro5", "grpc", "nats", "zerorpc", "oslo")
DISTURBED_CPUS = 0.2
"""CPUs that others may keep busy during a measurement that counts as undisturbed."""
FEWEST_QUIET = 3
"""With so many rounds of a measurement undisturbed, only these count."""
ABOUT_THE_SAME = 1.05
"""A figure that is better than ours by less than this factor is not called better."""


def is_disturbed(sample: dict[str, Any]) -> bool:
    """Say whether something else used the CPUs meanwhile."""
    others: float = sample.get("others", 0.0)
    return others > DISTURBED_CPUS


class Figures:
    """The figures of a run: medians over its rounds."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.tasks: dict[str, str] = raw["tasks"]
        self.peers: dict[str, dict[str, Any]] = raw["peers"]
        self._samples = {
            (entry["task"], entry["peer"]): [sample for sample in entry["rounds"] if sample is not None]
            for entry in raw["samples"]
        }

    def value(self, task: str, peer: str, metric: str) -> float | None:
        """Return the median of one metric; None where it was not measured.

        Where enough rounds were undisturbed, only these count.
        """
        samples = self._samples.get((task, peer), [])
        quiet = [sample for sample in samples if not is_disturbed(sample)]
        if len(quiet) >= FEWEST_QUIET:
            samples = quiet
        values = [sample[metric] for sample in samples if sample.get(metric) is not None]
        return statistics.median(values) if values else None

    def title(self, peer: str) -> str:
        title: str = self.peers[peer]["title"]
        return title

    def disturbed(self) -> tuple[int, int]:
        """Return how many measurements others have disturbed, and how many there are."""
        samples = [sample for samples in self._samples.values() for sample in samples]
        return sum(map(is_disturbed, samples)), len(samples)


# -- tables ----------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return a value with two or three significant digits; a rate is no more certain than that."""
    if value >= 1000:
        digits = 3 - len(str(int(value)))
        return f"{round(value, digits):,.0f}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: a metric of a task, or two with a slash between. ``least``: the smallest is the best."""

    title: str
    task: str
    metrics: tuple[str, ...]
    least: bool = False

    def cell(self, figures: Figures, peer: str) -> str:
        values = [figures.value(self.task, peer, metric) for metric in self.metrics]
        known = [number(value) for value in values if value is not None]
        return " / ".join(known) or "-"


def rate(title: str, task: str) -> Column:
    return Column(title, task, ("rate",))


def latency(title: str, task: str) -> Column:
    return Column(title, task, ("p50_us", "p99_us"), least=True)


MEMORY = ("client_rss_mib", "server_rss_mib", "broker_rss_mib")
DESCRIPTORS = ("client_fds", "server_fds", "broker_fds")
WHERE_MEMORY_IS_COMPARED = {"client": ("call", "kept"), "server": ("call",)}
"""Client and server with one connection, and a client with 500."""

SUMMARY = (
    Column("sequential call, p50 µs", "call", ("p50_us",), least=True),
    rate("100 in flight, calls/s", "inflight"),
    rate("one way, msg/s", "cast"),
    rate("fanout to 8, deliveries/s", "fanout"),
    rate("1 MiB each way, calls/s", "call-1m"),
)

SECTIONS: tuple[tuple[str, tuple[Column, ...]], ...] = (
    (
        "Sequential calls: p50 / p99 in µs",
        (
            latency("16 B", "call"),
            latency("1 KiB", "call-1k"),
            latency("64 KiB", "call-64k"),
            latency("1 MiB", "call-1m"),
        ),
    ),
    (
        "Per second",
        (
            rate("100 calls in flight, 16 B", "inflight"),
            Column("one way, 16 B: handled / handed over", "cast", ("rate", "send_rate")),
            Column("one way, 1 KiB: the same", "cast-1k", ("rate", "send_rate")),
            rate("fanout to 8 processes, deliveries", "fanout"),
        ),
    ),
    (
        "500 endpoints in turn",
        (
            rate("connections kept, calls/s", "kept"),
            latency("p50 / p99 µs", "kept"),
            Column("500 connected and called, s", "kept", ("before_seconds",), least=True),
            Column("descriptors of the client", "kept", ("client_fds",), least=True),
            rate("a connection for each call, calls/s", "new"),
            latency("p50 / p99 µs", "new"),
        ),
    ),
    (
        "What it costs: CPU µs for each, client and servers and broker together; resident memory in MiB; descriptors",
        (
            Column("sequential call", "call", ("cpu_us",), least=True),
            Column("in flight", "inflight", ("cpu_us",), least=True),
            Column("one way", "cast", ("cpu_us",), least=True),
            Column("1 MiB each way", "call-1m", ("cpu_us",), least=True),
            Column("memory: client / server / broker", "call", MEMORY, least=True),
            Column("descriptors: the same", "call", DESCRIPTORS, least=True),
            Column("client with 500 endpoints", "kept", ("client_rss_mib",), least=True),
        ),
    ),
)


def rows(figures: Figures, columns: Sequence[Column], peers: Iterable[str]) -> list[list[str]]:
    """Return a row for each peer that has at least one figure in ``columns``."""
    found = [[figures.title(peer), *(column.cell(figures, peer) for column in columns)] for peer in peers]
    return [row for row in found if any(cell != "-" for cell in row[1:])]


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns, but the first, are aligned to the right; our rows are bold."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in body:
        cells = [f"**{cell}**" for cell in row] if row[0] == OURS else row
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(figures: Figures, columns: Sequence[Column], peers: Iterable[str] | None = None) -> str:
    """Return the Markdown table of some columns; empty if nothing of it was measured."""
    body = rows(figures, columns, figures.peers if peers is None else peers)
    return markdown(["", *(column.title for column in columns)], body) if body else ""


# -- words -----------------------------------------------------------------------------------------------


def wrapped(text: str) -> str:
    """Return a paragraph or an item of a list in lines as long as those of the documents."""
    return textwrap.fill(text, 130, subsequent_indent="  " if text.startswith("*") else "")


def conditions(figures: Figures) -> str:
    """Return where, when and how it was measured."""
    known, settings = figures.raw["environment"], figures.raw["settings"]
    bad, count = figures.disturbed()
    system = known["system"].partition(" ")[0]
    sentence = (
        f"{known['date'][:10]}, {known['cpus']} CPUs ({known['cpu']}), {system}, {known['python']}, "
        f"libzmq {known['libzmq']}, tcp over loopback. Medians of {settings['rounds']} interleaved rounds, "
        f"{settings['seconds']:g} s for each figure."
    )
    if bad:
        sentence += f" During {bad} of {count} measurements something else used the CPUs;"
        sentence += f" where {FEWEST_QUIET} rounds or more were undisturbed, only these count."
    return wrapped(sentence)


def versions(figures: Figures) -> str:
    """Return the table of versions and settings."""
    known = figures.raw["environment"]
    body = []
    for peer in figures.peers.values():
        held = peer["versions"] | {name: known["brokers"][name] for name in [peer["broker"]] if name}
        body.append(
            [peer["title"], ", ".join(f"{key} {value}" for key, value in held.items()), peer["settings"]]
        )
    lines = ["| | versions | settings |", "|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def compared(figures: Figures) -> Iterator[tuple[str, str, str, bool]]:
    """Return what is compared with the others: task, metric, what it is called, and whether the least is the best."""
    for task, title in figures.tasks.items():
        one_by_one = task.startswith("call")
        if one_by_one:
            yield task, "p50_us", f"{title}: p50", True
        else:
            yield task, "rate", f"{title}: rate", False
        yield task, "p99_us", f"{title}: p99", True
        yield task, "cpu_us", f"{title}: CPU", True
        for side, whose in (("client", "the client's"), ("server", "the server's")):
            if task in WHERE_MEMORY_IS_COMPARED[side]:
                yield task, f"{side}_rss_mib", f"{title}: {whose} memory", True
                yield task, f"{side}_fds", f"{title}: {whose} descriptors", True


def ahead_of(figures: Figures, ours: str, task: str, metric: str, least: bool) -> str:
    """Return who is better than ``ours`` in one metric, and how many times, the best first; nobody is left out."""
    own = figures.value(task, ours, metric)
    ahead = []
    for peer in figures.peers:
        theirs = None if peer.startswith(OURS) else figures.value(task, peer, metric)
        if own and theirs:
            factor = own / theirs if least else theirs / own
            if factor >= ABOUT_THE_SAME:
                ahead.append((factor, f"{figures.title(peer)} {number(factor)}"))
    return ", ".join(text for _, text in sorted(ahead, reverse=True))


def better_than_ours(figures: Figures) -> list[list[str]]:
    """Return a row for each task and metric in which somebody is better than one of ours, a cell for each of these."""
    ours = [peer for peer in figures.peers if peer.startswith(OURS)]
    lines = []
    for task, metric, title, least in compared(figures):
        cells = [ahead_of(figures, peer, task, metric, least) for peer in ours]
        if any(cells):
            lines.append([title, *cells])
    return lines


def where_others_are_better(figures: Figures) -> str:
    """Return :func:`better_than_ours` as a table; empty if there is nothing in it."""
    body = better_than_ours(figures)
    if not body:
        return ""
    head = ["", *(f"than {figures.title(peer)}" for peer in figures.peers if peer.startswith(OURS))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def absent(figures: Figures) -> list[str]:
    """Return who did not take part, in all or in some tasks, and why."""
    lines = [f"* {name}: {why}" for name, why in figures.raw["left_out"].items()]
    for peer in figures.peers.values():
        reasons: dict[str, list[str]] = {}
        for task, why in peer["without"].items():
            if task in figures.tasks:
                reasons.setdefault(why, []).append(figures.tasks[task])
        for why, tasks in reasons.items():
            lines.append(wrapped(f"* {peer['title']} without “{'”, “'.join(tasks)}”: {why}"))
    return lines


# -- where it goes ---------------------------------------------------------------------------------------


def readme_part(figures: Figures) -> str:
    """Return what README shows: some rows, and a picture's worth of columns."""
    peers = [peer for peer in README_PEERS if peer in figures.peers]
    known = figures.raw["environment"]
    where = f"{known['cpus']} CPUs, tcp over loopback, {known['date'][:10]}"
    return (
        f"{table(figures, SUMMARY, peers)}\n\n"
        f"One client and one server process, 16 B where no size is named; {where}. [All figures, versions, settings,\n"
        "and where zmqcore is not the best](docs/explanation/performance.md#against-others);\n"
        "`make bench-peers` measures again."
    )


def page_part(figures: Figures) -> str:
    """Return what the page about performance shows: everything."""
    parts = [conditions(figures), "![Some of the figures below as bars](../images/peers.svg)"]
    for title, columns in SECTIONS:
        if text := table(figures, columns):
            parts += [f"**{title}**", text]
    if better := where_others_are_better(figures):
        parts += ["**Where zmqcore is not the best**: who is better, and how many times", better]
    if lines := absent(figures):
        parts += ["**Who did not take part in what**", "\n".join(lines)]
    parts += ["**Versions and settings**", versions(figures)]
    return "\n\n".join(parts)


def panels(figures: Figures) -> list[Panel]:
    """Return the plots: one for each column of the summary, the best on top."""
    found = []
    for column in SUMMARY:
        values = {peer: figures.value(column.task, peer, column.metrics[0]) for peer in figures.peers}
        bars = [
            Bar(figures.title(peer), value, number(value), ours=peer.startswith(OURS))
            for peer, value in values.items()
            if value
        ]
        bars.sort(key=lambda bar: bar.value, reverse=not column.least)
        if bars:
            found.append(Panel(f"{column.title} ({'less' if column.least else 'more'} is better)", bars))
    return found


PART = re.compile(r"(<!-- peers: begin -->\n).*?(<!-- peers: end -->)", re.DOTALL)


def replace_part(path: Path, text: str) -> None:
    """Put ``text`` between the two comments of a document."""
    before = path.read_text(encoding="utf-8")
    after, count = PART.subn(lambda match: f"{match[1]}{text}\n{match[2]}", before)
    if count != 1:
        raise ValueError(
            f"{path}: {count} places for the figures, between <!-- peers: begin --> and end; not 1"
        )
    path.write_text(after, encoding="utf-8")


def write_documents(figures: Figures, checkout: Path) -> list[Path]:
    """Bring README, the page about performance and its picture up to date; return their paths."""
    documents: dict[Path, Callable[[Figures], str]] = {
        checkout / "README.md": readme_part,
        checkout / "docs" / "explanation" / "performance.md": page_part,
    }
    for path, part in documents.items():
        replace_part(path, part(figures))
    picture = checkout / "docs" / "images" / "peers.svg"
    picture.write_text(plot(panels(figures)), encoding="utf-8")
    return [*documents, picture]


def print_tables(figures: Figures, console: Console) -> None:
    """Show everything on the terminal."""
    console.print(conditions(figures))
    for title, columns in (("In short", SUMMARY), *SECTIONS):
        body = rows(figures, columns, figures.peers)
        if not body:
            continue
        shown = Table("", title=title, title_justify="left")
        for column in columns:
            shown.add_column(column.title, justify="right")
        for row in body:
            shown.add_row(*row, style="bold" if row[0] == OURS else "")
        console.print(shown)
    for title, *cells in better_than_ours(figures):
        for peer, cell in zip([peer for peer in figures.peers if peer.startswith(OURS)], cells, strict=True):
            if cell:
                console.print(f"* {title}, better than {figures.title(peer)}: {cell} times", markup=False)
    for line in absent(figures):
        console.print(line, markup=False)
    for failure in dict.fromkeys(figures.raw["failures"]):
        console.print(f"FAILED {failure}", markup=False)
