"""Several processes that serve the same under one topic; one that dies is started again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zmqcore import errors, options
from zmqcore.codec import Limits
from zmqcore.endpoint import Endpoint, in_option
from zmqcore.matchmaker import open_matchmaker
from zmqcore.matchmaker.session import check_ttl
from zmqcore.node import Node
from zmqcore.rpc import sigterm
from zmqcore.rpc.backlog import OnFull, check_queue, check_workers
from zmqcore.rpc.forked import renew_in_child
from zmqcore.rpc.target import NotServable
from zmqcore.topic import Topic

__all__ = ["ServerProcesses", "restart_delay"]

_logger = logging.getLogger("zmqcore.server")

#: A process that has served for so long, in seconds, has not died because of how it was started.
_STABLE = 10.0
_DELAY, _DELAY_MAX = 0.1, 10.0
#: How often, in seconds, to look at processes that say nothing.
_LOOK_INTERVAL = 0.5
#: How long a process may take to end after its time to stop is over, in seconds, until it is killed.
_GRACE = 1.0


def restart_delay(failures: int) -> float:
    """Return after how many seconds a process is started again that has died ``failures`` times soon after a start."""
    return min(_DELAY * 2.0 ** min(failures, 16), _DELAY_MAX)


def _check_bind(bind: Any) -> list[str] | None:
    if bind is None:
        return None
    texts = in_option("bind", bind, bind=True)
    for text in texts:
        endpoint = Endpoint.parse(text, bind=True)
        if endpoint.port is not None or (endpoint.transport != "tcp" and not endpoint.is_wildcard):
            raise errors.InvalidEndpoint(
                f"processes cannot share {text}: leave the choice to each of them, as in tcp://HOST:* or ipc://*"
            )
    return list(texts)


def _check_node(node: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options of a node as they go to another process, in JSON. Raises what Node does."""
    given = dict(
        options.instance("node", {} if node is None else node, Mapping, "a mapping of a Node's options")
    )
    for name in ("matchmaker", "bind"):
        if name in given:
            raise ValueError(f"node has {name}, which is an option of ServerProcesses itself")
    if given:
        Node("memory://", **given).close()
    plain: dict[str, Any] = json.loads(json.dumps(given, default=_as_json))
    return plain


def _as_json(value: Any) -> Any:
    if isinstance(value, Limits):
        return dataclasses.asdict(value)
    if isinstance(value, Real):  # of another kind than Python's own, such as NumPy's
        return int(value) if isinstance(value, Integral) else float(value)
    raise TypeError(f"node has {value!r}, which cannot be given to another process")


def _check_level(level: int | str | None) -> int | None:
    if level is None:
        return None
    if isinstance(level, str):
        names = logging.getLevelNamesMapping()
        return names[options.choice("log_level", level, *names)]
    return options.whole("log_level", level, 0)


def _check_names(interceptors: Sequence[str]) -> list[str]:
    if isinstance(interceptors, str) or not all(isinstance(each, str) for each in interceptors):
        raise TypeError(f"interceptors is {interceptors!r}; it must be a list of texts, MODULE:OBJECT each")
    return list(interceptors)


