"""Measure zmqcore beside bare pyzmq and beside the same thing in C, all in one run.

::

    python bench/side_by_side.py                       # everything: about 6 minutes
    python bench/side_by_side.py --quick               # a first look: half a minute
    python bench/side_by_side.py --tasks call,cast --rounds 30 --json result.json
    python bench/side_by_side.py --only c,pyzmq        # without zmqcore

A round starts a fresh client and a fresh server process for every peer and transport, runs each task with
the peers one right after the other (in rotated order), and ends the processes. Ratios are taken within a
round; what is printed is the median over the rounds and, in brackets, the quartiles. ``bench/README.md`` says
how to read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import floor
import machine
from options import some_of
from processes import Peers, wait_until_quiet

from zmqcore.cli.bench.processes import PeerFailed

MIB = 1 << 20

MOST_OTHERS = 0.2
"""CPUs that others may keep busy during a measurement. With one of two CPUs taken, client and server share
the other and no idle CPU has to be woken: a blocking round trip in C takes 44 µs then, and 85 on a quiet
machine."""

FEWEST_QUIET = 3
"""With so many rounds of a task undisturbed, only these count."""


# -- what is measured ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measurement: which peer runs which command of the line protocol; ``{s}`` is its duration."""

    name: str
    peer: str
    command: str


@dataclasses.dataclass(frozen=True)
class Task:
    """Entries that are measured one right after the other."""

    name: str
    title: str
    entries: tuple[Entry, ...]

    def and_also(self, *entries: Entry) -> Task:
        """Return this task with further entries."""
        return dataclasses.replace(self, entries=self.entries + entries)


def same_command(name: str, title: str, command: str, peers: str) -> Task:
    """Return the task that lets several peers run one command."""
    return Task(name, title, tuple(Entry(peer, peer, command) for peer in peers.split()))


