"""``zmqcore doctor``: the command and its tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from zmqcore.cli.diagnosis import Diagnosis, diagnose
from zmqcore.cli.endpoint_check import examine
from zmqcore.cli.options import Command, json_option, matchmaker_option
from zmqcore.cli.outcome import Exit, exit_codes_help
from zmqcore.cli.output import Output

__all__ = ["doctor"]


def _text(value: Any) -> str:
    if value is None:
        return "unlimited"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        if all(isinstance(item, bool) for item in value.values()):
            lacking = [name for name, there in value.items() if not there]
            return " ".join(name for name, there in value.items() if there) + (
                f" (not: {' '.join(lacking)})" if lacking else ""
            )
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return str(len(value))
    return str(value)


def _self_test_text(facts: dict[str, Any]) -> str:
    if not facts["ok"]:
        return f"failed: {facts['error']}"
    return (
        f"p50 {facts['p50_us']:.0f} µs, p99 {facts['p99_us']:.0f} µs, the first {facts['first_us']:.0f} µs; "
        f"{facts['calls']} calls to {facts['endpoint']}"
    )


def _show(output: Output, diagnosis: Diagnosis) -> None:
    for section, facts in diagnosis.facts.items():
        output.table(
            section.replace("_", " "),
            {"": "left", " ": "left"},
            [
                [
                    f"  {name.replace('_', ' ')}",
                    _self_test_text(value)
                    if section == "self_test" and isinstance(value, dict)
                    else _text(value),
                ]
                for name, value in facts.items()
            ],
        )
    output.line("")
    for problem in diagnosis.problems:
        style = "bold red" if problem.severity == "broken" else "yellow"
        output.line(f"{problem.severity}: {problem.what}", style=style)
        output.line(f"  what to do: {problem.advice}")
    if not diagnosis.problems:
        output.line("everything is as it should be", style="bold green")


@click.command(
    cls=Command,
    short_help="Look at the installation and its limits, and make a call to itself.",
    help=f"""Look at what zmqcore needs here, and say what to do where something is wrong.

Shown are the versions in use and which libzmq was found; the limits on file descriptors and the budget of
sockets that follows from them; the runtime directory, the matchmaker; and how long a call to a server in
this very process takes over tcp and ipc. Exit code 6 if something is broken; warnings do not count.

With --endpoint it looks at that address instead, and says whether nothing listens there, something that does not
speak ZeroMQ, something that speaks ZeroMQ but not zmqcore, or a zmqcore server: how long the handshake and a
ping take, which instance it is, and how large a message it takes. Exit code 6 for all but the last.

\b
Examples:
    zmqcore doctor
    zmqcore doctor --json | jq .self_test.tcp.p50_us
    zmqcore doctor --matchmaker static:///etc/zmqcore/members.toml
    zmqcore doctor --endpoint tcp://10.0.0.7:5555

{exit_codes_help()}""",
)
@click.option(
    "--endpoint", "-e", metavar="ENDPOINT", help="Look at who is at this address, and at nothing else."
)
@matchmaker_option
@json_option
def doctor(endpoint: str | None, matchmaker: str, json_wanted: bool | None) -> int:
    """Run ``zmqcore doctor``."""
    diagnosis = diagnose(matchmaker) if endpoint is None else examine(endpoint)
    output = Output(json_wanted)
    if output.machine:
        output.json(
            {
                "ok": diagnosis.ok,
                "problems": [asdict(problem) for problem in diagnosis.problems],
                **diagnosis.facts,
            }
        )
    else:
        _show(output, diagnosis)
    return Exit.OK if diagnosis.ok else Exit.BROKEN
