"""Where a message goes: an exchange, a name and possibly one server."""

from __future__ import annotations

import re
from typing import Any, Final, NoReturn, final
from urllib.parse import unquote

from zmqcore.errors import InvalidTopic

__all__ = ["WIRE_LIMIT_BYTES", "Topic"]

#: The envelope has 16 bits for the length of a topic.
WIRE_LIMIT_BYTES: Final = 65_535

_BROKEN_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")


def _escape(part: str) -> str:
    # "%" first: the other two bring new ones in.
    return part.replace("%", "%25").replace("/", "%2F").replace("@", "%40")


def _unescape(part: str, text: str) -> str:
    if _BROKEN_ESCAPE.search(part):
        raise InvalidTopic(f"topic {text!r}: two hex digits must follow a '%'; write a plain '%' as %25")
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError as exc:
        raise InvalidTopic(f"topic {text!r}: the escapes in {part!r} are not UTF-8") from exc


@final
class Topic:
    """An immutable, hashable address: ``name`` in ``exchange``, at any server or at one.

    Every part is opaque text: ``@ . : / ~ %``, spaces and any other unicode mean nothing and are kept. The
    one canonical text is ``[exchange/]name[@server]`` with ``%``, ``/`` and ``@`` in the parts escaped as
    ``%25``, ``%2F`` and ``%40``; ``str()`` gives it and :meth:`parse` reads it back. ``wire`` is that text in
    UTF-8, at most 65,535 bytes, computed once.

    Raises :class:`~zmqcore.errors.InvalidTopic` (a ``ValueError``) for a part that is not a string or holds a
    lone surrogate, an empty name, an empty server (leave it ``None``), and a wire form over the limit.
    """

    __slots__ = ("_hash", "exchange", "name", "server", "wire")

    name: str
    server: str | None
    exchange: str
    wire: bytes
    _hash: int

    def __init__(self, name: str, server: str | None = None, exchange: str = "") -> None:
        parts: tuple[object, ...] = (name, "" if server is None else server, exchange)
        for part in parts:
            if not isinstance(part, str):
                raise InvalidTopic(f"a topic's parts must be str, not {type(part).__name__}: {part!r}")
        if not name:
            raise InvalidTopic("a topic needs a name; this one is empty")
        if server == "":
            raise InvalidTopic(f"topic {name!r}: the server is empty; leave it None to mean every server")
        text = _escape(name)
        if exchange:
            text = f"{_escape(exchange)}/{text}"
        if server is not None:
            text = f"{text}@{_escape(server)}"
        try:
            wire = text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidTopic(f"topic {text!r} has no UTF-8 form: {exc.reason}") from exc
        if len(wire) > WIRE_LIMIT_BYTES:
            raise InvalidTopic(
                f"topic {text[:60]!r}… is {len(wire):,} bytes long on the wire;"
                f" the limit is {WIRE_LIMIT_BYTES:,}"
            )
        fix = object.__setattr__
        fix(self, "name", name)
        fix(self, "server", server)
        fix(self, "exchange", exchange)
        fix(self, "wire", wire)
        fix(self, "_hash", hash(wire))

    @classmethod
    def of(cls, value: str | Topic) -> Topic:
        """Return ``value`` if it is a topic; a plain string is a topic's *name* and is not parsed."""
        return value if isinstance(value, Topic) else cls(value)

    @classmethod
    def parse(cls, text: str) -> Topic:
        """Read the canonical text back: ``Topic.parse(str(topic)) == topic`` for every topic.

        Other characters may be escaped as well, and hex digits may be in lower case. Raises
        :class:`~zmqcore.errors.InvalidTopic` for a second bare ``/`` or ``@``, an empty part, or a broken
        escape.
        """
        if not isinstance(text, str):
            raise InvalidTopic(f"a topic is parsed from a str, not from {type(text).__name__}: {text!r}")
        rest, at, server = text.partition("@")
        head, slash, tail = rest.partition("/")
        exchange, name = (head, tail) if slash else ("", head)
        if "@" in server or "/" in server or "/" in name:
            raise InvalidTopic(
                f"topic {text!r} is not of the form [exchange/]name[@server];"
                " inside a part write '@' as %40 and '/' as %2F"
            )
        if slash and not exchange:
            raise InvalidTopic(f"topic {text!r}: nothing stands before the '/'")
        if at and not server:
            raise InvalidTopic(f"topic {text!r}: nothing stands after the '@'")
        return cls(_unescape(name, text), _unescape(server, text) if at else None, _unescape(exchange, text))

    @property
    def group(self) -> Topic:
        """The same topic without the server: what every server of it has in common."""
        return self if self.server is None else Topic(self.name, None, self.exchange)

    def covers(self, other: Topic) -> bool:
        """Whether a message to this topic may go to ``other``: without a server, to any server of the same
        exchange and name; with one, to that server only."""
        return (
            self.name == other.name
            and self.exchange == other.exchange
            and (self.server is None or self.server == other.server)
        )

    def __str__(self) -> str:
        return self.wire.decode()

    def __repr__(self) -> str:
        server = f", server={self.server!r}" if self.server is not None else ""
        exchange = f", exchange={self.exchange!r}" if self.exchange else ""
        return f"Topic({self.name!r}{server}{exchange})"

    # The wire form is canonical, so it alone decides.
    def __eq__(self, other: object) -> bool:
        return self.wire == other.wire if isinstance(other, Topic) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __lt__(self, other: object) -> bool:
        return self.wire < other.wire if isinstance(other, Topic) else NotImplemented

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Topic is immutable; make a new one to change {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Topic is immutable; {name!r} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return Topic, (self.name, self.server, self.exchange)