TASKS = (
    same_command("call", "sequential call, 16 B", "call 16 {s}", "c pyzmq pyzmq-msgpack zmqcore zmqcore-w4"),
    same_command("cast", "cast, 16 B", "cast 16 {s}", "c pyzmq pyzmq-msgpack zmqcore"),
    same_command("cast-1k", "cast, 1 KiB", "cast 1024 {s}", "c pyzmq pyzmq-msgpack zmqcore"),
    same_command("call-1m", "call, 1 MiB each way", f"call {MIB} {{s}}", "c pyzmq-frames zmqcore"),
    Task(
        "threads",
        "16 B calls from 1, 8 and 32 threads",
        tuple(
            Entry(f"{peer} x{threads}", peer, f"threads 16 {{s}} {threads}")
            for peer in ("c", "pyzmq", "zmqcore")
            for threads in (1, 8, 32)
        ),
    ).and_also(
        # The same client with its threads on one CPU: how much of it is where the scheduler puts them.
        *(
            Entry(f"zmqcore-1cpu x{threads}", "zmqcore-1cpu", f"threads 16 {{s}} {threads}")
            for threads in (8, 32)
        )
    ),
    same_command(
        "inflight", "100 calls in flight, 16 B", "inflight 16 {s} 100", "c pyzmq pyzmq-msgpack zmqcore"
    ).and_also(
        Entry("zmqcore asyncio", "zmqcore", "asyncio 16 {s} 100"),
        Entry("zmqcore uvloop", "zmqcore", "uvloop 16 {s} 100"),
    ),
    same_command("pack", "pack + unpack of a small call, no I/O", "pack 16 {s}", "zmqcore"),
)


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached: ``metric`` of ``entry``, divided by that of ``against`` if there is one."""

    title: str
    task: str
    entry: str
    metric: str
    at_most: bool
    goal: float
    against: str = ""
    aim: bool = False
    transports: tuple[str, ...] = ("tcp", "ipc")


GOALS = (
    Goal("sequential call, workers=0, p50 / bare pyzmq", "call", "zmqcore", "p50_us", True, 0.7, "pyzmq"),
    Goal("sequential call, workers=0, p50 / C", "call", "zmqcore", "p50_us", True, 0.6, "c", aim=True),
    Goal("sequential call, workers=4, p50 / bare pyzmq", "call", "zmqcore-w4", "p50_us", True, 1.3, "pyzmq"),
    Goal("cast 16 B, messages/s", "cast", "zmqcore", "rate", False, 500_000),
    Goal("cast 16 B, messages/s", "cast", "zmqcore", "rate", False, 1_000_000, aim=True),
    Goal("cast 1 KiB, rate / C", "cast-1k", "zmqcore", "rate", False, 0.7, "c"),
    Goal("call 1 MiB each way, rate / C", "call-1m", "zmqcore", "rate", False, 0.85, "c"),
    Goal("8 threads on a client, rate / 1 thread", "threads", "zmqcore x8", "rate", False, 2, "zmqcore x1"),
    Goal(
        "8 threads on a client, rate / 1 thread",
        "threads",
        "zmqcore x8",
        "rate",
        False,
        3,
        "zmqcore x1",
        aim=True,
    ),
    Goal(
        "32 threads on a client, calls/s",
        "threads",
        "zmqcore x32",
        "rate",
        False,
        40_000,
        transports=("tcp",),
    ),
    Goal(
        "32 threads on a client, calls/s",
        "threads",
        "zmqcore x32",
        "rate",
        False,
        60_000,
        aim=True,
        transports=("tcp",),
    ),
    Goal(
        "submit, 100 in flight, calls/s", "inflight", "zmqcore", "rate", False, 150_000, transports=("tcp",)
    ),
    Goal(
        "asyncio, 100 in flight, calls/s",
        "inflight",
        "zmqcore asyncio",
        "rate",
        False,
        70_000,
        transports=("tcp",),
    ),
    Goal(
        "uvloop, 100 in flight, calls/s",
        "inflight",
        "zmqcore uvloop",
        "rate",
        False,
        120_000,
        transports=("tcp",),
    ),
    Goal(
        "uvloop, 100 in flight, calls/s",
        "inflight",
        "zmqcore uvloop",
        "rate",
        False,
        200_000,
        aim=True,
        transports=("tcp",),
    ),
    Goal("pack + unpack of a small call, µs", "pack", "zmqcore", "p50_us", True, 1.5, transports=("tcp",)),
)


# -- the run ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What was measured.

    ``samples[transport, task, entry]`` has one answer per round, None for a failed one. ``repeated`` counts
    what was measured again because others had used the CPUs.
    """

    samples: dict[tuple[str, str, str], list[dict[str, Any] | None]] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    soaks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    repeated: int = 0

    def counted(self, transport: str, task: str) -> list[int]:
        """Return which rounds of a task count: those that nobody disturbed, or all if these are fewer than 3."""
        series = [samples for key, samples in self.samples.items() if key[:2] == (transport, task)]
        rounds = range(min(map(len, series), default=0))
        quiet = [number for number in rounds if not disturbed(samples[number] for samples in series)]
        return quiet if len(quiet) >= FEWEST_QUIET else list(rounds)

    def values(self, transport: str, task: str, entry: str, metric: str) -> list[float | None]:
        """Return one metric of one entry for each round that counts, None for a failed one."""
        samples = self.samples.get((transport, task, entry))
        if samples is None:
            return []
        counted = [samples[number] for number in self.counted(transport, task)]
        return [sample.get(metric) if sample is not None else None for sample in counted]


def spread(values: Iterable[float | None]) -> tuple[float, float, float] | None:
    """Return the lower quartile, the median and the upper quartile; None without values."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    if len(known) == 1:
        return known[0], known[0], known[0]
    low, middle, high = statistics.quantiles(known, n=4, method="inclusive")
    return low, middle, high


def reached(result: Result, goal: Goal, transport: str) -> tuple[float, float, float] | None:
    """Return quartiles and median of a goal's figure, the ratio taken within each round."""
    own = result.values(transport, goal.task, goal.entry, goal.metric)
    if not goal.against:
        return spread(own)
    other = result.values(transport, goal.task, goal.against, goal.metric)
    return spread(
        a / b if a and b else None for a, b in zip(own, other, strict=False)
    )  # nothing if one has none


