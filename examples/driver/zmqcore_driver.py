"""The bus's driver on zmqcore's core: a ChannelPool to send, a Port to receive, envelopes in between. No RPC layer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import zmq
from bus import Failed, Message, Unanswered, Undelivered

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._frame import Envelope
from zmqcore._pool import ChannelPool
from zmqcore._port import Port
from zmqcore._request import Request
from zmqcore.attendant import Attendant
from zmqcore.endpoint import numeric, probe

#: The number of our body's encoding on the wire. 0 is "none", which ports use for their own refusals.
JSON = 200
#: How long a consumer that stops still listens after the last message, and takes at most, in seconds.
QUIET, DRAIN = 0.1, 10.0


class ZmqcoreDriver:
    """Thread-safe, but for consume(), which belongs to one thread."""

    def __init__(self, max_sockets: int | None = None) -> None:
        self._context = zmq.Context()
        self._attendant = Attendant()
        self._pool = ChannelPool(
            self._connect,
            max_sockets=max_sockets,
            resolve=numeric,  # looks up host names: libzmq would let everybody else wait for that
            probe=probe,  # says "connection refused" instead of waiting for the timeout
            maintenance=self._attendant.maintain,  # idle channels expire without traffic
        )
        self._port: Port | None = None
        self._stopping = False

    def _connect(self, endpoint: str, address: str) -> Channel:
        return Channel(self._context, endpoint, address=address, attention=self._attendant.attend)

    # -- sending -----------------------------------------------------------------------------------------

    def publish(self, address: str, queue: str, message: Message, timeout: float) -> None:
        """Return once a live connection has the message."""
        try:
            self._pool.send(address, "cast", queue.encode(), "", *_packed(message), timeout)
        except (errors.Unreachable, errors.Overloaded, errors.PoolExhausted, errors.PeerLost) as exc:
            raise Undelivered(str(exc)) from exc

    def ask(self, address: str, queue: str, message: Message, timeout: float) -> Message:
        """Return the answer, or raise by the timeout."""
        try:
            envelope = self._pool.call(address, queue.encode(), "", *_packed(message), timeout)
        except (errors.Unreachable, errors.Overloaded, errors.PoolExhausted) as exc:
            raise Undelivered(str(exc)) from exc
        except errors.DeadlineExceeded as exc:
            raise Unanswered(str(exc)) from exc
        except errors.PeerLost as exc:
            raise (Unanswered if exc.executed_possible else Undelivered)(str(exc)) from exc
        if envelope.kind == "reply":
            return _unpacked(envelope)
        text = bytes(envelope.body).decode()
        if envelope.codec != JSON:
            raise Undelivered(f"{address}: {text}")  # the port's own word: it is about to stop, for example
        raise Failed(text)

    # -- receiving ---------------------------------------------------------------------------------------

    def consume(self, address: str, queue: str) -> Iterator[Arrived]:
        """Listen and yield what comes for ``queue`` until stop_consuming(); then finish what has come."""
        self._port = port = Port(self._context, [address])
        try:
            until = last = float("inf")
            while (now := time.monotonic()) < until:
                requests = port.receive(timeout=None if until == float("inf") else 0.01)
                for request in requests:
                    yield from _for_queue(request, queue)
                if self._stopping and until == float("inf"):
                    # Everybody hears it and sends elsewhere. What is on the way already is still served.
                    port.goodbye()
                    until, last = now + DRAIN, now
                elif requests:
                    last = now
                elif now - last > QUIET and port.settled():
                    break
        finally:
            port.close(linger=2.0)

    def stop_consuming(self) -> None:
        """Have consume() come to its end. From any thread, but not from a signal handler: a lock may be held there."""
        self._stopping = True
        if self._port is not None:
            self._port.wake()

    def close(self) -> None:
        """Give back every socket. What has been published is acknowledged first, or five seconds are over."""
        self._pool.close(timeout=5.0)
        self._attendant.close()
        self._context.term()


class Arrived:
    """One message that has come."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.message = _unpacked(request.envelope)

    def answer(self, message: Message) -> None:
        if self._request.wants_reply:
            body, buffers, metadata, codec = _packed(message)
            self._request.reply(body, buffers, codec, metadata)

    def fail(self, text: str) -> None:
        if self._request.wants_reply:
            self._request.error(text.encode(), None, JSON)

    def done(self) -> None:
        # Only needed for messages whose sender keeps them until they are finished; harmless for others.
        self._request.finish()


def _for_queue(request: Request, queue: str) -> Iterator[Arrived]:
    """Yield ``request`` if it is ours and somebody still waits for it."""
    if request.expired:
        request.finish()
    elif request.topic != queue.encode() or request.envelope.codec != JSON:
        if request.wants_reply:
            request.error(f"{queue!r} is what is consumed here".encode())
        request.finish()
    else:
        yield Arrived(request)


def _packed(message: Message) -> tuple[bytes, list[object] | None, bytes, int]:
    """Return body, buffers, metadata and codec, in the order in which the pool takes them."""
    return (
        json.dumps(message.payload).encode(),
        message.attachments or None,  # sent from where they are
        json.dumps(message.headers).encode(),
        JSON,
    )


def _unpacked(envelope: Envelope) -> Message:
    # The body is read from the received message; attachments are views of it.
    headers = json.loads(envelope.metadata or b"{}")
    return Message(json.loads(bytes(envelope.body)), headers, list(envelope.buffers or ()))
