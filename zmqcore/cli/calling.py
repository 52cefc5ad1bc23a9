"""The commands that send: call, cast and fanout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from zmqcore import Stream
from zmqcore.cli.arguments import ArgumentsError, method_arguments
from zmqcore.cli.options import ValuesCommand
from zmqcore.cli.outcome import Exit, exit_codes_help
from zmqcore.cli.output import error_summary, member_json, note
from zmqcore.cli.servers import Servers, client_options

__all__ = ["call", "cast", "fanout"]

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


@dataclass(frozen=True, slots=True)
class _Request:
    """What the words after TOPIC say: the method and its arguments."""

    method: str
    args: list[Any]
    kwargs: dict[str, Any]


def _request(function: Callable[[Servers, _Request], int]) -> Callable[..., int]:
    """Add what call, cast and fanout have in common: TOPIC METHOD [ARGS]... and the options around them."""

    @functools.wraps(function)
    def command(servers: Servers, method: str, args: tuple[str, ...], kwargs: str | None, raw: bool) -> int:
        try:
            positional, named = method_arguments(args, kwargs, raw=raw, note=note)
        except ArgumentsError as exc:
            raise click.UsageError(str(exc)) from exc
        return function(servers, _Request(method, positional, named))

    decorated: Callable[..., int] = command
    for decorator in (
        client_options,
        click.option("--raw", is_flag=True, help="Take every ARG as text as it stands."),
        click.option("--kwargs", metavar="JSON", help="Keyword arguments as a JSON object."),
        click.argument("args", nargs=-1),
        click.argument("method"),
        click.argument("topic"),
    ):
        decorated = decorator(decorated)
    return decorated


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
{exit_codes_help(Exit.REMOTE_ERROR, Exit.NOBODY_THERE, Exit.DEADLINE)}""",
)
@_request
def call(servers: Servers, request: _Request) -> int:
    """Run ``zmqcore call``."""
    with servers.client() as client:
        result = client.call(request.method, *request.args, **request.kwargs)
        # Printed before the client is closed: a large result is a view onto the received message.
        for item in result if isinstance(result, Stream) else (result,):
            servers.output.json(item)
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
{exit_codes_help(Exit.NOBODY_THERE, Exit.DEADLINE)}""",
)
@_request
def cast(servers: Servers, request: _Request) -> int:
    """Run ``zmqcore cast``."""
    with servers.client() as client:
        client.cast(request.method, *request.args, **request.kwargs)
    if servers.output.machine:
        servers.output.json({"sent": True})
    else:
        servers.output.line("sent", style="green")
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
{exit_codes_help(Exit.NOBODY_THERE, Exit.DEADLINE, Exit.PARTLY)}""",
)
@_request
def fanout(servers: Servers, request: _Request) -> int:
    """Run ``zmqcore fanout``."""
    with servers.client() as client:
        outcome = client.fanout(request.method, *request.args, **request.kwargs)
    if servers.output.machine:
        servers.output.json(
            {
                "epoch": outcome.epoch,
                "sent": [member_json(member) for member in outcome.sent],
                "failed": [
                    {**member_json(member), "error": error_summary(error)}
                    for member, error in outcome.failed.items()
                ],
            }
        )
    else:
        ends = [(member, "sent") for member in outcome.sent]
        ends += [(member, error_summary(error)) for member, error in outcome.failed.items()]
        servers.output.table(
            f"fanout {request.method} to {servers.topic.name}, epoch {outcome.epoch}",
            {"server": "left", "host": "left", "pid": "right", "outcome": "left"},
            [[member.topic.server or "", member.host, str(member.pid), end] for member, end in ends],
        )
    return Exit.PARTLY if outcome.failed else Exit.OK
