"""Measure the pool of channels: thousands of endpoints on a fixed number of sockets, against the goals.

::

    python bench/churn.py                          # everything: about 2 minutes
    python bench/churn.py --quick                  # a first look: a quarter of that
    python bench/churn.py --rows many,hot --json result.json

One server process listens on all of 127.0.0.0/8, so that each of its 16 million addresses is an endpoint of its own.
Every measurement runs in a fresh client process. Descriptors and memory are sampled every 2 ms by a thread of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import zmq
from churn_rows import MEASUREMENTS
from churn_server import server
from options import some_of

import zmqcore

FD_CONSTANT = 32
"""What may come on top of 530 with 16 threads: one per thread that waits (an eventfd, kept for the next one), and one
per thread that is just asking whether a dead endpoint accepts connections."""


# -- the goals -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached: ``metric`` of ``row``, divided by that of ``against`` if there is one."""

    row: str
    title: str
    metric: str
    bound: str
    goal: float
    against: str = ""


GOALS = (
    Goal("warm", "acquire + release of a warm channel, ns", "acquire_ns", "≤", 500),
    Goal("many", "10,000 endpoints, 256 sockets, a call each: seconds", "seconds", "≤", 2.5),
    Goal("many", "  most descriptors above the start", "peak_fds", "≤", 530 + FD_CONSTANT),
    Goal("many", "  growth of resident memory, MB", "rss_mb", "≤", 64),
    Goal("many", "  lost", "lost", "=", 0),
    Goal("dead", "the same, 20 % dead: time / without dead ones", "seconds", "≤", 2, "many"),
    Goal("dead", "  live ones not served", "lost", "=", 0),
    Goal("dead", "  dead ones not reported", "dead_not_reported", "=", 0),
    Goal("dead", "  live ones reported as dead", "live_reported_dead", "=", 0),
    Goal("dead", "  most descriptors above the start", "peak_fds", "≤", 530 + FD_CONSTANT),
    Goal("robin", "round robin over 500 endpoints / a socket per call", "ratio", "≥", 6),
    Goal("hot", "90 % to 50 hot, 10 % over 10,000 cold, 128 sockets: hit rate", "hit_rate", "≥", 0.99),
    Goal("fair", "64 threads, 4 sockets: failures before the deadline", "failures", "=", 0),
    Goal("fair", "  longest wait / mean wait", "longest_by_mean", "≤", 3),
    Goal("rough", "10⁶ acquires, failures, expiries, timeouts: fds left over", "fds_left", "=", 0),
    Goal("rough", "  counters add up", "books", "=", 1),
    Goal("fork", "forked child: a context and a socket of its own, ms", "made_ms", "≤", 1),
    Goal("fork", "  a connected channel in hand, ms", "channel_ms", "≤", 1),
    Goal("fork", "  reply to a client's first call, ms", "first_reply_of_client_ms", "≤", 1),
)

REPEATED = {"many", "dead", "fair"}
"""What is measured in several processes, in turn; the others take several rounds within one."""


def met(goal: Goal, value: float) -> bool:
    return (
        value <= goal.goal
        if goal.bound == "≤"
        else value >= goal.goal
        if goal.bound == "≥"
        else value == goal.goal
    )


def reached(goal: Goal, samples: dict[str, list[dict[str, Any]]]) -> float | None:
    """Return the median over the rounds; of a count that must be a certain number, the one farthest from it."""
    own: list[float] = [sample[goal.metric] for sample in samples.get(goal.row, [])]
    if goal.against:
        others = [sample[goal.metric] for sample in samples.get(goal.against, [])]
        own = [mine / other for mine, other in zip(own, others, strict=False)]
    if not own:
        return None
    return max(own, key=lambda value: abs(value - goal.goal)) if goal.bound == "=" else statistics.median(own)


def measure(rows: list[str], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure each row, in fresh processes; where a row is repeated, in turn with the others."""
    samples: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    wanted = [row for row in rows if row not in REPEATED]
    wanted += [row for row in rows if row in REPEATED] * (1 if options.quick else options.rounds)
    for row in wanted:
        print(f"\r\x1b[K{row} ...", end="", file=sys.stderr, flush=True)
        # A server of its own: the connections of the row before take time to go away.
        with server() as ports:
            command = [sys.executable, __file__, "--measure", row, "--ports", json.dumps(ports)]
            command += ["--threads", str(options.threads)] + ["--quick"] * options.quick
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, stdin=subprocess.DEVNULL
            )
        samples[row].append(json.loads(done.stdout))
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return samples


def figure(value: float) -> str:
    """Return a number with three digits."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.4g}"


def report(
    samples: dict[str, list[dict[str, Any]]], options: argparse.Namespace, load: tuple[float, ...]
) -> None:
    """Print the goals, then everything else that was measured."""
    print(
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"libzmq {zmq.zmq_version()}, zmqcore {zmqcore.__version__}; {options.threads} threads; "
        f"load before: {load[0]:.2f}"
        + ("; --quick: fewer endpoints and calls than the titles say" * options.quick)
    )
    rows = []
    for goal in GOALS:
        value = reached(goal, samples)
        if value is not None:
            rows.append(
                [
                    goal.title,
                    f"{goal.bound} {figure(goal.goal)}",
                    figure(value),
                    "yes" if met(goal, value) else "NO",
                ]
            )
    width = max(len(row[0]) for row in rows)
    print("\n" + f"{'':{width}}  {'goal':>9}  {'reached':>9}  met")
    for title, goal_text, value_text, is_met in rows:
        print(f"{title:{width}}  {goal_text:>9}  {value_text:>9}  {is_met}")
    print()
    for row, found in samples.items():
        for sample in found:
            print(f"{row}: " + ", ".join(
                f"{key} {figure(value)}" for key, value in sample.items() if isinstance(value, int | float)
            ))  # fmt: skip
            for key in ("other", "what"):
                for text, count in sample.get(key, {}).items():
                    print(f"  {count} times: {text}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rows", type=some_of(MEASUREMENTS), default=list(MEASUREMENTS), help=", ".join(MEASUREMENTS)
    )
    parser.add_argument("--quick", action="store_true", help="fewer endpoints, calls and rounds")
    parser.add_argument("--rounds", type=int, default=3, help="of many, dead and fair (default 3)")
    parser.add_argument("--threads", type=int, default=16, help="of many and dead (default 16)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure and print. Whether a goal was met does not matter here; 1 if something could not be measured."""
    options = parse()
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure](options.ports, options)))
        return 0
    load = os.getloadavg()
    try:
        samples = measure(options.rows, options)
    except subprocess.CalledProcessError as failure:
        print(f"churn: {failure}", file=sys.stderr)
        return 1
    if options.json:
        goals = [dataclasses.asdict(goal) | {"reached": reached(goal, samples)} for goal in GOALS]
        Path(options.json).write_text(
            json.dumps({"load": load, "quick": options.quick, "goals": goals, "samples": samples}, indent=1)
            + "\n"
        )
    report(samples, options, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
