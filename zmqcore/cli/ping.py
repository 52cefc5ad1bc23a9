"""The command ping: whether the servers of a topic are there, and how long an answer takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from zmqcore import Client, errors
from zmqcore.cli.measure import percentile
from zmqcore.cli.options import Command, count_option, seconds_option
from zmqcore.cli.outcome import Exit, exit_codes_help
from zmqcore.cli.output import error_summary
from zmqcore.cli.servers import Servers, client_options
from zmqcore.matchmaker import open_matchmaker

__all__ = ["ping"]

_COLUMNS = {
    "server": "left",
    "pid": "right",
    "up for": "right",
    "first ms": "right",
    "best": "right",
    "p50": "right",
    "worst": "right",
    "": "left",
}


def _ping_one(client: Client, count: int, interval: float) -> dict[str, Any]:
    """Ping *client*'s one server *count* times; return who answered, the round trips, and the first error."""
    times_ms: list[float] = []
    answer: dict[str, Any] = {}
    error: Exception | None = None
    for number in range(count):
        if number and interval:
            time.sleep(interval)
        started = time.perf_counter()
        try:
            answer = client.call("zmqcore.ping")
        except errors.ZmqcoreError as exc:
            error = exc
            break  # the others would wait for the same deadline again
        times_ms.append((time.perf_counter() - started) * 1000)
    # The first one pays for making the connection, so it stands apart.
    ordered = sorted(times_ms[1:] or times_ms)
    return {
        "server": answer.get("server"),
        "instance": answer.get("instance"),
        "pid": answer.get("pid"),
        "uptime_seconds": answer.get("uptime"),
        "answered": len(times_ms),
        "first_ms": times_ms[0] if times_ms else None,
        "best_ms": ordered[0] if ordered else None,
        "p50_ms": percentile(ordered, 0.5) if ordered else None,
        "worst_ms": ordered[-1] if ordered else None,
        "error": error,
    }


def _rows(servers: Servers, count: int, interval: float) -> Iterator[dict[str, Any]]:
    """Ping every server, one after the other; yield what is known of each."""
    for address in servers.connect:
        with servers.client(address) as client:
            yield _ping_one(client, count, interval) | {"address": address}
    if servers.connect:
        return
    topic = servers.topic
    with open_matchmaker(servers.matchmaker) as registry:
        found = registry.members(topic).members
    if not found:
        raise errors.NoSuchTopic(f"nobody serves topic {str(topic)!r}, says {registry.url}")
    with servers.client() as client:
        for name in dict.fromkeys(member.topic.server for member in found):
            yield _ping_one(client.prepare(server=name), count, interval) | {"server": name, "address": ""}


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the row of the table for people."""
    times = (row[key] for key in ("first_ms", "best_ms", "p50_ms", "worst_ms"))
    return [
        row["server"] or row["address"],
        str(row["pid"] or ""),
        "" if row["uptime_seconds"] is None else f"{row['uptime_seconds']:.0f} s",
        *("" if milliseconds is None else f"{milliseconds:.3f}" for milliseconds in times),
        "" if row["error"] is None else error_summary(row["error"]),
    ]


@click.command(
    cls=Command,
    short_help="Ask every member of a topic whether it is there.",
    help=f"""Ask every server of TOPIC whether it is there and how long an answer takes.

The first round trip includes making the connection and is shown apart from the others. Exit code 0 if all
answered, 5 if some did, 3 if none did.

\b
Examples:
    zmqcore ping inventory
    zmqcore ping inventory --server host-3 --count 100 --interval 0
    zmqcore ping inventory --connect tcp://10.0.0.7:5555

{exit_codes_help(Exit.NOBODY_THERE, Exit.PARTLY)}""",
)
@click.argument("topic")
@count_option("--count", "-n", default=4, help="Pings per member.")
@seconds_option("--interval", "-i", default=0.2, help="Pause between two pings of one member.")
@client_options
def ping(servers: Servers, count: int, interval: float) -> int:
    """Run ``zmqcore ping``."""

    def show(rows: list[dict[str, Any]]) -> None:
        servers.output.table(f"ping {servers.topic.name}", _COLUMNS, map(_cells, rows))

    return servers.report(list(_rows(servers, count, interval)), show)
