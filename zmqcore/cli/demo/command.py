"""``zmqcore demo``: the command, its progress bar and its closing table."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from zmqcore.cli.demo.analysis import standard_library
from zmqcore.cli.demo.report import DemoFailed, Observer, Report
from zmqcore.cli.demo.run import run_demo
from zmqcore.cli.interrupts import Interrupted, Interrupts
from zmqcore.cli.options import Command, count_option, json_option
from zmqcore.cli.outcome import Exit, exit_codes_help
from zmqcore.cli.output import Output, note, show_error

__all__ = ["demo"]


class _Silent:
    """An observer for when nobody watches."""

    def phase(self, title: str, total: int | None) -> None:
        """Do nothing."""

    def progress(self, done: int, detail: str) -> None:
        """Do nothing."""

    def event(self, text: str) -> None:
        """Do nothing."""


class _Bar:
    """An observer with a progress bar on standard error."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<36}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def phase(self, title: str, total: int | None) -> None:
        """Finish the bar of the phase before and begin one."""
        self._finish()
        self._task = self._bar.add_task(title, total=total, detail="")

    def _finish(self) -> None:
        if self._task is not None and self._bar.tasks[-1].total is None:
            self._bar.update(self._task, total=1, completed=1)

    def progress(self, done: int, detail: str) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, detail=detail)

    def event(self, text: str) -> None:
        """Print a line above the bars."""
        self._bar.console.print(text, markup=False, highlight=False)


def _as_json(report: Report) -> dict[str, Any]:
    return {"ok": report.ok, **asdict(report)}


def _facts(report: Report) -> dict[str, str]:
    """Return what the closing table says, by heading."""
    retried = ", ".join(f"{name} {number}" for name, number in report.retried_for.items())
    killed, fds = report.killed, report.fds_peak
    return {
        "files": f"{report.files:,} ({report.bytes / 1e6:.1f} MB)",
        "found": f"{report.lines:,} lines, {report.tokens:,} tokens",
        "not Python": f"{report.not_python}, alike with and without RPC",
        "calls": f"{report.calls:,}",
        "retries": f"{report.retries}" + (f" ({retried})" if retried else ""),
        "killed": f"{killed['server']} (process {killed['pid']}) after {killed['after_files']:,} files"
        if killed
        else "none",
        "rate": f"{report.files_per_second:,.0f} files/s in {report.seconds:.1f} s",
        "latency": f"p50 {report.p50_ms:.1f} ms, p99 {report.p99_ms:.1f} ms",
        "events": f"{report.events:,} counted by the collector",
        "fds held": "unknown" if fds is None else f"{fds} at most, {report.fds_before} before",
        "checked": f"{report.checked:,} results against a computation without RPC: "
        f"{len(report.missing)} missing, {len(report.wrong)} wrong",
    }


def _worker_row(worker: dict[str, Any], report: Report) -> list[str]:
    return [
        worker["server"],
        str(worker.get("pid", report.killed["pid"] if report.killed else "")),
        f"{worker['results']:,}",
        f"{worker['bytes'] / 1e6:.1f}" if "bytes" in worker else "",
        f"{worker.get('events', 0):,}",
        str(worker.get("fds") or ""),
        "killed half way" if worker.get("killed") else "",
    ]


def _show(output: Output, report: Report) -> None:
    """Print the closing tables."""
    facts = [[name, text] for name, text in _facts(report).items()]
    output.table("demo", {"": "left", " ": "left"}, facts)
    output.line("")
    columns = {"server": "left"} | dict.fromkeys(("pid", "results", "MB", "events", "fds"), "right")
    output.table("workers", columns | {"": "left"}, [_worker_row(each, report) for each in report.workers])
    output.line("")
    for problem in report.problems[:20]:
        output.line(f"problem: {problem}", style="red")
    if len(report.problems) > 20:
        output.line(f"and {len(report.problems) - 20} more; --json shows all", style="red")
    if report.ok:
        output.line("everything arrived, and everything is right", style="bold green")


@click.command(
    cls=Command,
    short_help="See it work: analyse the standard library with four worker processes.",
    help=f"""Analyse every file of the running Python's standard library through worker processes.

\b
What happens:
    1. worker processes start, find each other, and get a configuration by fanout
    2. every .py file goes to one of them as a call; each answers with counts
       and a digest, and casts a progress event to a collector process
    3. half way one worker is killed; the calls it had are made again elsewhere
    4. statistics are gathered from those that are left
    5. every result is checked against a computation without RPC

It meets nothing else on this machine (it has its own registry in a temporary directory) and leaves no
process and no file behind. Exit code 0 if every result arrived and is right, else 5.

\b
Examples:
    zmqcore demo
    zmqcore demo --workers 8 --in-flight 32
    zmqcore demo --json | jq .files_per_second

{exit_codes_help(Exit.PARTLY)}""",
)
@count_option("--workers", "-w", most=256, default=4, help="Processes. One alone is not killed.")
@count_option("--in-flight", most=1024, default=8, help="Calls at a time.")
@count_option("--limit", "-n", unit="FILES", help="Stop after so many files.")
@click.option(
    "--directory",
    "-d",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Analyse the .py files below this directory instead.",
)
@json_option
def demo(
    workers: int, in_flight: int, limit: int | None, directory: Path | None, json_wanted: bool | None
) -> int:
    """Run ``zmqcore demo``."""
    files = standard_library(directory)[:limit]
    if not files:
        raise click.UsageError(
            "there is no .py file to analyse; --directory names where to look"
            if directory is None
            else f"there is no .py file below {directory}"
        )
    output = Output(json_wanted)
    console = Console(file=sys.stderr)
    watching: AbstractContextManager[Observer] = (
        _Bar(console) if console.is_terminal else nullcontext(_Silent())
    )
    try:
        with Interrupts() as interrupts, watching as observer:
            report = run_demo(
                files, workers=workers, in_flight=in_flight, observer=observer, interrupts=interrupts
            )
    except Interrupted as exc:
        note("interrupted; nothing is left behind")
        return 128 + exc.number
    except DemoFailed as exc:
        show_error(exc)
        return Exit.BROKEN
    if output.machine:
        output.json(_as_json(report))
    else:
        _show(output, report)
    return Exit.OK if report.ok else Exit.PARTLY
