"""The pool's page names every option, counter and column that there is, and no other."""

from __future__ import annotations

import ast
import re
import resource
from pathlib import Path

import pytest

from zmqcore import Client, Node, Server, _pool

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "pool.md"


def names_below(heading: str) -> set[str]:
    """The names in the first cells of the tables below a heading, down to the next one."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    return {
        name
        for cell in re.findall(r"^\|([^|]*)\|", found[1], re.MULTILINE)
        for name in re.findall("`(\\w+)`", cell)
    }


def test_options() -> None:
    # A compiled class has no signature to ask for; its stub is checked against it elsewhere.
    stub = ast.parse(Path(_pool.__file__).with_name("_pool.pyi").read_text(encoding="utf-8"))
    classes = (node for node in stub.body if isinstance(node, ast.ClassDef))
    pool = next(cls for cls in classes if cls.name == "ChannelPool")
    functions = (node for node in pool.body if isinstance(node, ast.FunctionDef))
    init = next(function for function in functions if function.name == "__init__")
    assert names_below("Options") == {argument.arg for argument in init.args.kwonlyargs}


def test_counters_and_columns() -> None:
    with (
        Node("memory://pool-page", max_sockets=8) as node,
        Server("page", {"double": lambda number: 2 * number}, node=node, bind="tcp://127.0.0.1:*"),
    ):
        assert Client("page", node=node).call("double", 2) == 4
        assert names_below("`stats()`") == set(node.pool.stats())
        [row] = node.pool.snapshot()
        assert names_below("`snapshot()`") == set(row)


def test_the_example_of_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for limit, shown in (
        (1024, "1024 gives (1024 \N{MINUS SIGN} 256) / 2 = {}"),
        (20_000, "20,000 gives {}"),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert shown.format(_pool.default_max_sockets()) in text
