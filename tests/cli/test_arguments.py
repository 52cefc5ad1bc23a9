"""Words of a command line as JSON values, text, and keyword arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcore.cli.arguments import ArgumentsError, method_arguments, word_value

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("42", 42),
        ("-1", -1),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ('{"a": 1}', {"a": 1}),
        ('"42"', "42"),
        ("sku-1", "sku-1"),
        ("", ""),
        ("two words", "two words"),
        # Not JSON, and so text, although Python or YAML would make something else of them.
        ("True", "True"),
        ("007", "007"),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"),
        ("1_000", "1_000"),
        ("'a'", "'a'"),
    ],
)
def test_a_word_is_json_or_text(word: str, value: object) -> None:
    found = word_value(word)
    assert found == value
    assert type(found) is type(value)


@given(JSON_VALUES)
def test_every_json_value_can_be_given(value: Any) -> None:
    assert method_arguments([json.dumps(value), f"name={json.dumps(value)}"]) == ([value], {"name": value})


@given(st.lists(st.text()))
def test_raw_words_arrive_as_they_stand(words: list[str]) -> None:
    assert method_arguments(words, raw=True) == (words, {})


@given(st.text())
def test_no_word_is_refused(word: str) -> None:
    args, kwargs = method_arguments([word])
    assert len(args) + len(kwargs) == 1


def test_deep_nesting_is_text_not_a_crash() -> None:
    word = "[" * 100_000
    assert word_value(word) == word


@pytest.mark.parametrize(
    ("word", "args", "kwargs"),
    [
        ("qty=2", [], {"qty": 2}),
        ("name=two words", [], {"name": "two words"}),
        ("a=b=c", [], {"a": "b=c"}),
        ("empty=", [], {"empty": ""}),
        ("größe=1", [], {"größe": 1}),
        # What stands before the = cannot be the name of an argument, so it is no keyword.
        ("http://x/?a=b", ["http://x/?a=b"], {}),
        ("2=3", ["2=3"], {}),
        ("=x", ["=x"], {}),
        ("a b=c", ["a b=c"], {}),
        ('"qty=2"', ["qty=2"], {}),
    ],
)
def test_keyword_arguments(word: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    assert method_arguments([word]) == (args, kwargs)


def test_kwargs_adds_to_the_words() -> None:
    assert method_arguments(["1", "a=2"], '{"b c": 3}') == ([1], {"a": 2, "b c": 3})


@pytest.mark.parametrize("kwargs", ["{", "[1]", "3", "null", '{"a": NaN}', ""])
def test_kwargs_must_be_an_object(kwargs: str) -> None:
    with pytest.raises(ArgumentsError, match="--kwargs"):
        method_arguments([], kwargs)


def test_a_keyword_given_twice_is_refused() -> None:
    with pytest.raises(ArgumentsError, match="'a' is given twice"):
        method_arguments(["a=1", "a=2"])
    with pytest.raises(ArgumentsError, match="'a' is given as a word and in --kwargs"):
        method_arguments(["a=1"], '{"a": 2}')


@pytest.mark.parametrize("word", ['{"a": 1', "[1, 2", '"open', "{a: 1}"])
def test_json_with_a_mistake_is_text_with_a_note(word: str) -> None:
    notes: list[str] = []
    assert method_arguments([word, f"k={word}"], note=notes.append) == ([word], {"k": word})
    assert len(notes) == 2
    assert "looks like JSON" in notes[0]


def test_plain_text_gets_no_note() -> None:
    notes: list[str] = []
    method_arguments(["sku-1", "42", "{}", "a=b"], note=notes.append)
    assert notes == []


@pytest.mark.parametrize("number", [1 << 64, -(1 << 63) - 1, 10**100])
def test_an_integer_that_cannot_be_sent_is_refused(number: int) -> None:
    """Before anything is sent; nor is it taken for text."""
    for words, kwargs in (
        ([str(number)], None),
        ([f"a={number}"], None),
        ([f"[{number}]"], None),
        ([], f'{{"a": {number}}}'),
    ):
        with pytest.raises(ArgumentsError, match="does not fit into 64 bits"):
            method_arguments(words, kwargs)
    assert method_arguments([f'"{number}"']) == ([str(number)], {})