class ServerProcesses:
    """Serve ``target`` under ``topic`` in N ``processes``, each one a server and a member of its own.

    Each runs a :class:`Server`, or an :class:`AsyncServer` if there are coroutine functions among the methods.

    ``target``: ``"MODULE:OBJECT"``, which each process imports: an object, a class (made without arguments), a
    function, or, without OBJECT, a module. ``processes``: default, the number of CPUs. ``matchmaker``: a URL; default,
    that of the default node. ``node``: other options of each process's :class:`Node`, by name: ``{"liveness": 2.0}``;
    ``codec`` by its name. ``server``: the processes are named ``server-1``, ``server-2``, …; default, the
    topic's, or ``host:pid``.
    ``bind``: each process listens there, so the port must be ``*``. ``drain_timeout``: how long, in seconds, a process
    drains that gets SIGTERM by itself, or whose parent has died. ``log_level``: if given, each process logs to standard
    error from this level on. ``interceptors``: each as ``"MODULE:OBJECT"``. The other options are those of these
    servers.

    Raises ValueError or TypeError for an option that cannot be, MatchmakerError for a URL that is none.

    A process that dies is started again, after a pause that doubles from 0.1 to 10 s while it does not live for 10 s.
    When this process dies, the others drain and end.

    Use it as a context manager, or call start() and stop(). Thread-safe. In a forked child it has nothing started, and
    leaves the parent's processes alone.
    """

    def __init__(
        self,
        topic: str | Topic,
        target: str,
        *,
        processes: int | None = None,
        matchmaker: str | None = None,
        node: Mapping[str, Any] | None = None,
        server: str | None = None,
        workers: int = 4,
        max_concurrency: int = 1024,
        bind: str | Sequence[str] | None = None,
        queue_size: int = 1024,
        on_full: OnFull = "wait",
        lease: float = 10.0,
        interceptors: Sequence[str] = (),
        drain_timeout: float = 10.0,
        log_level: int | str | None = None,
    ) -> None:
        if processes is None:
            processes = os.cpu_count() or 1
        self.processes = options.whole("processes", processes, 1)
        queue_size, on_full = check_queue(queue_size, on_full)
        if matchmaker is not None:
            open_matchmaker(matchmaker)
        self.topic = Topic.of(topic)
        self._server = server or self.topic.server
        self._config = {
            "target": target,
            "matchmaker": matchmaker,
            "node": _check_node(node),
            "interceptors": _check_names(interceptors),
            "drain_timeout": options.seconds("drain_timeout", drain_timeout, 0, 1e9),
            "log_level": _check_level(log_level),
            "options": {
                "workers": check_workers(workers, on_full),
                "max_concurrency": options.whole("max_concurrency", max_concurrency, 1),
                "bind": _check_bind(bind),
                "queue_size": queue_size,
                "on_full": on_full,
                "lease": check_ttl("lease", lease),
            },
        }
        self._alive: set[_Process] = set()
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """In a forked child: what runs is the parent's."""
        for process in self._alive:
            process.leave_to_parent()
        # Reentrant: a signal handler may call stop() while its thread is in start() or stop(). Guards all below.
        self._lock = threading.RLock()
        self._slots: list[_Slot] = []
        self._alive = set()
        self._stopping = False
        self._restarts = 0
        self._restarting = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._stopped = threading.Event()
        self._stopped.set()

    # -- what one does with it -------------------------------------------------------------------------------

    def start(self) -> ServerProcesses:
        """Start all processes, the first one ahead; return once each of them can be called.

        Raises NotServable (a ValueError) for a target that cannot be served, ChildProcessError if a process cannot
        serve for another reason, and RuntimeError if it runs already; nothing is left running then.
        """
        with self._lock:
            if not self._stopped.is_set():
                raise RuntimeError(f"{self!r} runs already")
            self._stopping = False
            self._stopped.clear()
            self._slots = [_Slot(number) for number in range(1, self.processes + 1)]
        try:
            # Whatever is wrong is wrong with all of them, and is better said once.
            for slots in (self._slots[:1], self._slots[1:]):
                for slot in slots:
                    slot.process = self._launch(slot.number)
                for slot in slots:
                    self._await(slot.process)
        except BaseException:
            self.stop(drain=False, timeout=0.0)
            raise
        self._watcher = threading.Thread(
            target=self._watch, name=f"zmqcore-processes-{self.topic}", daemon=True
        )
        self._watcher.start()
        _logger.info("%d processes serve %s", self.processes, self.topic)
        return self

    def stop(self, drain: bool = True, timeout: float = 10.0) -> bool:
        """Stop all processes as :meth:`Server.stop` does; kill those that have not ended ``timeout`` seconds later.

        Returns whether all work was finished. May be called again meanwhile, from anywhere: without ``drain`` that ends
        at once what is still draining.
        """
        with self._lock:
            self._stopping = True
            alive = tuple(self._alive)
        finished = self._end(alive, drain, timeout)
        watcher = self._watcher
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join()
        with self._lock:
            self._slots = []
        if not self._stopped.is_set():
            self._stopped.set()
            _logger.info("stopped serving %s", self.topic)
        return finished

    def restart(self, timeout: float = 10.0) -> bool:
        """Replace each process in turn: start another one, and when that can be called, drain the old one.

        So the topic is served all the time, by as many processes as before, and no call fails. Returns whether all work
        of the old ones was finished, each within ``timeout`` seconds. Raises ChildProcessError, or NotServable, if a
        new one cannot serve, and Closed if all is being stopped; those that have not been replaced go on then.
        """
        finished = True
        with self._restarting:
            for slot in tuple(self._slots):
                new = self._launch(slot.number)
                try:
                    self._await(new)
                except BaseException:
                    self._end([new], drain=False, timeout=0.0)
                    raise
                with self._lock:
                    old, slot.process, slot.failures = slot.process, new, 0
                _logger.info("process %d of %s is now %d", slot.number, self.topic, new.pid)
                if old is not None:
                    finished = self._end([old], drain=True, timeout=timeout) and finished
        return finished

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all have been stopped, or ``timeout`` seconds; return whether they have."""
        return self._stopped.wait(timeout)

    def serve_forever(self, drain_timeout: float = 10.0) -> bool:
        """Start if need be and serve until stop() is called, Ctrl-C is pressed, or SIGTERM comes; then drain.

        A second Ctrl-C or SIGTERM ends all at once. Returns whether all work was finished.
        """
        with sigterm.interrupts():
            try:
                if self._stopped.is_set():
                    self.start()
                with contextlib.suppress(KeyboardInterrupt):
                    self.wait()
                return self.stop(timeout=drain_timeout)
            except KeyboardInterrupt:
                return self.stop(drain=False, timeout=0.0)

    @property
    def running(self) -> tuple[dict[str, Any], ...]:
        """What each process that can be called now has announced: ``pid``, ``server``, ``instance``, ``endpoints``."""
        with self._lock:
            processes = [slot.process for slot in self._slots if slot.process is not None]
            return tuple(process.announced for process in processes if process.announced is not None)

    def stats(self) -> dict[str, Any]:
        """Return how many processes there are to be, how many can be called, and how often one was started again."""
        return {"processes": self.processes, "running": len(self.running), "restarts": self._restarts}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = (
            f"{len(self.running)} of {self.processes} running"
            if not self._stopped.is_set()
            else "not running"
        )
        return f"<ServerProcesses {self.topic} {state}>"

    # -- one process -----------------------------------------------------------------------------------------

    def _launch(self, number: int) -> _Process:
        """Start a process; it is alive until _end() or _bury() has seen its end."""
        name = f"{self._server}-{number}" if self._server else None
        topic = (self.topic.name, name, self.topic.exchange)
        with self._lock:
            if self._stopping:
                raise errors.Closed(f"{self!r} is being stopped")
            process = _Process({**self._config, "topic": topic, "path": sys.path})
            self._alive.add(process)
        return process

    def _await(self, process: _Process | None) -> None:
        """Return once ``process`` can be called. Raises what start() does."""
        assert process is not None
        while process.announced is None:
            if self._stopping:
                raise errors.Closed(f"{self!r} is being stopped")
            code = process.popen.poll()
            process.look(_LOOK_INTERVAL if code is None else 0.0)
            if process.fault:
                raise process.fault
            if code is not None and process.announced is None:
                raise ChildProcessError(
                    f"a process of {self.topic} {_how_it_ended(code)} before it could serve"
                )

    def _end(self, processes: Iterable[_Process], drain: bool, timeout: float) -> bool:
        """Stop ``processes``, all at once; return whether all of them had finished their work."""
        for process in processes:
            process.tell({"stop": {"drain": drain, "timeout": timeout}})
        deadline = time.monotonic() + timeout + _GRACE
        finished = True
        for process in processes:
            try:
                code = process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                code = process.popen.wait()
            finished = finished and code == 0
            self._bury(process)
        return finished

    def _bury(self, process: _Process) -> None:
        """It has ended: let go of it."""
        with self._lock:
            self._alive.discard(process)
            process.close()

    # -- the watching thread ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Start again who dies, until all are to stop."""
        while True:
            with self._lock:
                if self._stopping:
                    return
                for slot in self._slots:
                    self._attend(slot)
                now = time.monotonic()
                due = [slot.restart_at - now for slot in self._slots if slot.process is None]
                poll = select.poll()
                for slot in self._slots:
                    if slot.process is not None:
                        poll.register(slot.process.socket, select.POLLIN)
            poll.poll(1000 * max(0.0, min([_LOOK_INTERVAL, *due])))

    def _attend(self, slot: _Slot) -> None:
        """Take note of what the slot's process has said, or of its end; start another when it is time."""
        process, now = slot.process, time.monotonic()
        if process is None:
            if now >= slot.restart_at:
                self._launch_again(slot)
            return
        called = process.announced is not None
        process.look(0.0)
        if process.announced is not None and not called:
            _logger.info("process %d of %s serves again: %d", slot.number, self.topic, process.pid)
        code = process.ended()
        if code is None:
            return
        self._bury(process)
        lived = now - process.started
        slot.failures = 0 if process.announced is not None and lived >= _STABLE else slot.failures + 1
        self._start_later(slot, f"{process.pid} {_how_it_ended(code)} after {lived:.1f} s")

    def _launch_again(self, slot: _Slot) -> None:
        self._restarts += 1
        try:
            slot.process = self._launch(slot.number)
        except OSError as exc:
            slot.failures += 1
            self._start_later(slot, f"cannot be started: {exc}")

    def _start_later(self, slot: _Slot, why: str) -> None:
        slot.process = None
        delay = restart_delay(slot.failures)
        slot.restart_at = time.monotonic() + delay
        _logger.warning("process %d of %s: %s; started again in %g s", slot.number, self.topic, why, delay)


