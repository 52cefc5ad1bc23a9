"""The command ``stats``: what running servers have counted, asked over their own RPC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from zmqcore import Topic, errors
from zmqcore.cli.options import Command
from zmqcore.cli.outcome import Exit, exit_codes_help
from zmqcore.cli.output import Output, error_summary
from zmqcore.cli.servers import Servers, client_options
from zmqcore.matchmaker import Member

__all__ = ["stats"]

#: What the table of all servers shows: its heading, and where the figure stands in a server's answer.
_COLUMNS = {
    "handled": ("handled",),
    "failed": ("failed",),
    "expired": ("expired",),
    "refused": ("refused",),
    "rejected": ("rejected",),
    "clients": ("port", "peers"),
    "garbage": ("port", "garbage"),
    "sockets": ("node", "pool", "open"),
    "of": ("node", "pool", "max_sockets"),
    "waits": ("node", "pool", "waits"),
}


def _at(answer: Any, path: tuple[str, ...]) -> Any:
    """Return what stands at *path*; None where a server of another version has nothing."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, Mapping) else None
    return answer


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(answer: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield every figure with the path to it, such as ``node.pool.open``."""
    for name, value in answer.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", _cell(value)


def _name(member: Member, answer: Any) -> str:
    """Return the server's name: its own word for it, as a member that --connect names has none."""
    topic = _at(answer, ("topic",))
    try:
        own = Topic.parse(topic).server if isinstance(topic, str) else None
    except errors.InvalidTopic:
        own = None
    return own or member.topic.server or ", ".join(member.endpoints)


def _row(member: Member, answer: Any, error: Exception | None) -> dict[str, Any]:
    return {
        "server": _name(member, answer),
        "endpoints": list(member.endpoints),
        "stats": answer,
        "error": error,
    }


def _summary(row: dict[str, Any]) -> list[str]:
    """Return the row of the table of all servers."""
    answer = row["stats"]
    uptime = _at(answer, ("uptime",))
    return [
        row["server"],
        _cell(_at(answer, ("pid",))),
        f"{uptime:.0f} s" if isinstance(uptime, int | float) else "",
        _cell(_at(answer, ("queued",))),
        *(_cell(_at(answer, path)) for path in _COLUMNS.values()),
        "" if row["error"] is None else error_summary(row["error"]),
    ]


def _show_all(output: Output, row: dict[str, Any]) -> None:
    if row["error"] is not None:
        output.line(f"{row['server']}: {error_summary(row['error'])}", style="bold red")
    else:
        output.table(row["server"], {"": "left", " ": "right"}, map(list, _flat(row["stats"])))


@click.command(
    cls=Command,
    short_help="Show what the servers of a topic have counted.",
    help=f"""Ask every server of TOPIC, or one of them, what it has counted since it started.

The table shows per server how many requests wait (queued), were done (handled), raised (failed), came too late
(expired), did not fit (refused) or found the queue full (rejected); how many clients it knows (one that has gone is
forgotten a minute or two later), and how much came that was no message of ours (garbage); and of the pool by which the
server calls others, how many sockets are open, of how many, and how often somebody had to wait for one. --all and
--json show everything.

Exit code 0 if all answered, 5 if some did, 3 if none did.

\b
Examples:
    zmqcore stats inventory
    zmqcore stats inventory --server host-3 --all
    zmqcore stats inventory --json | jq '.members[].stats.node.pool'
    zmqcore stats inventory --connect tcp://10.0.0.7:5555

{exit_codes_help(Exit.NOBODY_THERE, Exit.PARTLY)}""",
)
@click.argument("topic")
@click.option("--all", "-a", "everything", is_flag=True, help="Show every figure. JSON always has them all.")
@client_options
def stats(servers: Servers, everything: bool) -> int:
    """Run ``zmqcore stats``."""
    with servers.client() as client:
        gathered = client.gather("zmqcore.stats")
    rows = [_row(member, answer, None) for member, answer in gathered.results.items()]
    rows += [_row(member, None, error) for member, error in (gathered.errors | gathered.missing).items()]
    rows.sort(key=lambda row: row["server"])

    def show(rows: list[dict[str, Any]]) -> None:
        if everything:
            for row in rows:
                _show_all(servers.output, row)
        else:
            columns = {"server": "left", "pid": "right", "up for": "right", "queued": "right"}
            columns |= dict.fromkeys(_COLUMNS, "right") | {"": "left"}
            servers.output.table(f"stats of {servers.topic.name}", columns, map(_summary, rows))

    return servers.report(rows, show)
