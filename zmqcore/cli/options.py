"""The options that several commands share, and how words that look like options but are values are read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from zmqcore import errors
from zmqcore.cli.outcome import status_of
from zmqcore.cli.output import show_error

__all__ = [
    "Command",
    "ValuesCommand",
    "count_option",
    "exchange_option",
    "json_option",
    "matchmaker_option",
    "seconds_option",
    "server_option",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_NEGATIVE_NUMBER = re.compile(r"-\.?\d")
# What a node takes at most for any of its times; threads cannot wait for much longer.
_LONGEST_SECONDS = 1e9
# Put before a negative number so that click does not take it for an option. From the private use area: a word
# that starts with it cannot come from a keyboard by accident.
_GUARD = "\ue0f0"

json_option = click.option(
    "--json/--no-json",
    "json_wanted",
    default=None,
    help="Print JSON, or text for people. Default: JSON unless standard output is a terminal.",
)
matchmaker_option = click.option(
    "--matchmaker",
    "-m",
    envvar="ZMQCORE_MATCHMAKER",
    default="local://",
    show_default=True,
    show_envvar=True,
    metavar="URL",
    help="Who knows which server serves which topic: local://, local:///DIRECTORY, static:///FILE.toml.",
)
server_option = click.option(
    "--server", "-s", metavar="NAME", help="Only the member of this name, not any that serves the topic."
)
exchange_option = click.option(
    "--exchange", default="", metavar="NAME", help="The exchange that the topic belongs to, if it has one."
)


def count_option(
    *names: str,
    help: str,
    default: int | None = None,
    least: int = 1,
    most: int | None = None,
    unit: str | None = None,
) -> Callable[[_Function], _Function]:
    """Return the option for a whole number of *unit*, from *least* to *most*."""
    number = click.IntRange(min=least, max=most)
    return click.option(*names, type=number, default=default, show_default=True, metavar=unit, help=help)


class _Number(click.FloatRange):
    """A number in a range. NaN is in none, but no comparison says so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return *value* as a number; fail, as click does, if it is none, or is outside the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def seconds_option(
    *names: str,
    help: str,
    default: float,
    least: float = 0,
    above_zero: bool = False,
    most: float = _LONGEST_SECONDS,
) -> Callable[[_Function], _Function]:
    """Return the option for a duration of *least* to *most* seconds."""
    number = _Number(min=least, min_open=above_zero, max=most)
    return click.option(*names, type=number, default=default, show_default=True, metavar="SECONDS", help=help)


class Command(click.Command):
    """A command whose failures become a message, a hint and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; if it raises one of zmqcore's errors, print that and return its exit code."""
        try:
            return super().invoke(ctx)
        except errors.ZmqcoreError as exc:
            show_error(exc, str(ctx.params.get("topic") or ""))
            return status_of(exc)


class ValuesCommand(Command):
    """A command whose words are values: ``-1`` and ``-.5`` are numbers, not options.

    Everything else that begins with a dash is still checked against the options, so a misspelt option is not
    quietly sent as an argument.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse *args* with negative numbers kept as values."""
        takes_value = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and not parameter.is_flag
            for name in parameter.opts
        }
        guarded: list[str] = []
        for position, word in enumerate(args):
            if word == "--":
                guarded += args[position:]
                break
            is_option_value = position > 0 and args[position - 1] in takes_value
            if not is_option_value and _NEGATIVE_NUMBER.match(word):
                word = _GUARD + word
            guarded.append(word)
        try:
            return super().parse_args(ctx, guarded)
        except click.NoSuchOption as exc:
            name = exc.option_name.lstrip("-")
            if not name.isidentifier() or exc.possibilities:
                raise
            text = f"{exc.message} A keyword argument of the method is written {name}=VALUE."
            raise click.NoSuchOption(exc.option_name, text, ctx=ctx) from exc

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with the guards taken off again."""
        for name, value in ctx.params.items():
            if isinstance(value, str):
                ctx.params[name] = value.removeprefix(_GUARD)
            elif isinstance(value, tuple):
                ctx.params[name] = tuple(
                    item.removeprefix(_GUARD) if isinstance(item, str) else item for item in value
                )
        return super().invoke(ctx)
