"""Words that begin with a dash, and the examples that the help shows."""

from __future__ import annotations

import shlex

import click
import pytest
from click.testing import CliRunner

from zmqcore.cli.app import app
from zmqcore.cli.options import ValuesCommand


@click.command(cls=ValuesCommand)
@click.argument("topic")
@click.argument("args", nargs=-1)
@click.option("--text", "-t")
@click.option("--flag", "-f", is_flag=True)
def words(topic: str, args: tuple[str, ...], text: str | None, flag: bool) -> None:
    click.echo(repr([topic, *args, text, flag]))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("t -1", ["t", "-1", None, False]),
        ("-1 -2.5e3", ["-1", "-2.5e3", None, False]),
        ("t -.5", ["t", "-.5", None, False]),
        ("t --text -1 -2", ["t", "-2", "-1", False]),
        ("t -t -1 -f", ["t", "-1", True]),
        ("t --text=-1", ["t", "-1", False]),
        ("-f t -1", ["t", "-1", None, True]),
        ("t -- -1 --text", ["t", "-1", "--text", None, False]),
        ("t x --flag y", ["t", "x", "y", None, True]),
    ],
)
def test_negative_numbers_are_values(line: str, expected: list[object]) -> None:
    result = CliRunner().invoke(words, shlex.split(line))
    assert result.output.strip() == repr(expected)


@pytest.mark.parametrize("line", ["t --txet 1", "t -x", "t --1"])
def test_other_words_with_a_dash_are_options(line: str) -> None:
    result = CliRunner().invoke(words, shlex.split(line))
    assert result.exit_code == 2
    assert "No such option" in result.output


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "-0.1"])
@pytest.mark.parametrize(
    "line",
    ["serve m:x --topic t --drain", "bench --seconds", "ping t --interval"]
    + [f"{name} t m --timeout" for name in ("call", "cast", "fanout")]
    + [f"{name} t --timeout" for name in ("ping", "stats")],
)
def test_a_time_that_cannot_be_is_a_mistake_of_the_command_line(line: str, value: str) -> None:
    result = CliRunner().invoke(app, [*line.split(), value])
    assert result.exit_code == 2
    assert "Invalid value for" in result.output


def test_every_option_for_a_number_has_bounds() -> None:
    for name, command in app.commands.items():
        for parameter in command.params:
            assert type(parameter.type) is not click.types.FloatParamType, (name, parameter.name)
            if isinstance(parameter.type, click.FloatRange):
                assert parameter.type.min is not None
                assert parameter.type.max is not None, (name, parameter.name)


COMMANDS = ["demo", "serve", "call", "cast", "fanout", "members", "ping", "stats", "doctor", "bench"]


def help_of(*names: str) -> str:
    result = CliRunner().invoke(app, [*names, "--help"])
    assert result.exit_code == 0
    return result.output


def test_the_commands_are_all_there() -> None:
    assert list(app.commands) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name: str) -> None:
    text = help_of(name)
    assert f"zmqcore {name}" in text.split("Examples:")[1]
    assert "Exit codes:" in text


def examples() -> list[str]:
    texts = [help_of(), *(help_of(name) for name in COMMANDS)]
    # Examples are indented; a sentence that begins with the name is not.
    lines = [line.strip() for text in texts for line in text.splitlines() if line.startswith("      ")]
    found = [line.split("   ")[0].split(" | ")[0] for line in lines if line.startswith("zmqcore ")]
    assert len(found) > 15
    return sorted(set(found))


@pytest.mark.parametrize("example", examples())
def test_every_example_in_the_help_is_accepted(example: str) -> None:
    """Parsed only: an example with an option that no longer exists is worse than none."""
    name, *rest = shlex.split(example)[1:]
    command = app.commands[name]
    command.make_context(name, rest).close()
