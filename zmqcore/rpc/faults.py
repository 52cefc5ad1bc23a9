"""Errors across the wire: the body of an "error" envelope, and the exception it becomes at the caller.

The body is a map: ``code`` (a key of the table below), ``type`` (the remote exception's qualified name),
``message``, and ``traceback`` (text, may be empty). A port that refuses a message before any codec is involved
sends codec 0 and the plain text ``Name: message``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from zmqcore import errors
from zmqcore._frame import Envelope
from zmqcore._pending import Pending
from zmqcore.codec import Codec
from zmqcore.rpc.stream import Read, Stream

__all__ = ["describe", "outcome", "raised_by", "to_exception"]

#: What a server says before or instead of running the handler. "raised" is what the handler itself raised.
_CODES: dict[str, type[errors.ZmqcoreError]] = {
    "no_such_topic": errors.NoSuchTopic,
    "no_such_method": errors.NoSuchMethod,
    "bad_arguments": errors.BadArguments,
    "expired": errors.DeadlineExceeded,
    "overloaded": errors.Overloaded,
    "too_large": errors.PayloadTooLarge,
    "protocol": errors.ProtocolError,
    "closed": errors.Closed,
    "internal": errors.InternalError,
}

_PORT_REFUSALS = {"PayloadTooLarge": errors.PayloadTooLarge, "ProtocolError": errors.ProtocolError}


def describe(code: str, message: str) -> dict[str, str]:
    """Return the body for an error of the server itself."""
    return {"code": code, "type": "", "message": message, "traceback": ""}


def raised_by(exc: BaseException, *, skip: int = 1) -> dict[str, str]:
    """Return the body for what a handler has raised; the traceback leaves our own ``skip`` frames out."""
    trace = exc.__traceback__
    for _ in range(skip):
        if trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
    message = f"{exc.type}: {exc.message}" if isinstance(exc, errors.RemoteError) else _text_of(exc)
    cls = type(exc)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    text = "".join(traceback.format_exception(cls, exc, trace))
    # A surrogate in a message would make the codec refuse the error itself.
    return {key: value.encode("utf-8", "backslashreplace").decode() for key, value in {
        "code": "raised", "type": name, "message": message, "traceback": text,
    }.items()}  # fmt: skip


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException:  # noqa: BLE001 - the exception is the user's, and so is its __str__
        return f"<str() of this {type(exc).__name__} failed>"


def outcome(
    envelope: Envelope, codec: Codec, endpoint: str, open_stream: Callable[[Pending, Read], Any] = Stream
) -> Any:
    """Return the result in a "reply" from ``endpoint``, or raise what another envelope stands for.

    A stream is returned as what ``open_stream`` makes of it, and an "item" of one as its value.
    """
    opened = envelope.open(codec.id, codec)
    if opened is not None:
        return opened[0]
    if envelope.kind == "error" and envelope.codec in (0, codec.id):
        raise to_exception(envelope, codec, endpoint)
    if envelope.stream is not None:
        return open_stream(envelope.stream, partial(outcome, codec=codec, endpoint=endpoint))
    raise errors.ProtocolError(
        f"{endpoint} answered by a {envelope.kind!r} of codec {envelope.codec}; expected codec {codec.id}"
    )


def to_exception(envelope: Envelope, codec: Codec, endpoint: str) -> errors.ZmqcoreError:
    """Return the exception that an "error" envelope from ``endpoint`` stands for."""
    if envelope.codec == 0:
        name, _, message = bytes(envelope.body).decode("utf-8", "replace").partition(": ")
        if name == "Draining":
            return errors.PeerLost(f"{endpoint}: {message}; not executed", executed_possible=False)
        return _PORT_REFUSALS.get(name, errors.ProtocolError)(f"{endpoint}: {message}")
    body: Any = codec.decode(envelope, envelope.buffers or ())
    if not isinstance(body, dict):
        return errors.ProtocolError(f"{endpoint} sent an error that is not a map but {type(body).__name__}")
    code, kind, message, trace = (str(body.get(key, "")) for key in ("code", "type", "message", "traceback"))
    if code in _CODES:
        return _CODES[code](f"{endpoint}: {message}")
    return errors.RemoteError(kind, message, trace)
