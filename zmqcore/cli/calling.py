"""The commands of a client: call, cast, fanout, ping and members."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from zmqcore import Client, Node, Stream, Topic, errors
from zmqcore.cli.arguments import ArgumentsError, method_arguments
from zmqcore.cli.measure import percentile
from zmqcore.cli.options import (
    Command,
    ValuesCommand,
    client_options,
    exchange_option,
    json_option,
    matchmaker_option,
    server_option,
)
from zmqcore.cli.outcome import EXIT_CODES_HELP, Exit, hint_for
from zmqcore.cli.output import Output, error_summary, member_json, note, show_error
from zmqcore.matchmaker import Matchmaker, Member, open_matchmaker

__all__ = ["call", "cast", "fanout", "members", "open_client", "ping", "topic_of"]

_ARGUMENTS_HELP = """\b
Arguments:
    42  1.5  true  null       JSON is taken as what it says
    '[1, 2]'  '{"a": 1}'      quote it for the shell
    sku-1  "two words"        what is not JSON is text
    '"42"'                    so is this: the text 42, not the number
    qty=2  note="by hand"     NAME=VALUE is a keyword argument, the value
                              read the same way
    --kwargs '{"qty": 2}'     keyword arguments as one JSON object
    --raw                     every word is text as it stands, no JSON and no
                              NAME=VALUE; for scripts that pass on any text
    --                        ends the options: what follows may start with -
"""

_RESULTS_HELP = """\
Bytes are shown as {"base64": "..."}, dates as ISO 8601 text, arrays as lists, NaN and the infinities as null.
"""


def _arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what call, cast and fanout have in common: TOPIC METHOD [ARGS]... and the options around them."""
    for decorator in (
        client_options,
        click.option("--raw", is_flag=True, help="Take every ARG as text as it stands."),
        click.option("--kwargs", metavar="JSON", help="Keyword arguments as a JSON object."),
        click.argument("args", nargs=-1),
        click.argument("method"),
        click.argument("topic"),
    ):
        function = decorator(function)
    return function


def _read_arguments(args: tuple[str, ...], kwargs: str | None, raw: bool) -> tuple[list[Any], dict[str, Any]]:
    try:
        return method_arguments(args, kwargs, raw=raw, note=note)
    except ArgumentsError as exc:
        raise click.UsageError(str(exc)) from exc


def topic_of(name: str, server: str | None, exchange: str) -> Topic:
    return Topic(name, server=server or None, exchange=exchange)


@contextmanager
def open_client(topic: Topic, connect: tuple[str, ...], matchmaker: str, timeout: float) -> Iterator[Client]:
    """Yield a client with a node of its own, both closed at the end."""
    with (
        Node(matchmaker=matchmaker) as node,
        Client(topic, node=node, timeout=timeout, connect=list(connect) or None) as client,
    ):
        yield client


@click.command(
    cls=ValuesCommand,
    short_help="Call a method and print what it returns.",
    help=f"""Call METHOD of a server of TOPIC and print what it returns.

\b
Examples:
    zmqcore call inventory reserve sku-1 qty=2
    zmqcore call inventory reserve sku-1 --server host-3 --timeout 30
    zmqcore call inventory zmqcore.methods
    zmqcore call --connect tcp://10.0.0.7:5555 inventory stock | jq .total

Of a stream each item is printed as soon as it comes.

TOPIC is the topic's name as the server was given it. Every server also answers zmqcore.methods (what can be
called, with signatures), zmqcore.stats and zmqcore.ping.

{_ARGUMENTS_HELP}
{_RESULTS_HELP}
{EXIT_CODES_HELP}""",
)
@_arguments
def call(
    topic: str,
    method: str,
    args: tuple[str, ...],
    kwargs: str | None,
    raw: bool,
    connect: tuple[str, ...],
    server: str | None,
    exchange: str,
    matchmaker: str,
    timeout: float,
    json_wanted: bool | None,
) -> int:
    """Run ``zmqcore call``."""
    positional, named = _read_arguments(args, kwargs, raw)
    with open_client(topic_of(topic, server, exchange), connect, matchmaker, timeout) as client:
        result = client.call(method, *positional, **named)
        output = Output(json_wanted)
        # Printed before the client is closed: a large result is a view onto the received message.
        for item in result if isinstance(result, Stream) else (result,):
            output.json(item)
    return Exit.OK


