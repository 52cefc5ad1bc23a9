"""Words of a command line as the arguments of a remote method."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

__all__ = ["ArgumentsError", "method_arguments", "word_value"]

_KEYWORD = re.compile(r"([^\W\d]\w*)=(.*)", re.DOTALL)


class ArgumentsError(ValueError):
    """The words do not make a list of arguments; the text says which one and what to write instead."""


def _no_constant(name: str) -> NoReturn:
    # Python's parser takes NaN and Infinity, which are not JSON; as words they are more likely text.
    raise ValueError(f"{name} is not JSON")


def _int64(digits: str) -> int:
    value = int(digits)
    if not -(1 << 63) <= value < 1 << 64:
        raise ArgumentsError(
            f"{digits[:40]} does not fit into 64 bits; as text it is written '\"{digits[:40]}\"'"
        )
    return value


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant, parse_int=_int64)


def word_value(word: str, note: Callable[[str], None] | None = None) -> Any:
    """Return the JSON value that *word* spells, or *word* itself if it is not JSON.

    *note* is called with a sentence if the word looks like an object, array or string that has a mistake in
    it: it is text all the same, but the user probably meant otherwise. Raises ArgumentsError for an integer that is
    too large to be sent.
    """
    try:
        return _parse(word)
    except ArgumentsError:
        raise
    except (ValueError, RecursionError) as exc:
        if note is not None and word[:1] in ("{", "[", '"'):
            note(f"{word[:60]!r} looks like JSON but is not ({exc}); it is sent as text")
        return word


def method_arguments(
    words: Iterable[str],
    kwargs: str | None = None,
    *,
    raw: bool = False,
    note: Callable[[str], None] | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """Turn *words* into positional and keyword arguments.

    A word ``name=value`` is a keyword argument if what stands before the first ``=`` is a Python identifier,
    any other word is a positional one; both values are read by :func:`word_value`. *kwargs* is a JSON object
    with further keyword arguments. With *raw* every word is a positional text as it stands.

    Raises:
        ArgumentsError: a keyword is given twice, an integer is too large, or *kwargs* is not a JSON object.
    """
    args: list[Any] = []
    named: dict[str, Any] = {}
    for word in words:
        if raw:
            args.append(word)
            continue
        keyword = _KEYWORD.fullmatch(word)
        if keyword is None:
            args.append(word_value(word, note))
            continue
        name, text = keyword.groups()
        if name in named:
            raise ArgumentsError(f"the keyword argument {name!r} is given twice")
        named[name] = word_value(text, note)
    for name, value in ({} if kwargs is None else _object(kwargs)).items():
        if name in named:
            raise ArgumentsError(f"the keyword argument {name!r} is given as a word and in --kwargs")
        named[name] = value
    return args, named


def _object(text: str) -> dict[str, Any]:
    try:
        value = _parse(text)
    except ArgumentsError:
        raise
    except (ValueError, RecursionError) as exc:
        raise ArgumentsError(f"--kwargs is not JSON ({exc}); an example: --kwargs '{{\"qty\": 2}}'") from exc
    if not isinstance(value, dict):
        raise ArgumentsError(
            f"--kwargs must be a JSON object such as '{{\"qty\": 2}}', not {json.dumps(value)[:60]}"
        )
    return value