def run(options: argparse.Namespace, peers: Peers, tasks: list[Task]) -> Result:
    """Run all rounds; a failed measurement is noted, and the run goes on with fresh processes."""
    result = Result()
    names = list(dict.fromkeys(entry.peer for task in tasks for entry in task.entries))
    patient_until = time.monotonic() + options.patience
    for number in range(options.rounds):
        for transport in options.transports:
            where = f"round {number + 1}/{options.rounds}, {transport}"
            progress(f"{where}: starting {', '.join(names)}")
            pairs = peers.start(names, transport)
            try:
                for task in tasks:
                    turn = number % len(task.entries)
                    entries = task.entries[turn:] + task.entries[:turn]
                    while True:
                        if time.monotonic() < patient_until:
                            progress(f"{where}: {task.title}: waiting for a quiet machine")
                            wait_until_quiet(patient_until)
                        samples: dict[str, dict[str, Any] | None] = {}
                        for entry in entries:
                            progress(f"{where}: {task.title}: {entry.name}")
                            command = entry.command.format(s=options.seconds)
                            samples[entry.name] = None
                            try:
                                samples[entry.name] = pairs[entry.peer].measure(command, options.seconds)
                            except PeerFailed as failure:
                                result.failures.append(f"{where}, {task.name}: {failure}")
                                pairs[entry.peer].end()
                                pairs |= peers.start([entry.peer], transport)
                        if time.monotonic() >= patient_until or not disturbed(samples.values()):
                            break
                        result.repeated += 1
                    for name, sample in samples.items():
                        result.samples.setdefault((transport, task.name, name), []).append(sample)
            finally:
                for pair in pairs.values():
                    pair.end()
    if options.soak:
        for transport in options.transports:
            progress(f"soak, {transport}: {options.soak} calls by 8 threads")
            pair = peers.start(["zmqcore"], transport)["zmqcore"]
            try:
                patience = options.soak * 1e-4  # of which measure() takes ten times: 1 ms a call
                result.soaks[transport] = pair.measure(f"soak 16 {options.soak} 8", patience)
            except PeerFailed as failure:
                result.failures.append(f"soak, {transport}: {failure}")
            finally:
                pair.end()
    progress("")
    return result


def disturbed(samples: Iterable[dict[str, Any] | None]) -> bool:
    """Say whether others used the CPUs too much during one of ``samples``."""
    return any(sample is not None and sample.get("others", 0.0) > MOST_OTHERS for sample in samples)


def progress(text: str) -> None:
    """Show one line that the next one replaces; nothing if nobody looks."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text}")
        sys.stderr.flush()


# -- the report ------------------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    """Return a number with three or four significant digits."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return rows as text in columns, the first one left-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def goal_rows(result: Result, transports: list[str]) -> list[dict[str, Any]]:
    """Return each goal as a record, for those goals of which something was measured."""
    rows = []
    for goal in GOALS:
        for transport in transports:
            found = reached(result, goal, transport) if transport in goal.transports else None
            if found is None:
                continue
            low, middle, high = found
            own = spread(result.values(transport, goal.task, goal.entry, goal.metric))
            other = spread(result.values(transport, goal.task, goal.against, goal.metric))  # None without one
            rows.append(
                {
                    "title": goal.title,
                    "transport": transport,
                    "metric": goal.metric,
                    "own": own[1] if own else None,
                    "other": other[1] if other else None,
                    "reached": middle,
                    "rounds_counted": len(result.counted(transport, goal.task)),
                    "quartiles": [low, high],
                    "bound": "at most" if goal.at_most else "at least",
                    "goal": goal.goal,
                    "is_aim": goal.aim,
                    "met": middle <= goal.goal if goal.at_most else middle >= goal.goal,
                }
            )
    return rows


METRICS = {
    "p50_us": "p50 µs",
    "p99_us": "p99 µs",
    "max_us": "max µs",
    "rate": "per s",
    "cpu_us": "CPU µs each",
    "client_cpu_us": "the client's",
}