@click.command(
    cls=ValuesCommand,
    short_help="Send a message one way, without an answer.",
    help=f"""Run METHOD on one server of TOPIC without waiting for it to end.

Exit code 0 says that the message was handed to a live connection, not that the method has run or succeeded;
use call to know that.

\b
Examples:
    zmqcore cast inventory touch sku-1
    zmqcore cast log write '{{"level": "info"}}' source=cron

{_ARGUMENTS_HELP}
{EXIT_CODES_HELP}""",
)
@_arguments
def cast(
    topic: str,
    method: str,
    args: tuple[str, ...],
    kwargs: str | None,
    raw: bool,
    connect: tuple[str, ...],
    server: str | None,
    exchange: str,
    matchmaker: str,
    timeout: float,
    json_wanted: bool | None,
) -> int:
    """Run ``zmqcore cast``."""
    positional, named = _read_arguments(args, kwargs, raw)
    with open_client(topic_of(topic, server, exchange), connect, matchmaker, timeout) as client:
        client.cast(method, *positional, **named)
    output = Output(json_wanted)
    if output.machine:
        output.json({"sent": True})
    else:
        output.line("sent", style="green")
    return Exit.OK


@click.command(
    cls=ValuesCommand,
    short_help="Send a message to every member of a topic.",
    help=f"""Run METHOD on every server of TOPIC without waiting for it to end.

Prints who it was sent to and who could not be reached; exit code 5 if there are any of the latter.

\b
Examples:
    zmqcore fanout inventory reload
    zmqcore fanout inventory configure '{{"limit": 100}}'

{_ARGUMENTS_HELP}
{EXIT_CODES_HELP}""",
)
@_arguments
def fanout(
    topic: str,
    method: str,
    args: tuple[str, ...],
    kwargs: str | None,
    raw: bool,
    connect: tuple[str, ...],
    server: str | None,
    exchange: str,
    matchmaker: str,
    timeout: float,
    json_wanted: bool | None,
) -> int:
    """Run ``zmqcore fanout``."""
    positional, named = _read_arguments(args, kwargs, raw)
    with open_client(topic_of(topic, server, exchange), connect, matchmaker, timeout) as client:
        outcome = client.fanout(method, *positional, **named)
    output = Output(json_wanted)
    failed = list(outcome.failed.items())
    if output.machine:
        output.json(
            {
                "epoch": outcome.epoch,
                "sent": [member_json(member) for member in outcome.sent],
                "failed": [
                    {**member_json(member), "error": error_summary(error)} for member, error in failed
                ],
            }
        )
    else:
        rows = [[member.topic.server or "", member.host, str(member.pid), "sent"] for member in outcome.sent]
        rows += [
            [member.topic.server or "", member.host, str(member.pid), error_summary(error)]
            for member, error in failed
        ]
        output.table(
            f"fanout {method} to {topic}, epoch {outcome.epoch}",
            {"server": "left", "host": "left", "pid": "right", "outcome": "left"},
            rows,
        )
    return Exit.PARTLY if failed else Exit.OK


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


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


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

