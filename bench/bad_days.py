"""Bad days: servers that are killed, stopped, busy or restarted under load, and callers that give up; with figures.

::

    python bench/bad_days.py                       # about 4 minutes
    python bench/bad_days.py --rows kill,stop --rounds 9
    python bench/bad_days.py --quick               # a first look: fewer calls, casts and servers

Every row is measured with real processes over loopback, from a fresh client process. Prints each row beside its goal;
``--json FILE`` keeps every figure of every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import zmq
from bad_days_rows import MEASUREMENTS
from options import some_of

import zmqcore

REPEATED = {"kill", "stop"}
"""What is measured several times; of the others a count is the figure."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached by ``metric`` of ``row`` in every round: the worst one is shown."""

    row: str
    title: str
    metric: str
    bound: str
    goal: float


def _accepted(kind: str, number: int) -> tuple[Goal, ...]:
    row = f"accepted-{kind}"
    return (
        Goal(row, f"{number:,} accepted casts, 20 restarts, {kind}: not executed", "missing", "=", 0),
        Goal(row, "  executed twice within one run of the server", "twice_in_one_run", "=", 0),
        Goal(row, "  unfinished or given up at the end", "left", "=", 0),
    )


GOALS = (
    Goal("kill", "one of 4 killed at 5,000 calls/s: last call to it ended after, ms", "ended_ms", "≤", 100),
    Goal("kill", "  calls that went to it when that was known", "went_there_later", "=", 0),
    Goal("kill", "  calls that failed otherwise", "others_failed", "=", 0),
    Goal("kill", "  calls/s really made", "rate", "≥", 4900),
    Goal("stop", "server stopped, liveness 5 s: all pending calls lost after, s", "lost_s", "≤", 5),
    Goal("stop", "  calls that did not end with PeerLost", "not_lost", "=", 0),
    Goal("gil", "handler holds the GIL for 10 s: calls that failed", "calls_failed", "=", 0),
    Goal("gil", "  connections lost", "connections_lost", "=", 0),
    *_accepted("inline", 100_000),
    *_accepted("threads", 100_000),
    *_accepted("coroutines", 100_000),
    Goal("rolling", "rolling restart of 20 servers under load: calls failed", "failed", "=", 0),
    Goal("rolling", "  executed twice", "twice", "=", 0),
    Goal("rolling", "  never executed", "never", "=", 0),
    Goal("storm", "100,000 calls, a third cancelled: futures and calls left", "left", "=", 0),
    Goal("storm", "  wrong answers", "wrong", "=", 0),
    Goal("storm", "  counters of both sides add up", "books", "=", 1),
    Goal("memory-sent", "one of 10 stopped: growth / ten windows, casts sent", "windows", "≤", 1.1),
    Goal("memory-accepted", "  the same, casts accepted", "windows", "≤", 1.1),
)


def met(goal: Goal, value: float) -> bool:
    """Whether ``value`` is what it should be."""
    return {"≤": value <= goal.goal, "≥": value >= goal.goal, "=": value == goal.goal}[goal.bound]


def reached(goal: Goal, samples: dict[str, list[dict[str, Any]]]) -> float | None:
    """Return the worst round: a promise holds in each of them. None if the row was not measured."""
    values: list[float] = [sample[goal.metric] for sample in samples.get(goal.row, [])]
    if not values:
        return None
    return {
        "≤": max(values),
        "≥": min(values),
        "=": max(values, key=lambda value: abs(value - goal.goal)),
    }[goal.bound]


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure each row, in a fresh process with a runtime directory of its own."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for row in options.rows:
        for _ in range(options.rounds if row in REPEATED and not options.quick else 1):
            print(f"\r\x1b[K{row} ...", end="", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--measure", row] + ["--quick"] * options.quick
            # Short: the path of a Unix socket has 107 bytes at most.
            with tempfile.TemporaryDirectory(prefix="zc-") as directory:
                environment = os.environ | {"ZMQCORE_RUNTIME_DIR": directory}
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                )
            samples.setdefault(row, []).append(json.loads(done.stdout))
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return samples


def figure(value: float) -> str:
    """Return a number with three digits or, if it is one, a whole number."""
    return f"{int(value):,}" if value == int(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def report(
    samples: dict[str, list[dict[str, Any]]], options: argparse.Namespace, load: tuple[float, ...]
) -> None:
    """Print the goals, then everything else that was measured."""
    print(
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"libzmq {zmq.zmq_version()}, zmqcore {zmqcore.__version__}; load before: {load[0]:.2f}"
        + ("; --quick: less of everything than the titles say" * options.quick)
    )
    width = max(len(goal.title) for goal in GOALS)
    print(f"\n{'':{width}}  {'goal':>9}  {'reached':>9}  met")
    for goal in GOALS:
        value = reached(goal, samples)
        if value is not None:
            wanted = f"{goal.bound} {figure(goal.goal)}"
            print(
                f"{goal.title:{width}}  {wanted:>9}  {figure(value):>9}  {'yes' if met(goal, value) else 'NO'}"
            )
    print()
    for row, found in samples.items():
        for sample in found:
            plain = {key: value for key, value in sample.items() if isinstance(value, int | float)}
            print(f"{row}: " + ", ".join(f"{key} {figure(value)}" for key, value in plain.items()))
            for text, count in sample.get("what", {}).items():
                print(f"  {count} times: {text}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rows", type=some_of(MEASUREMENTS), default=list(MEASUREMENTS), help=", ".join(MEASUREMENTS)
    )
    parser.add_argument("--quick", action="store_true", help="fewer calls, casts, servers and rounds")
    parser.add_argument("--rounds", type=int, default=3, help="of kill and stop (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure and print. Whether a goal was met does not matter here; 1 if something could not be measured."""
    options = parse()
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure](options)))
        return 0
    load = os.getloadavg()
    try:
        samples = measure(options)
    except subprocess.CalledProcessError as failure:
        print(f"bad_days: {failure}", file=sys.stderr)
        return 1
    if options.json:
        goals = [dataclasses.asdict(goal) | {"reached": reached(goal, samples)} for goal in GOALS]
        record = {"load": load, "quick": options.quick, "goals": goals, "samples": samples}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    report(samples, options, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
