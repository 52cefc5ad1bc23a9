"""What one process owns: the ZeroMQ context, the pool of channels, the matchmaker, and its identity."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import resource
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import zmq

from zmqcore import endpoint as endpoints
from zmqcore import errors, options
from zmqcore._channel import Channel
from zmqcore._frame import pinned
from zmqcore._pool import ChannelPool
from zmqcore._port import Port
from zmqcore._socket import check_liveness, waiters
from zmqcore._window import Window
from zmqcore.attendant import Attendant
from zmqcore.codec import Codec, Limits, MsgpackCodec, get_codec
from zmqcore.matchmaker import Matchmaker, open_matchmaker
from zmqcore.redelivery import Redelivery
from zmqcore.resolver import addresses
from zmqcore.runtime_dir import runtime_directory

__all__ = ["Node", "Owned", "called_back", "default_matchmaker", "default_node"]

_logger = logging.getLogger("zmqcore.node")

#: Whether the code that runs now is a callback: it may run on a thread that is using a channel, which that thread can
#: close only afterwards.
called_back: ContextVar[bool] = ContextVar("zmqcore_called_back", default=False)

#: What a context and its first socket take (6 with libzmq 4.3.5), and a little more.
_CONTEXT_FDS = 8
#: What libzmq and a port take beside one for each endpoint: its socket, what wakes its receiver, the list of the
#: interfaces, without which binding to tcp aborts, and some for what others open meanwhile.
_PORT_FDS = 7
#: What a context may hold besides the pool's sockets: ports, and what users make by themselves. libzmq's own default.
_SOCKETS_BESIDES_POOL = 1023
#: How long, in seconds, closing waits for libzmq at least, even if its time is over: mostly a millisecond is enough.
_TERM_GRACE = 0.5
#: How a call ends that is under way when this process ends its own node.
_ENDS = (errors.Closed, errors.PeerLost, errors.Unreachable, errors.NoSuchTopic)
#: How long the end of the interpreter may wait for what is outstanding, in seconds.
_EXIT_TIMEOUT = 1.0
#: libzmq's thread lets go of a tcp port a moment after its socket was closed (milliseconds): how long to try to bind
#: one that seems to be in use, and how often, in seconds.
_UNBIND_PATIENCE, _UNBIND_PAUSE = 0.2, 0.005
#: How long, in seconds, this host's own name may take to be resolved.
_NAME_PATIENCE = 2.0


class Owned(Protocol):
    """What a node closes before it closes itself."""

    def runs_this_thread(self) -> bool:
        """Whether the calling thread has to go on before this can be closed down, as a handler of a server has."""

    def ask_to_stop(self, timeout: float) -> None:
        """Begin to stop, within ``timeout`` seconds; close_down() waits for that. Called by any thread but those."""

    def close_down(self, timeout: float) -> None:
        """Stop, within ``timeout`` seconds. Called by any thread but those."""


class Node:
    """The zmqcore part of a process. Most programs need only the default one: see :func:`default_node`.

    ``matchmaker``: a URL or a :class:`Matchmaker`. ``bind``: where servers listen unless they say so themselves;
    default ipc in the runtime directory and tcp on a free loopback port. ``advertise``: the name or address that
    others are told for a server that listens on every interface (``0.0.0.0``); default this host's name.
    ``max_sockets``, ``max_sockets_per_endpoint``, ``max_waiting``, and in seconds ``idle_ttl``, ``max_lifetime``,
    ``acquire_timeout``, ``connect_timeout`` and ``drain_timeout`` go to the :class:`ChannelPool`. ``liveness``:
    after how many seconds, 0.1 at least, a peer that is stopped or cut off is lost; one that is merely busy never is.
    ``context``: a ``zmq.Context`` of your own, left open. ``codec``: a name, or a codec. ``limits``: see
    :class:`Limits`. ``spin``: how long a wait polls without blocking before it blocks, in seconds; 0 switches that off.
    ``window_messages`` and ``window_bytes``: how much may be sent to one endpoint and not yet be acknowledged.

    Raises ValueError for an option that cannot be, TypeError for one of the wrong type, MatchmakerError for a URL that
    is none. Thread-safe. Nothing is opened until it is used. A forked child that uses it gets a fresh context, pool and
    matchmaker connection; the parent's are left alone.
    """

    def __init__(
        self,
        matchmaker: str | Matchmaker = "local://",
        *,
        bind: str | Sequence[str] | None = None,
        advertise: str | None = None,
        max_sockets: int | None = None,
        max_sockets_per_endpoint: int = 1,
        idle_ttl: float = 300.0,
        max_lifetime: float = 3600.0,
        acquire_timeout: float = 30.0,
        max_waiting: int = 10_000,
        connect_timeout: float = 2.0,
        drain_timeout: float = 5.0,
        liveness: float = 5.0,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        codec: str | Codec = "msgpack",
        limits: Limits | None = None,
        spin: float = 100e-6,
        window_messages: int = 4096,
        window_bytes: int = 1 << 26,
    ) -> None:
        self._identity = ""  # made when first asked for
        self.host = socket.gethostname()
        if limits is None:
            limits = Limits()
        self.limits = options.instance("limits", limits, Limits, "Limits, or None")
        self.codec = self._make_codec(codec)
        self.bind = None if bind is None else endpoints.in_option("bind", bind, bind=True)
        self.spin = options.seconds("spin", spin, 0, 1)
        self.liveness = check_liveness(liveness)
        window = Window(window_messages, window_bytes)
        self.window_messages, self.window_bytes = window.max_messages, window.max_bytes
        if advertise is not None:
            options.instance("advertise", advertise, str, "a host's name or address, or None")
        self._advertised_host = advertise
        if context is not None:
            options.instance("context", context, zmq.Context, "a zmq.Context, or None")
        if isinstance(matchmaker, str):
            matchmaker = open_matchmaker(matchmaker)
        self.matchmaker = options.instance("matchmaker", matchmaker, Matchmaker, "a URL, or a Matchmaker")
        self.attendant = Attendant()
        self.redelivery = Redelivery(patience=connect_timeout)
        self.connect_timeout = connect_timeout
        self.pool = ChannelPool(
            self._connect,
            max_sockets=max_sockets,
            max_sockets_per_endpoint=max_sockets_per_endpoint,
            idle_ttl=idle_ttl,
            max_lifetime=max_lifetime,
            acquire_timeout=acquire_timeout,
            max_waiting=max_waiting,
            connect_timeout=connect_timeout,
            drain_timeout=drain_timeout,
            resolve=endpoints.numeric,
            probe=endpoints.probe,
            maintenance=self.attendant.maintain,
        )
        self.redelivery.pool = self.pool
        self._lock = threading.RLock()
        self._given_context = context
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._owned: weakref.WeakSet[Owned] = weakref.WeakSet()
        self._closed = self._flushing = False
        self._ended: threading.Event | None = None  # made by close()
        _nodes.add(self)

    def _make_codec(self, codec: str | Codec) -> Codec:
        made = get_codec(codec) if isinstance(codec, str) else codec
        options.instance(
            "codec", made, Codec, "the name of a codec, or an object such as zmqcore.codec.Codec"
        )
        if type(made) is MsgpackCodec and made.limits != self.limits:
            made = made.with_limits(self.limits)
        return made

    @property
    def advertised_host(self) -> str:
        """The name or address that others are told for a server that listens on every interface.

        Unless it was given it is this host's name, or the loopback address if that cannot be resolved in time: looked
        up when first asked for, which takes a few seconds at most.
        """
        if self._advertised_host is None:
            self._advertised_host = _reachable_name(self.host)
        return self._advertised_host

    @property
    def identity(self) -> str:
        """32 hexadecimal digits that no other node has; a forked child's are others than its parent's."""
        with self._lock:
            if not self._identity:
                self._identity = uuid.uuid4().hex
            return self._identity

    @property
    def context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """The ZeroMQ context of this process; made when first asked for, and again in a forked child."""
        with self._lock:
            self._check()
            if self._context is None:
                self._context = self._given_context or _open_context(
                    self.pool.max_sockets + _SOCKETS_BESIDES_POOL
                )
            return self._context

    def _after_fork_in_child(self) -> None:
        # Kept, not freed: neither is the child's, and another thread of the parent may be inside.
        _inherited.append((self._context, self._given_context, self._owned, self.redelivery))
        self._lock = threading.RLock()
        self._context = self._given_context = None
        self._owned = weakref.WeakSet()
        self.redelivery = self.redelivery.of_child()
        self.redelivery.pool = self.pool
        self._flushing = False
        self._ended = None
        self._identity = ""

    def _check(self) -> None:
        if self._closed and not self._flushing:
            raise errors.Closed("the node is closed")

    def _connect(self, endpoint: str, address: str) -> Channel:
        return Channel(
            self.context,
            endpoint,
            address=address,
            window_messages=self.window_messages,
            window_bytes=self.window_bytes,
            max_bytes=self.limits.message_bytes,
            max_buffers=self.limits.buffers,
            liveness=self.liveness,
            spin=self.spin,
            attention=self.attendant.attend,
            undelivered=self.redelivery.take,
        )

    def open_port(self, bind: Sequence[str] | None = None) -> Port:
        """Return a new port bound to ``bind``, or to this node's default endpoints. The caller closes it.

        Raises InvalidEndpoint, or OSError saying which endpoint cannot be bound, or that there are too few file
        descriptors.
        """
        asked = bind if bind is not None else self.bind or ("ipc://*", "tcp://127.0.0.1:*")
        for endpoint in asked:
            endpoints.Endpoint.parse(endpoint, bind=True)
        # libzmq's own choice for ipc://* may be a path below the working directory.
        wanted = tuple(_fresh_ipc() if endpoint == "ipc://*" else endpoint for endpoint in asked)
        context = self.context
        _check_spare(_PORT_FDS + len(wanted), f"a server at {', '.join(wanted)}")
        give_up_at = time.monotonic() + _UNBIND_PATIENCE
        while True:
            try:
                return Port(
                    context,
                    wanted,
                    max_bytes=self.limits.message_bytes,
                    max_buffers=self.limits.buffers,
                    liveness=self.liveness,
                    spin=self.spin,
                )
            except zmq.ContextTerminated as exc:
                raise errors.Closed("the node was closed meanwhile") from exc
            except zmq.ZMQError as exc:
                if exc.errno != errno.EADDRINUSE or time.monotonic() >= give_up_at:
                    raise OSError(
                        exc.errno, f"cannot listen on {', '.join(wanted)}: {zmq.strerror(exc.errno or 0)}"
                    ) from exc
            time.sleep(_UNBIND_PAUSE)

    def own(self, thing: Owned) -> None:
        """Remember something, a server, that close() has to stop first; as long as it lives."""
        self._owned.add(thing)

    def stats(self) -> dict[str, Any]:
        """Return what the node holds and has counted, as a JSON-able dict.

        ``channels``, by endpoint: of those that are open now; with several to one endpoint, their sums.
        """
        channels: dict[str, dict[str, int]] = {}
        for channel in self.pool.channels():
            others = channels.get(channel.endpoint, {})
            counted = channel.stats()
            channels[channel.endpoint] = {name: n + others.get(name, 0) for name, n in counted.items()}
        return {
            "identity": self.identity,
            "host": self.host,
            "pid": os.getpid(),
            "matchmaker": self.matchmaker.url,
            "pool": self.pool.stats(),
            "accepted": self.redelivery.stats(),
            "channels": channels,
            "buffers": pinned(),
            "waiters": waiters(),
        }

    def close(self, timeout: float = 5.0) -> None:
        """Wait for what was accepted, stop this node's servers, then close pool, matchmaker and context.

        ``timeout``: for how many seconds at most, all in all; then what still runs or is outstanding is cut off. What
        is outstanding here ends with Closed; what was accepted and is not finished then is given up, and the log says
        how much that is. Twice is fine, also at the same time: the second one only waits.
        Called by a handler of one of its servers, by a callback of a future, or on an event loop on which one of its
        servers runs, it returns at once, and the node closes behind it.
        """
        with self._lock:
            first = not self._closed
            if first:
                self._closed = True
                self._ended = threading.Event()
            ended = self._ended
        if called_back.get() or any(thing.runs_this_thread() for thing in list(self._owned)):
            if first:
                threading.Thread(target=self._close, args=(timeout,), name="zmqcore-close").start()
        elif first:
            self._close(timeout)
        elif ended is not None:
            ended.wait(timeout)

    def _close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._lock:
            context = self._context
        owned = list(self._owned)

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        # Ctrl-C during one of these must not keep the next one open. The last one is done first.
        with contextlib.ExitStack() as stack:
            if self._ended is not None:
                stack.callback(self._ended.set)
            if context is not None and context is not self._given_context:
                stack.callback(lambda: _terminate(context, max(left(), _TERM_GRACE)))
            stack.callback(self.matchmaker.close)
            stack.callback(lambda: self.attendant.close(max(left(), _TERM_GRACE)))
            stack.callback(lambda: self.redelivery.close(max(left(), _TERM_GRACE)))
            stack.callback(lambda: self.pool.close(left()))
            for thing in owned:
                stack.callback(lambda thing: thing.close_down(left()), thing)
            # All at the same time, or the last one would have no time left.
            for thing in owned:
                stack.callback(lambda thing: thing.ask_to_stop(left()), thing)
            # First of all: its own servers may be where that goes.
            stack.callback(lambda: self._flush(left()))

    def _flush(self, timeout: float) -> None:
        """Wait for what was accepted, and let it be sent again if need be."""
        self._flushing = True
        try:
            self.redelivery.flush(timeout)
        finally:
            self._flushing = False

    def __del__(self) -> None:
        # Dropped without close(). The context warns of that by itself, and goes with its last socket.
        if not getattr(self, "_closed", True):
            self._closed = True
            self.pool.close(0.0)
            self.redelivery.close()
            self.attendant.close()
            self.matchmaker.close()

    def __reduce__(self) -> NoReturn:
        # Clients and servers hold their node: this is what says no for them, too.
        raise TypeError(
            "a Node, and a Client or Server with it, belongs to its process and cannot be pickled:"
            " make one in the other process, or fork"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<Node {self.identity[:8]} {self.matchmaker.url} {self.pool!r}{state}>"


def _open_context(max_sockets: int) -> zmq.Context[zmq.Socket[bytes]]:
    """Return a new context for at most ``max_sockets`` sockets, its first one made.

    libzmq aborts the process if it gets no descriptor for either. Here one can still say so: raises PoolExhausted.
    """
    try:
        _check_spare(_CONTEXT_FDS, "a ZeroMQ context")
    except OSError as exc:
        raise errors.PoolExhausted(exc.strerror) from exc
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    # The default of 1023 would be a second, hidden budget. The most that libzmq can do would cost a megabyte, and a
    # third of a millisecond with the first socket.
    context.set(zmq.MAX_SOCKETS, min(max_sockets, context.get(zmq.SOCKET_LIMIT)))
    return context


def _check_spare(wanted: int, what: str) -> None:
    """Raise OSError if this process cannot open ``wanted`` more file descriptors for ``what``.

    Where libzmq gets none it may abort the process. Another thread may take them a moment later: this makes it
    unlikely, not impossible.
    """
    spare: list[int] = []
    try:
        spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        while len(spare) < wanted:
            spare.append(os.dup(spare[0]))
    except OSError as exc:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise OSError(
            exc.errno,
            f"{what} needs {wanted} file descriptors, and {len(spare)} of the {limit} that this process may have are"
            f" left ({exc.strerror}). Raise the limit (ulimit -n); see zmqcore doctor",
        ) from exc
    finally:
        for fd in spare:
            os.close(fd)


def _terminate(context: zmq.Context[zmq.Socket[bytes]], patience: float) -> None:
    """End ``context``. It ends with its last socket: if that takes longer than ``patience`` seconds, leave it to that.

    So do replies that somebody does not read, for 2 s. Sockets that nobody closes are worth a warning.
    """
    thread = threading.Thread(target=context.term, name="zmqcore-term", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # No thread can be started, at the end of the interpreter for example.
        context.term()
        return
    thread.join(patience)
    still_open = sum(not made.closed for made in list(context._sockets))  # nothing public tells
    if thread.is_alive() and still_open:
        _logger.warning(
            "%d sockets of the node's ZeroMQ context are still open after the node was closed; it stays until they are"
            " closed",
            still_open,
        )


def _reachable_name(host: str) -> str:
    """Return ``host`` if other hosts may know it by that name, else the loopback address."""
    try:
        addresses(host, _NAME_PATIENCE)
    except OSError as exc:
        _logger.warning(
            "servers that listen on every interface are announced at 127.0.0.1, where only this host reaches them: the"
            " name of this host, %s, cannot be resolved (%s). Node(advertise=...) names another one",
            host,
            exc.strerror or exc,
        )
        return "127.0.0.1"
    return host


def _fresh_ipc() -> str:
    return f"ipc://{runtime_directory() / f'{os.getpid()}-{uuid.uuid4().hex[:8]}.sock'}"


_nodes: weakref.WeakSet[Node] = weakref.WeakSet()
_inherited: list[object] = []
_default: Node | None = None
_default_lock = threading.Lock()


def default_node() -> Node:
    """Return the node that clients and servers of this process use unless they are given another one.

    Made when first asked for, with the local matchmaker or the one that ``ZMQCORE_MATCHMAKER`` names; made
    anew after it has been closed.
    """
    global _default
    with _default_lock:
        if _default is None or _default._closed:
            _default = Node(default_matchmaker())
        return _default


def default_matchmaker() -> str:
    """Return the URL of the default node's matchmaker."""
    return os.environ.get("ZMQCORE_MATCHMAKER") or "local://"


def _after_fork_in_child() -> None:
    global _default_lock
    _default_lock = threading.Lock()  # another thread of the parent may have held it
    for node in list(_nodes):
        node._after_fork_in_child()


def _close_all() -> None:
    """At exit: a context that is still open would wait for its sockets, and members would linger."""
    nodes = list(_nodes)
    if nodes:
        _hush()
    for node in nodes:
        node.close(_EXIT_TIMEOUT)


def _hush() -> None:
    """Only daemon threads are left, which nobody waits for: what ends their calls now is nothing to report."""
    report = threading.excepthook

    def unless_ours(args: threading.ExceptHookArgs, /) -> None:
        if not isinstance(args.exc_value, _ENDS):
            report(args)

    threading.excepthook = unless_ours


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_all)
