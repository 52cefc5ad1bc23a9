"""Every exception that zmqcore raises, in one tree under :class:`ZmqcoreError`.

What the user did wrong, what the peer did wrong, what the network did, and what is a fault of zmqcore
(:class:`InternalError`) are different classes. What is also a timeout, a connection error or a value error is
one in Python's own tree too, so that ``except TimeoutError`` works without importing anything from here.
"""

from __future__ import annotations

__all__ = [
    "BadArguments",
    "Closed",
    "DeadlineExceeded",
    "InternalError",
    "InvalidEndpoint",
    "InvalidTopic",
    "MatchmakerError",
    "NoSuchMethod",
    "NoSuchTopic",
    "Overloaded",
    "PayloadTooLarge",
    "PeerLost",
    "PoolExhausted",
    "ProtocolError",
    "RemoteError",
    "Unreachable",
    "ZmqcoreError",
]


class ZmqcoreError(Exception):
    """The base of every exception of zmqcore."""


# -- what the caller did wrong ---------------------------------------------------------------------------


class InvalidTopic(ZmqcoreError, ValueError):
    """A topic has no name, or is longer than the envelope can carry."""


class InvalidEndpoint(ZmqcoreError, ValueError):
    """An endpoint is not of the form ``tcp://host:port``, ``ipc://path`` or ``inproc://name``."""


class BadArguments(ZmqcoreError, TypeError):
    """The arguments do not fit the method's signature, or the codec has no form for one of them."""


class NoSuchMethod(ZmqcoreError, AttributeError):
    """The server serves the topic, but has no such public method."""


class PayloadTooLarge(ZmqcoreError, ValueError):
    """A message is over one of the limits on size, depth, element count or parts.

    Raised at the sender before anything has left, or by the receiver for a peer that does not keep the limits.
    """


class Closed(ZmqcoreError, RuntimeError):
    """The node, pool, channel, server or client was closed before or while it was used."""


# -- what the peer, or the way to it, did -----------------------------------------------------------------


class DeadlineExceeded(ZmqcoreError, TimeoutError):
    """The time of an operation ran out: nobody answered in time, or the work had expired before it was run.

    ``sent`` is false if nothing had been sent yet to the server whose turn it was.
    """

    sent = True


class NoSuchTopic(ZmqcoreError, LookupError):
    """No member serves the topic, as far as the matchmaker knows."""


class Unreachable(ZmqcoreError, ConnectionError):
    """No connection could be made; the message was certainly not executed."""


class PeerLost(ZmqcoreError, ConnectionError):
    """The connection broke, or the peer stopped answering, after the request had been handed over.

    ``executed_possible`` is false only if it is certain that the request was not executed.
    """

    def __init__(self, message: str = "", executed_possible: bool = True) -> None:
        super().__init__(message)
        self.executed_possible = executed_possible


class Overloaded(ZmqcoreError):
    """The peer, or the window towards it, takes no more work now; the request was not executed."""


class PoolExhausted(ZmqcoreError, TimeoutError):
    """Every socket of the budget stayed in use until the deadline."""


class ProtocolError(ZmqcoreError, ValueError):
    """Bytes that are not a valid envelope or body, or a peer that speaks another version."""


class RemoteError(ZmqcoreError):
    """The handler raised. ``str()`` shows the remote traceback below the message.

    ``type`` is the remote exception's qualified name, ``message`` its text, ``traceback`` the remote traceback
    as text (empty if the server does not send it).
    """

    def __init__(self, type: str, message: str, traceback: str = "") -> None:
        super().__init__(type, message, traceback)
        self.type = type
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        text = f"{self.type}: {self.message}"
        if self.traceback:
            text += "\n\nRemote traceback:\n" + self.traceback.rstrip()
        return text


# -- the registry, and our own faults ---------------------------------------------------------------------


class MatchmakerError(ZmqcoreError):
    """The registry of members cannot be read or written, or is not what it should be."""


class InternalError(ZmqcoreError):
    """A fault of zmqcore itself. Please report it with the traceback and the output of ``zmqcore doctor``."""
