"""The servers that a command is about: the options that name them, and a client of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from zmqcore import Client, Node, Topic
from zmqcore.cli.options import exchange_option, json_option, matchmaker_option, seconds_option, server_option
from zmqcore.cli.outcome import Exit, hint_for
from zmqcore.cli.output import Output, error_summary, note

__all__ = ["Servers", "client_options"]

_connect_option = click.option(
    "--connect",
    "-c",
    multiple=True,
    metavar="ENDPOINT",
    help="Ask no matchmaker, talk to this address: tcp://HOST:PORT or ipc:///PATH. Repeat it for several.",
)
_timeout_option = seconds_option(
    "--timeout",
    "-t",
    above_zero=True,
    default=5.0,
    help="How long to wait for an answer, connecting included.",
)


@dataclass(frozen=True, slots=True)
class Servers:
    """What the options of every client say: which servers, how long to wait for them, and how to print."""

    topic: Topic
    connect: tuple[str, ...]
    matchmaker: str
    timeout: float
    output: Output

    @contextmanager
    def client(self, *connect: str) -> Iterator[Client]:
        """Yield a client with a node of its own, both closed at the end; with *connect* of these endpoints only."""
        endpoints = connect or self.connect
        with (
            Node(matchmaker=self.matchmaker) as node,
            Client(self.topic, node=node, timeout=self.timeout, connect=endpoints or None) as client,
        ):
            yield client

    def report(self, rows: list[dict[str, Any]], show: Callable[[list[dict[str, Any]]], None]) -> Exit:
        """Print a row for each server, with its "error" or None there; return the exit code.

        *show* prints the rows for people.
        """
        failures = [row["error"] for row in rows if row["error"] is not None]
        answered = len(rows) - len(failures)
        if self.output.machine:
            members = [row | {"error": row["error"] and error_summary(row["error"])} for row in rows]
            self.output.json(
                {"topic": self.topic.name, "asked": len(rows), "answered": answered, "members": members}
            )
        else:
            show(rows)
            if failures and (hint := hint_for(failures[0], self.topic.name)):
                note(hint)
        if answered == len(rows):
            return Exit.OK
        return Exit.PARTLY if answered else Exit.NOBODY_THERE


def client_options(function: Callable[..., int]) -> Callable[..., int]:
    """Add the options of every client; *function* gets them, with its argument TOPIC, as a :class:`Servers`."""

    @functools.wraps(function)
    def command(
        topic: str,
        connect: tuple[str, ...],
        server: str | None,
        exchange: str,
        matchmaker: str,
        timeout: float,
        json_wanted: bool | None,
        **others: Any,
    ) -> int:
        full = Topic(topic, server=server or None, exchange=exchange)
        return function(Servers(full, connect, matchmaker, timeout, Output(json_wanted)), **others)

    options = (
        _connect_option,
        server_option,
        exchange_option,
        matchmaker_option,
        _timeout_option,
        json_option,
    )
    for option in reversed(options):
        command = option(command)
    return command
