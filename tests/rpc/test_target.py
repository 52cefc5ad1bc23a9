"""MODULE:OBJECT as something to serve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from zmqcore.rpc.target import NotServable, load_endpoint

NAME = "zmqcore_test_shelf"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    tmp_path.joinpath(NAME + ".py").write_text(
        "class Stock:\n"
        "    class Inner:\n"
        "        def get(self): return 2\n"
        "    def get(self): return 1\n"
        "class Needy:\n"
        "    def __init__(self, shelf): pass\n"
        "class Optional:\n"
        "    def __init__(self, shelf=1): pass\n"
        "    def get(self): return 3\n"
        "class Empty:\n"
        "    _secret = print\n"
        "shop = Stock()\n"
        "def double(number): return 2 * number\n",
        encoding="utf-8",
    )
    tmp_path.joinpath(NAME + "_broken.py").write_text("import zmqcore_test_missing", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield NAME
    for name in (NAME, NAME + "_broken"):
        sys.modules.pop(name, None)


def test_a_class_is_instantiated(shelf: str) -> None:
    assert load_endpoint(f"{shelf}:Stock").get() == 1
    assert type(load_endpoint(f"{shelf}:Optional")).__name__ == "Optional"
    assert type(load_endpoint(f"{shelf}:Stock.Inner")).__name__ == "Inner"


def test_an_object_is_served_itself(shelf: str) -> None:
    assert load_endpoint(f"{shelf}:shop") is sys.modules[shelf].shop


def test_a_function_is_served_under_its_name(shelf: str) -> None:
    assert load_endpoint(f"{shelf}:double")["double"](4) == 8


def test_a_module_is_served_itself(shelf: str) -> None:
    assert isinstance(load_endpoint(shelf), ModuleType)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("{}:Needy", "without arguments"),
        ("{}:nothing", "has no 'nothing'; it has Empty, Needy, Optional, Stock, double, shop"),
        ("{}:Stock.nothing", "has no 'Stock.nothing'"),
        ("{}:Empty", "has no public method to serve"),
        ("{}_missing:Stock", "there is no module 'zmqcore_test_shelf_missing'"),
        ("{}.sub:Stock", "there is no module"),
        ("{}.py:Stock", "is not MODULE:OBJECT"),
        ("./{}:Stock", "is not MODULE:OBJECT"),
        ("{}:", "is not MODULE:OBJECT"),
        (":Stock", "is not MODULE:OBJECT"),
        ("", "is not MODULE:OBJECT"),
    ],
)
def test_what_cannot_be_served_says_why(shelf: str, target: str, why: str) -> None:
    with pytest.raises(NotServable) as caught:
        load_endpoint(target.format(shelf))
    assert why in str(caught.value)


def test_what_the_module_itself_lacks_is_not_hidden(shelf: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="zmqcore_test_missing"):
        load_endpoint(f"{shelf}_broken:Stock")