def report(result: Result, tasks: list[Task], options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Print the figures and, if zmqcore took part, how they stand to the goals."""
    print(
        f"{known['cpu']}, {known['cpus']} CPUs, {known['system']}, {known['python']}, "
        f"libzmq {known['libzmq']}, pyzmq {known['pyzmq']}, msgpack {known['msgpack']}, "
        f"zmqcore {known['zmqcore'] or '(not installed)'} {known['commit']}\n"
        f"{options.rounds} rounds of {options.seconds} s, medians [quartiles]"
    )
    samples = [sample for samples in result.samples.values() for sample in samples]
    bad = sum(disturbed([sample]) for sample in samples)
    print(
        f"{result.repeated} tasks were repeated because others used the CPUs; of the {len(samples)} "
        f"measurements {bad} were disturbed. If {FEWEST_QUIET} rounds of a task were not, only those count.\n"
    )
    rows = []
    for task in tasks:
        for transport in options.transports:
            for entry in task.entries:
                spreads = [
                    spread(result.values(transport, task.name, entry.name, metric)) for metric in METRICS
                ]
                medians = [figure(found[1] if found else None) for found in spreads]
                rows.append([f"{task.title}, {transport}: {entry.name}", *medians])
    print(table(["", *METRICS.values()], rows))

    goals = goal_rows(result, options.transports)
    if goals:
        rows = [
            [
                f"{row['title']}, {row['transport']}",
                figure(row["own"]),
                figure(row["other"]),
                str(row["rounds_counted"]),
                f"{figure(row['reached'])} [{figure(row['quartiles'][0])} {figure(row['quartiles'][1])}]",
                f"{'aim' if row['is_aim'] else ''} {row['bound']} {figure(row['goal'])}",
                "yes" if row["met"] else "NO",
            ]
            for row in goals
        ]
        print("\n" + table(["", "zmqcore", "other", "rounds", "reached", "goal", "met"], rows))
    for transport, soak in result.soaks.items():
        print(
            f"\nsoak, {transport}: {soak['calls']:,} calls by 8 threads, all answered and equal, "
            f"{figure(soak['rate'])} calls/s, longest {figure(soak['max_us'] / 1000)} ms, "
            f"{soak['over_100ms']} over 100 ms"
        )
    for failure in result.failures:
        print(f"\nFAILED {failure}", file=sys.stderr)


def as_json(result: Result, tasks: list[Task], options: argparse.Namespace, known: dict[str, Any]) -> str:
    """Return everything, each round's answers included."""
    return json.dumps(
        {
            "environment": known,
            "settings": {
                "rounds": options.rounds,
                "seconds": options.seconds,
                "transports": options.transports,
                "spin": options.spin,
                "commands": {task.name: {e.name: e.command for e in task.entries} for task in tasks},
            },
            "goals": goal_rows(result, options.transports),
            "samples": [
                {"transport": transport, "task": task, "entry": entry, "rounds": samples}
                for (transport, task, entry), samples in result.samples.items()
            ],
            "soaks": result.soaks,
            "repeated": result.repeated,
            "failures": result.failures,
        },
        indent=1,
    )


def chosen(options: argparse.Namespace) -> list[Task]:
    """Return the tasks and entries that the options name."""
    tasks = [task for task in TASKS if task.name in options.tasks]
    kept = []
    for task in tasks:
        entries = tuple(entry for entry in task.entries if not options.only or entry.peer in options.only)
        if entries:
            kept.append(dataclasses.replace(task, entries=entries))
    return kept


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; each list is checked against what there is."""
    all_tasks = [task.name for task in TASKS]
    all_peers = list(dict.fromkeys(entry.peer for task in TASKS for entry in task.entries))
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="Commas separate the words of a list."
    )
    parser.add_argument("--rounds", type=int, help="default 15")
    parser.add_argument("--seconds", type=float, help="duration of one measurement (default 0.3)")
    parser.add_argument("--tasks", type=some_of(all_tasks), default=all_tasks, help=", ".join(all_tasks))
    parser.add_argument("--only", type=some_of(all_peers), help="these peers only: " + ", ".join(all_peers))
    parser.add_argument("--transports", type=some_of(["tcp", "ipc"]), help="tcp, ipc (default: both)")
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        metavar="S",
        help="spend S seconds in all on waiting for a quiet "
        "machine and on measuring again what others have disturbed",
    )
    parser.add_argument("--spin", type=float, help="zmqcore's yield-spin in seconds (default: its own)")
    parser.add_argument(
        "--soak", type=int, default=0, metavar="N", help="then N calls by 8 threads on one client"
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds of 0.1 s on tcp, unless told otherwise"
    )
    parser.add_argument(
        "--json", metavar="FILE", help='write everything there ("-": standard output, no tables)'
    )
    parser.add_argument("--libzmq", metavar="PATH", help="the library for the C peer (default: pyzmq's own)")
    options = parser.parse_args(arguments)
    options.transports = options.transports or (["tcp"] if options.quick else ["tcp", "ipc"])
    options.rounds = options.rounds or (3 if options.quick else 15)
    options.seconds = options.seconds or (0.1 if options.quick else 0.3)
    return options


def main() -> int:
    """Run; 0 if nothing failed, 1 if a peer did. Whether a goal was met does not matter here."""
    options = parse()
    tasks = chosen(options)
    with tempfile.TemporaryDirectory(prefix="zmqcore-bench-") as scratch:
        try:
            peers = Peers(Path(scratch), options.spin, options.libzmq)
            known = machine.environment(peers.libzmq)
            result = run(options, peers, tasks)
        except (PeerFailed, floor.NoFloor) as failure:
            progress("")
            print(f"side_by_side: {failure}", file=sys.stderr)
            return 1
    if options.json:
        text = as_json(result, tasks, options, known)
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    if options.json != "-":
        report(result, tasks, options, known)
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