{EXIT_CODES_HELP}""",
)
@click.argument("topic")
@click.option(
    "--count", "-n", type=click.IntRange(min=1), default=4, show_default=True, help="Pings per member."
)
@click.option(
    "--interval",
    "-i",
    type=click.FloatRange(min=0),
    default=0.2,
    show_default=True,
    metavar="SECONDS",
    help="Pause between two pings of one member.",
)
@client_options
def ping(
    topic: str,
    count: int,
    interval: float,
    connect: tuple[str, ...],
    server: str | None,
    exchange: str,
    matchmaker: str,
    timeout: float,
    json_wanted: bool | None,
) -> int:
    """Run ``zmqcore ping``."""
    target = topic_of(topic, server, exchange)
    rows: list[dict[str, Any]] = []
    if connect:
        for address in connect:
            with open_client(target, (address,), matchmaker, timeout) as client:
                rows.append(_ping_one(client, count, interval) | {"address": address})
    else:
        with open_matchmaker(matchmaker) as registry:
            found = registry.members(target).members
        if not found:
            raise errors.NoSuchTopic(f"nobody serves {topic}" + (f" as {server}" if server else ""))
        with open_client(target, (), matchmaker, timeout) as client:
            for name in dict.fromkeys(member.topic.server for member in found):
                row = _ping_one(client.prepare(server=name), count, interval)
                rows.append(row | {"server": name, "address": ""})
    answered = sum(1 for row in rows if row["error"] is None)
    output = Output(json_wanted)
    if output.machine:
        for row in rows:
            row["error"] = None if row["error"] is None else error_summary(row["error"])
        output.json({"topic": topic, "members": rows, "asked": len(rows), "answered": answered})
    else:
        output.table(
            f"ping {topic}",
            {
                "server": "left",
                "pid": "right",
                "up for": "right",
                "first ms": "right",
                "best": "right",
                "p50": "right",
                "worst": "right",
                "": "left",
            },
            [
                [
                    row["server"] or row["address"],
                    str(row["pid"] or ""),
                    "" if row["uptime_seconds"] is None else f"{row['uptime_seconds']:.0f} s",
                    *(_milliseconds(row[key]) for key in ("first_ms", "best_ms", "p50_ms", "worst_ms")),
                    "" if row["error"] is None else error_summary(row["error"]),
                ]
                for row in rows
            ],
        )
        first_error = next((row["error"] for row in rows if row["error"] is not None), None)
        if first_error is not None and (hint := hint_for(first_error, topic)):
            note(hint)
    if answered == len(rows):
        return Exit.OK
    return Exit.PARTLY if answered else Exit.NOBODY_THERE


def _registered(registry: Matchmaker, topic: Topic | None) -> list[Member]:
    topics = registry.topics() if topic is None else [topic]
    # Topics of different servers have the same members when asked for as a group.
    groups = dict.fromkeys(
        each if each.server is not None and topic is not None else each.group for each in topics
    )
    return [member for group in groups for member in registry.members(group).members]


@click.command(
    cls=Command,
    short_help="List who serves what.",
    help=f"""List the members of TOPIC, or of every topic.

It asks the matchmaker only: a member that is listed holds a lease, whether it answers is what ping tells.
Exit code 3 if TOPIC is given and nobody serves it.

\b
Examples:
    zmqcore members
    zmqcore members inventory --json | jq -r '.[].endpoints[]'
    zmqcore members inventory --matchmaker static:///etc/zmqcore/members.toml

{EXIT_CODES_HELP}""",
)
@click.argument("topic", required=False)
@server_option
@exchange_option
@matchmaker_option
@json_option
def members(
    topic: str | None, server: str | None, exchange: str, matchmaker: str, json_wanted: bool | None
) -> int:
    """Run ``zmqcore members``."""
    if topic is None and (server or exchange):
        raise click.UsageError("--server and --exchange choose among the members of a TOPIC: name it")
    with open_matchmaker(matchmaker) as registry:
        found = _registered(registry, None if topic is None else topic_of(topic, server, exchange))
    output = Output(json_wanted)
    if output.machine:
        output.json([member_json(member) for member in found])
    elif found:
        output.table(
            f"members of {topic}" if topic else "members",
            {"topic": "left", "server": "left", "host": "left", "pid": "right", "endpoints": "left"},
            [
                [
                    f"{member.topic.name} ({member.topic.exchange})"
                    if member.topic.exchange
                    else member.topic.name,
                    member.topic.server or "",
                    member.host,
                    str(member.pid),
                    "  ".join(member.endpoints),
                ]
                for member in found
            ],
        )
    elif topic is None:
        output.line("nobody serves anything here")
    if not found and topic is not None:
        show_error(errors.NoSuchTopic(f"nobody serves {topic}"), topic)
        return Exit.NOBODY_THERE
    return Exit.OK
