"""Checks of the options that users give: an error names the option, its value, and what it may be.

What has the wrong type is a TypeError, what is out of range a ValueError. Numbers of any kind will do, NumPy's too, and
become Python's own; but a bool is no number here: ``workers=True`` is a mistake.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, TypeVar

__all__ = ["choice", "flag", "instance", "number", "seconds", "whole"]

T = TypeVar("T")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return ``value``, a whole number from ``least`` to ``most``, as an int."""
    return int(_number(name, value, Integral, "a whole number", least, most))


def number(name: str, value: Any, least: float, most: float) -> float:
    """Return ``value``, a number from ``least`` to ``most``, as a float."""
    return float(_number(name, value, Real, "a number", least, most))


def seconds(
    name: str,
    value: Any,
    least: float = 0.0,
    most: float | None = None,
    *,
    above: bool = False,
    unless: str = "",
) -> float:
    """Return ``value``, so many seconds from ``least`` to ``most``, as a float.

    With ``above`` it must be above ``least``. ``unless`` says in the error what else the option may be.
    """
    return float(_number(name, value, Real, "a number of seconds", least, most, above=above, unless=unless))


def _number(
    name: str,
    value: Any,
    kind: type,
    what: str,
    least: float,
    most: float | None,
    *,
    above: bool = False,
    unless: str = "",
) -> Any:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if is_number:
        # Written so that what is not a number is out of every range.
        enough = value > least if above else value >= least
        if enough and (most is None or value <= most):
            return value
    limits = f"{'above' if above else 'at least'} {_text(least)}"
    if most is not None:
        limits += f" and at most {_text(most)}"
    error = ValueError if is_number else TypeError
    raise error(f"{name} is {value!r}; it must be {what}, {limits}{unless and f', or {unless}'}")


def _text(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:,.10g}"


def flag(name: str, value: Any) -> bool:
    """Return ``value``, True or False; a text such as ``"no"`` would be true."""
    return bool(instance(name, value, bool, "True or False"))


def choice(name: str, value: T, *choices: T) -> T:
    """Return ``value``, one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}")
    return value


def instance(name: str, value: T, kind: type, what: str) -> T:
    """Return ``value``, an instance of ``kind``; ``what`` says how to give one."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}; it must be {what}")
    return value
