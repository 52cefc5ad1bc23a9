"""``zmqcore bench``: the command, its progress bar, its table and what it says of it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from zmqcore.cli.bench.opinion import opinion, reservations
from zmqcore.cli.bench.processes import PeerFailed
from zmqcore.cli.bench.run import Result, Run, run_rounds
from zmqcore.cli.interrupts import Interrupted, Interrupts
from zmqcore.cli.options import Command, count_option, json_option, seconds_option
from zmqcore.cli.outcome import Exit, exit_codes_help
from zmqcore.cli.output import Output, note, show_error

__all__ = ["bench"]

_TRANSPORTS = ("tcp", "ipc")


@contextmanager
def _progress() -> Iterator[Callable[[float], object]]:
    """Give a function that moves a bar on standard error; without a terminal it does nothing."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("measuring"), BarColumn(bar_width=40), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _figure(result: Result, system: str) -> str:
    if result.task == "call":
        return f"{result.median(system, 'p50_us'):,.1f} µs"
    return f"{result.median(system, 'per_second'):,.0f}/s"


def _row(result: Result) -> list[str]:
    ratios = result.ratios()
    return [
        result.title,
        result.transport,
        _figure(result, "zmqcore"),
        _figure(result, "pyzmq"),
        f"{result.ratio:.2f}",
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        f"{result.median('zmqcore', 'cpu_us'):,.1f} µs",
        f"{result.median('pyzmq', 'cpu_us'):,.1f} µs",
    ]


def _show(output: Output, run: Run) -> None:
    output.table(
        f"{run.size:,} B, medians of {run.rounds} round{'s' if run.rounds > 1 else ''}",
        {
            "": "left",
            " ": "left",
            "zmqcore": "right",
            "bare pyzmq": "right",
            "time ratio": "right",
            "of the rounds": "right",
            "CPU": "right",
            "CPU, bare": "right",
        },
        [_row(result) for result in run.results],
    )
    output.line(
        "time ratio: what a message takes zmqcore, divided by what it takes bare pyzmq; below 1 zmqcore is faster"
    )
    output.line("CPU: what both processes together spend on a message")
    output.line("")
    short, *sentences = opinion(run)
    output.line(f"{short}.", style="bold")
    for sentence in sentences:
        output.line(f"  {sentence}")
    for doubt in reservations(run):
        output.line(f"But {doubt}.", style="yellow")


@click.command(
    cls=Command,
    short_help="Measure zmqcore against bare pyzmq on this machine, in 20 seconds.",
    help=f"""Measure what zmqcore costs on this machine, against bare pyzmq.

\b
What is measured, over tcp on loopback and over ipc, server and client in a process each:
    a call               one after the other: the median round trip
    100 calls in flight  submitted to one server, and collected in order
    casts                one way, counted where they arrive

Bare pyzmq sends the payload as it is from a DEALER to a ROUTER and back. zmqcore does what it always does: it names a
method, packs arguments, keeps deadlines, acknowledges. Where the ratio is 1, all that costs nothing.

Rounds of both systems take turns, each with fresh processes, and what counts is the median of the rounds' ratios.
Times are this machine's, and of this moment; ratios carry over better. It says so if others disturb it. A figure is
never a failure: exit code 0 if all could be measured.

\b
Examples:
    zmqcore bench
    zmqcore bench --size 65536 --seconds 30
    zmqcore bench --transport ipc --json | jq '.results[] | [.task, .ratio]'

{exit_codes_help()}""",
)
@seconds_option(
    "--seconds",
    above_zero=True,
    most=3600,
    default=18.0,
    help="About how long it takes in all; one round is made in any case.",
)
@count_option("--size", most=1 << 20, default=16, unit="BYTES", help="Of each payload, up to 1 MiB.")
@click.option(
    "--transport", type=click.Choice(_TRANSPORTS), help="Only over this one. Default: one after the other."
)
@json_option
def bench(seconds: float, size: int, transport: str | None, json_wanted: bool | None) -> int:
    """Run ``zmqcore bench``."""
    output = Output(json_wanted)
    try:
        # Signals may interrupt any of it: processes end with their input, however this one ends.
        with (
            Interrupts() as interrupts,
            tempfile.TemporaryDirectory(prefix="zmqcore-bench-") as directory,
            interrupts.allowed(),
            _progress() as progress,
        ):
            run = run_rounds(
                Path(directory),
                seconds=seconds,
                size=size,
                transports=_TRANSPORTS if transport is None else (transport,),
                progress=progress,
            )
    except Interrupted as exc:
        note("interrupted; nothing is left behind")
        return 128 + exc.number
    except PeerFailed as exc:
        show_error(exc)
        note("`zmqcore doctor` looks at the installation, and calls a server over both transports")
        return Exit.BROKEN
    if output.machine:
        output.json({**run.as_json(), "opinion": opinion(run), "reservations": reservations(run)})
    else:
        _show(output, run)
    return Exit.OK
