"""What the commands print: JSON for machines, tables and colours for people, errors with a hint."""

from __future__ import annotations

import base64
import datetime
import json
import math
import shlex
import sys
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.json import JSON
from rich.table import Table
from rich.text import Text

from zmqcore import errors
from zmqcore.cli.outcome import hint_for
from zmqcore.matchmaker import Member

__all__ = [
    "Output",
    "error_summary",
    "json_text",
    "jsonable",
    "member_json",
    "note",
    "show_error",
]


_NO_TERMINAL_WIDTH = 240


def _key(key: Any) -> str:
    """Return a mapping's key as the text that a JSON object needs."""
    if isinstance(key, str):
        return key
    if isinstance(key, bytes | memoryview):
        return bytes(key).decode("utf-8", "backslashreplace")
    if key is None or isinstance(key, bool | int | float):
        return json.dumps(key)
    return str(key)


def jsonable(value: Any) -> Any:
    """Return *value*, as a codec may deliver it, in types that JSON has.

    Bytes become ``{"base64": …}``, dates ISO 8601 text, arrays nested lists, and NaN and the infinities,
    which JSON lacks, null. Keys become text.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | array):
        return [jsonable(item) for item in value]
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    if isinstance(value, Member):
        return member_json(value)
    if isinstance(value, memoryview) and value.format not in ("B", "b", "c"):
        return jsonable(value.tolist())
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if hasattr(value, "tolist"):  # a NumPy array, without importing NumPy to find out
        return jsonable(value.tolist())
    return str(value)


def member_json(member: Member) -> dict[str, Any]:
    """Return what is known of *member* as a JSON object."""
    return {
        "topic": member.topic.name,
        "server": member.topic.server,
        "exchange": member.topic.exchange,
        "endpoints": list(member.endpoints),
        "instance": member.instance,
        "host": member.host,
        "pid": member.pid,
        "capacity": member.capacity,
        "version": member.version,
    }


def json_text(value: Any) -> str:
    """Return *value* as one line of JSON that any parser reads."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False)


class Output:
    """Standard output in one of its two forms.

    ``machine`` is true if JSON is wanted: asked for with ``--json``, or because nobody is looking (no
    terminal).
    """

    def __init__(self, json_wanted: bool | None = None, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.machine = not self.stream.isatty() if json_wanted is None else json_wanted
        # Without a terminal nobody sees where a line ends: wide enough for what is searched by line.
        self.console = Console(
            file=self.stream, highlight=False, width=None if self.stream.isatty() else _NO_TERMINAL_WIDTH
        )

    def json(self, value: Any) -> None:
        """Print *value* as JSON: one line for machines, indented and coloured for people."""
        if self.machine:
            # Surrogates cannot be written to a UTF-8 stream; as an escape they are still valid JSON.
            text = json_text(value)
            try:
                text.encode(self.stream.encoding or "utf-8")
            except UnicodeEncodeError:
                text = json.dumps(jsonable(value), allow_nan=False)
            print(text, file=self.stream, flush=True)
        else:
            self.console.print(JSON.from_data(jsonable(value), indent=2), soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        """Print *text* for people; markup in it is not interpreted."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def table(self, title: str, columns: Mapping[str, str], rows: Iterable[list[str]]) -> None:
        """Print a table for people. *columns* maps each heading to its ``justify`` (left or right)."""
        rows = list(rows)
        table = Table(header_style="bold", box=None, pad_edge=False, show_header=any(map(str.strip, columns)))
        # No word is cut in two: where a row does not fit, the terminal goes on in the next line.
        for (heading, justify), *cells in zip(columns.items(), *rows, strict=True):
            longest = max(map(cell_len, " ".join([heading, *cells]).split()), default=0)
            table.add_column(heading, justify="right" if justify == "right" else "left", min_width=longest)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        # Not the table's own title, which would be wrapped to its width.
        self.line(title, style="bold underline")
        self.console.print(table, crop=False)


def _err(label: str, style: str, text: str) -> None:
    console = Console(file=sys.stderr, highlight=False)
    console.print(Text.assemble((f"{label}: ", style), text), soft_wrap=True)


def note(text: str) -> None:
    """Tell the user something on standard error that is not an error."""
    _err("note", "yellow", text)


def error_summary(error: BaseException) -> str:
    """Return *error* as one line: the remote exception if it is one, else our class and its message."""
    if isinstance(error, errors.RemoteError):
        return f"{error.type}: {error.message}"
    if isinstance(error, OSError) and not isinstance(error, errors.ZmqcoreError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return name + error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def show_error(error: BaseException, topic: str = "") -> None:
    """Print *error* to standard error, with the remote traceback if there is one, and what to do about it."""
    _err("error", "bold red", error_summary(error))
    if isinstance(error, errors.RemoteError) and error.traceback:
        print("\nRemote traceback:\n" + error.traceback.rstrip(), file=sys.stderr)
    hint = hint_for(error, shlex.quote(topic) if topic else "TOPIC")
    if hint:
        _err("hint", "cyan", hint)