class _Slot:
    """The place of one of the processes: who has it, or when the next one gets it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: _Process | None = None
        self.failures = 0
        self.restart_at = 0.0


class _Process:
    """One process as its parent sees it. The parent's end of a pair of sockets is open as long as that lives."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                self.popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", "zmqcore.rpc.process_main", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Of its own, so that Ctrl-C in a terminal reaches the parent alone, who passes it on.
                    process_group=0,
                )
        except BaseException:
            self.socket.close()
            raise
        self.pid = self.popen.pid
        self.started = time.monotonic()
        self.announced: dict[str, Any] | None = None
        self.fault: Exception | None = None
        self._unread = b""
        self._hung_up = False
        self.tell(config)
        self.socket.setblocking(False)

    def tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is seen elsewhere
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def look(self, timeout: float) -> None:
        """Take note of what it has said; wait up to ``timeout`` seconds for it to say something."""
        if timeout:
            poll = select.poll()
            poll.register(self.socket, select.POLLIN)
            poll.poll(1000 * timeout)
        try:
            while more := self.socket.recv(65536):
                self._unread += more
            self._hung_up = True
        except BlockingIOError:
            pass
        except OSError:
            self._hung_up = True
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._understand(json.loads(line))

    def _understand(self, message: dict[str, Any]) -> None:
        if "failed" in message:
            kind = NotServable if message["not_servable"] else ChildProcessError
            self.fault = kind(message["failed"])
        else:
            self.announced = {"pid": self.pid, **message}

    def ended(self) -> int | None:
        """Return its exit code; None if it lives."""
        if self._hung_up:
            # It is ending, or out of control.
            try:
                return self.popen.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                return self.popen.wait()
        return self.popen.poll()

    def leave_to_parent(self) -> None:
        """In a forked child: hold nothing open by which it hears its parent, and do not wait for it."""
        self.socket.close()
        self.popen.returncode = 0

    def close(self) -> None:
        """After its end: close the socket, and remove the files of those that it has bound. Twice is fine."""
        self.socket.close()
        for text in (self.announced or {}).get("endpoints", ()):
            endpoint = Endpoint.parse(text)
            if endpoint.is_local_ipc and endpoint.path.startswith("/"):  # not @name, which is no file
                # The path was the process's own choice: nobody else has it.
                Path(endpoint.path).unlink(missing_ok=True)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
