"""What is printed: JSON that any parser reads, and text for people."""

from __future__ import annotations

import array
import datetime
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcore import Topic, errors
from zmqcore.cli.output import Output, error_summary, json_text, jsonable, show_error
from zmqcore.matchmaker import Member

# What a codec may deliver.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.binary().map(memoryview)
    | st.datetimes(timezones=st.just(datetime.UTC)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text() | st.integers() | st.binary() | st.none() | st.booleans(), inner, max_size=4
        )
    ),
    max_leaves=12,
)


def refuse(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


@given(VALUES)
def test_every_value_becomes_strict_json(value: Any) -> None:
    json.loads(json_text(value), parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"\x00\xff", {"base64": "AP8="}),
        (memoryview(b"ab"), {"base64": "YWI="}),
        (memoryview(array.array("d", [1.0, 2.5])), [1.0, 2.5]),
        (array.array("i", [1, 2]), [1, 2]),
        ((1, (2,)), [1, [2]]),
        (float("nan"), None),
        (float("-inf"), None),
        (datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC), "2024-02-29T12:00:00+00:00"),
        ({1.5: "a", None: "b", b"k": "c", True: "d"}, {"1.5": "a", "null": "b", "k": "c", "true": "d"}),
        ({"a": [b""]}, {"a": [{"base64": ""}]}),
    ],
)
def test_values_that_json_lacks(value: Any, expected: Any) -> None:
    assert jsonable(value) == expected


def test_numpy_arrays_become_lists() -> None:
    numpy = pytest.importorskip("numpy")
    assert jsonable({"a": numpy.arange(4).reshape(2, 2)}) == {"a": [[0, 1], [2, 3]]}


def test_a_member_shows_its_parts() -> None:
    member = Member(Topic("a/b", server="s", exchange="x"), ("tcp://127.0.0.1:1",), "i", "h", 7)
    assert jsonable(member)["topic"] == "a/b"
    assert jsonable([member])[0]["endpoints"] == ["tcp://127.0.0.1:1"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "wanted", "machine"),
    [
        (io.StringIO, None, True),
        (io.StringIO, False, False),
        (Terminal, None, False),
        (Terminal, True, True),
    ],
)
def test_json_unless_somebody_looks(stream: type[io.StringIO], wanted: bool | None, machine: bool) -> None:
    output = Output(wanted, stream())
    assert output.machine is machine
    output.json({"a": [1]})
    text = output.stream.getvalue()  # type: ignore[attr-defined]
    assert (text == '{"a": [1]}\n') is machine


def test_markup_in_values_is_text() -> None:
    stream = io.StringIO()
    output = Output(False, stream)
    output.line("[red]x[/red]")
    output.table("[b]t[/b]", {"[i]": "left"}, [["[/i]"]])
    assert "[red]x[/red]" in stream.getvalue()
    assert "[/i]" in stream.getvalue()


def test_no_word_of_a_table_is_cut_in_two() -> None:
    stream = io.StringIO()
    output = Output(json_wanted=False, stream=stream)
    output.console.width = 20
    words = [
        "server",
        "handled",
        "endpoints",
        "one",
        "17",
        "tcp://127.0.0.1:55555",
        "ipc:///run/user/1000/zmqcore/a.sock",
    ]
    output.table("t", dict.fromkeys(words[:3], "right"), [["one", "17", " ".join(words[5:])]])
    assert set(words) <= set(stream.getvalue().split())


def test_unpaired_surrogates_do_not_break_the_output() -> None:
    raw = io.BytesIO()
    output = Output(True, io.TextIOWrapper(raw, encoding="utf-8", write_through=True))
    output.json("\ud800 ü")
    assert json.loads(raw.getvalue()) == "\ud800 ü"


def test_an_error_goes_to_stderr_with_its_traceback_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(errors.RemoteError("builtins.KeyError", "'sku'", "Traceback: line 1"), "inventory")
    show_error(errors.NoSuchMethod("there is no [x]"), "a b")
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: builtins.KeyError: 'sku'" in err
    assert "Traceback: line 1" in err
    assert "there is no [x]" in err
    assert "hint: `zmqcore call 'a b' zmqcore.methods`" in err


def test_summaries_are_one_line() -> None:
    assert error_summary(errors.RemoteError("E", "m", "a\nb")) == "E: m"
    assert error_summary(errors.Unreachable("x")) == "Unreachable: x"
