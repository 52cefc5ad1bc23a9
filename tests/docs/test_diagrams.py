"""Each diagram has its picture, and each picture its diagram: the site draws nothing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("diagrams", ROOT / "docs" / "images" / "diagrams.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_those_of_the_diagrams(drawing: ModuleType) -> None:
    wanted = {drawing.picture_of(page, diagram) for page, diagram in drawing.diagrams()}
    assert wanted
    assert set(drawing.PICTURES.iterdir()) == wanted, "run: python docs/images/diagrams.py"


def test_every_mermaid_block_is_found(drawing: ModuleType) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")]
    assert len(list(drawing.diagrams())) == sum(page.count("```mermaid") for page in pages)


def test_a_diagram_that_was_changed_has_another_picture(drawing: ModuleType) -> None:
    page = ROOT / "docs" / "page.md"
    assert drawing.picture_of(page, "a --> b\n") == drawing.picture_of(page, "a --> b")
    assert drawing.picture_of(page, "a --> b") != drawing.picture_of(page, "a --> c")


def test_pictures_load_nothing_from_elsewhere(drawing: ModuleType) -> None:
    for picture in drawing.PICTURES.iterdir():
        assert not re.findall(
            r"(?:href|src)=\"http|url\(['\"]?http|@import", picture.read_text(encoding="utf-8")
        )
