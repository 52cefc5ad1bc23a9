"""The reference pages list what there is, neither more nor less, with the defaults that it has."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import zmqcore
from zmqcore import AsyncClient, AsyncServer, Client, Limits, Node, Retry, Server, ServerProcesses, errors

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def section(page: str, heading: str) -> str:
    """The text below a heading, down to the next one of any level."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no heading {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table in *text*, without heads."""
    lines = re.findall(r"^(?:\|.*\|)$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = [number for number, row in enumerate(cells) if all(set(cell) <= set("-:") for cell in row)]
    heads = {number - 1 for number in rules}
    return [row for number, row in enumerate(cells) if number not in heads and number not in rules]


def value_of(cell: str) -> object:
    """The value that a default's cell spells: a literal, a shift of one, or the default policy."""
    if cell == "`Retry()`":
        return Retry()
    left, shift, right = cell.strip("`").partition(" << ")
    value = ast.literal_eval(left)
    return value << ast.literal_eval(right) if shift else value


@pytest.mark.parametrize(
    "cls", [Node, Server, AsyncServer, ServerProcesses, Client, AsyncClient, Retry, Limits]
)
def test_options_are_those_of_the_constructor(cls: type) -> None:
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not parameter.VAR_POSITIONAL
    }
    listed = {
        name.strip("`"): value_of(default) if default else inspect.Parameter.empty
        for name, default, _ in rows(section("options.md", cls.__name__))
    }
    assert listed == parameters


def test_every_error_is_listed_with_what_else_it_is_and_what_to_do() -> None:
    table = rows((REFERENCE / "errors.md").read_text(encoding="utf-8"))
    listed = {name.strip("`"): base.strip("`") for name, base, _, _ in table}
    assert all(when and what_to_do for _, _, when, what_to_do in table)
    expected = {}
    for name in errors.__all__:
        others = [base for base in getattr(errors, name).__bases__ if base is not errors.ZmqcoreError]
        expected[name] = others[0].__name__ if others else ""
    del expected["ZmqcoreError"]
    assert listed == expected


def test_every_public_name_is_listed() -> None:
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"`(\w+)`", text))
    assert {name for name in zmqcore.__all__ if name not in errors.__all__} <= mentioned


def test_every_command_is_listed_with_its_options() -> None:
    click = pytest.importorskip("click")
    from zmqcore.cli.app import app

    shared = option_rows("Options of several commands")
    assert [row[0].split("`")[1] for row in rows(section("command-line.md", "Command line"))] == list(
        app.commands
    )
    for name, command in app.commands.items():
        text = section("command-line.md", name)
        own = option_rows(name)
        mentioned = set(own) | set(re.findall(r"`(--[\w-]+)`", text))
        options = {option.opts[0]: option for option in command.params if isinstance(option, click.Option)}
        assert mentioned == set(options), name
        for first, option in options.items():
            names, default, help_text = own.get(first) or shared[first]
            assert names == [*option.opts, *option.secondary_opts], f"{name} {first}"
            assert help_text == option.help, f"{name} {first}"
            if default:
                assert value_or_text(default) == option.default, f"{name} {first}"


def option_rows(heading: str) -> dict[str, tuple[list[str], str, str]]:
    found = {}
    for names, _, default, help_text in rows(section("command-line.md", heading)):
        split = re.findall(r"`([^`]+)`", names)
        found[split[0]] = (split, default.strip("`"), help_text)
    return found


def value_or_text(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def test_exit_codes_are_those_of_the_command_line() -> None:
    pytest.importorskip("click")
    from zmqcore.cli.outcome import Exit

    assert {int(code) for code, _ in rows(section("command-line.md", "Exit codes"))} == set(map(int, Exit))


def test_the_files_that_pages_name_exist() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"`([\w/]+\.(?:pyx|pxd|pyi|py))`", page.read_text(encoding="utf-8")):
            places = (ROOT / name, ROOT / "zmqcore" / name)
            shown = f"file={name}" in page.read_text(encoding="utf-8")
            assert shown or any(place.exists() for place in places), f"{page.relative_to(ROOT)} names {name}"


def test_the_architecture_page_knows_every_module() -> None:
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "zmqcore"
    names = {
        str(path.relative_to(package)) for suffix in ("py", "pyx") for path in package.rglob(f"*.{suffix}")
    }
    explained = {name for name in names if f"`{name}`" in text or f"`{name.partition('/')[0]}/`" in text}
    assert names - explained == {"__init__.py", "_version.py", "rpc/__init__.py"}


def test_every_figure_of_servers_and_nodes_is_explained() -> None:
    text = (ROOT / "docs" / "how-to" / "watch-a-server.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"`([\w.*]+)`", text))
    with Node("memory://figures") as node, Server("t", {"f": print}, node=node) as server:
        of_threads, of_node = server.stats(), node.stats()
    of_loop = AsyncServer("t", {"f": print}, node=node).stats()
    figures = {"port." + name for name in of_threads.pop("port")}
    figures |= {"buffers." + name for name in of_node.pop("buffers")}
    figures |= {"node", *of_threads, *of_loop, *of_node} - {"port", "channels", "pool"}
    assert figures - mentioned == set()
    # These two have tables of their own, which tests/docs/test_pool_page.py holds against the code.
    assert {"pool.open", "channels.*.timeouts"} <= mentioned
