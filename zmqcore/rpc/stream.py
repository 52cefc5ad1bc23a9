"""At the client: an answer that comes in items, as many at a time as are granted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, Self

from zmqcore._frame import Envelope
from zmqcore._pending import Pending
from zmqcore.rpc import deadline as deadlines

__all__ = ["AsyncStream", "Read", "Stream"]

#: After so many items as many more are granted. Half of what the server may send at first.
_GRANT = 16

#: What becomes of an envelope: an item's value, None at the end, or an exception.
Read = Callable[[Envelope], Any]

_inherited = deadlines.current.get


class _Stream:
    """What both have in common: what is to come, and how much has been taken of it."""

    def __init__(self, pending: Pending, read: Read) -> None:
        #: How long to wait for each item, in seconds; None for ever. At first as long as for the call.
        self.timeout = pending.timeout
        self._pending: Pending | None = pending
        self._read = read
        self._taken = 0

    @property
    def closed(self) -> bool:
        """Whether nothing more will come: it has ended, failed, or been closed."""
        return self._pending is None

    def _left(self) -> float | None:
        """How long to wait for the next item: no longer than what is left for the request that is being handled."""
        return (
            self.timeout if _inherited() is None else deadlines.seconds_until(deadlines.tighten(self.timeout))
        )

    def _open(self, pending: Pending, envelope: Envelope) -> Any:
        """Return the value of an item; raise what else ``envelope`` stands for, and StopIteration at the end."""
        if envelope.kind != "item":
            self._pending = None
            self._read(envelope)
            raise StopIteration
        self._taken += 1
        if self._taken == _GRANT:
            self._taken = 0
            pending.grant(_GRANT)
            self._told()
        return self._read(envelope)

    def _end(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.close()
            self._told()

    def _told(self) -> None:
        """Something has been sent to the server."""

    def __del__(self) -> None:
        self._end()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self.closed else 'open'}>"


class Stream(_Stream, Iterator[Any]):
    """What ``Client.call`` returns for a handler that is a generator: an iterator over what that yields.

    The server sends no more than 32 items ahead of what has been taken. Waiting for an item drives the channel, as
    call() does; after ``timeout`` seconds DeadlineExceeded is raised. What the generator raises is raised here, behind
    the items before; PeerLost where the server is lost. Each of these ends it.

    close(), the end of a ``with`` block, or letting go of it ends the generator early. One thread at a time may use it.
    """

    def __next__(self) -> Any:
        pending = self._pending
        if pending is None:
            raise StopIteration
        try:
            return self._open(pending, pending.next_item(self._left()))
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Have no more of it; the server's generator is closed. Twice is fine."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(_Stream, AsyncIterator[Any]):
    """What ``AsyncClient.call`` returns for a handler that is a generator; see :class:`Stream`.

    Cancelling who waits for an item ends it. It belongs to the loop on which it was made; one task at a time.
    """

    def __init__(
        self,
        pending: Pending,
        read: Read,
        wait: Callable[[float | None], Awaitable[None]],
        told: Callable[[], None],
    ) -> None:
        super().__init__(pending, read)
        self._wait = wait
        self._told = told  # type: ignore[method-assign]

    async def __anext__(self) -> Any:
        pending = self._pending
        if pending is None:
            raise StopAsyncIteration
        try:
            left = self._left()
            while (envelope := pending.take_item(left)) is None:
                await self._wait(left)
            return self._open(pending, envelope)
        except StopIteration:
            raise StopAsyncIteration from None
        except BaseException:
            self._end()
            raise

    async def aclose(self) -> None:
        """Have no more of it; the server's generator is closed. Twice is fine."""
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
