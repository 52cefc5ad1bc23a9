"""Every promise on the page of guarantees names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "guarantees.md"


def functions_of(path: Path) -> set[str]:
    """The names of a module's test functions; none if there is no such module."""
    if not path.exists():
        return set()
    module = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    assert named
    assert [
        f"{file}::{name}" for file, name in named if name not in functions_of(ROOT / "tests" / file)
    ] == []


def test_every_promise_names_one() -> None:
    """But for what is said not to be promised."""
    rows = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    promises = [row for row in rows if not row.startswith(("promise |", "Not "))]
    assert promises
    assert [row for row in promises if "::test_" not in row] == []
