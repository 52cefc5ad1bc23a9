"""Host names looked up within the caller's time, of which getaddrinfo(3) knows nothing.

A name server that does not answer holds getaddrinfo for 10 s and more. So each name is looked up by a thread of its
own, however many wait for it, and they wait no longer than they want to. The thread ends when the system lets it; it
is a daemon, and keeps no process from ending.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from typing import Final

__all__ = ["addresses"]

#: For how many seconds what came of a lookup is told to others who ask for the name: channels that are made together
#: share it, a later one looks again.
_REMEMBERED: Final = 1.0
#: How many names are looked up at a time, so that no more threads than that are held up.
_MOST_LOOKUPS: Final = 64


class _Lookup:
    """What has come of one name; complete once ``ended`` is the time when it did."""

    def __init__(self) -> None:
        self.ended: float | None = None
        self.found: list[str] = []
        self.failure: OSError | None = None


class _Resolver:
    """The lookups of this process."""

    def __init__(self) -> None:
        # Guards all of this, and is notified when a lookup has ended.
        self._changed = threading.Condition()
        self._lookups: dict[str, _Lookup] = {}
        self._running: set[_Lookup] = set()

    def addresses(self, host: str, timeout: float) -> list[str]:
        """See :func:`addresses`."""
        deadline = time.monotonic() + timeout
        with self._changed:
            lookup = self._lookup(host)
            while lookup is None or lookup.ended is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("the name has not been resolved yet")
                self._changed.wait(left)
                lookup = lookup or self._lookup(host)
        if lookup.failure is not None:
            raise type(lookup.failure)(*lookup.failure.args)
        return lookup.found

    def _lookup(self, host: str) -> _Lookup | None:
        """Return the lookup of ``host``, a recent one or a new one; None if there can be no more. Locked."""
        now = time.monotonic()
        lookup = self._lookups.get(host)
        if lookup is not None and (lookup.ended is None or now - lookup.ended < _REMEMBERED):
            return lookup
        if len(self._running) >= _MOST_LOOKUPS:
            return None
        for name, old in tuple(self._lookups.items()):
            if old.ended is not None and now - old.ended >= _REMEMBERED:
                del self._lookups[name]
        lookup = self._lookups[host] = _Lookup()
        self._running.add(lookup)
        thread = threading.Thread(target=self._run, args=(host, lookup), name="zmqcore-resolver", daemon=True)
        try:
            thread.start()
        except BaseException as exc:
            del self._lookups[host]
            self._running.discard(lookup)
            if isinstance(exc, RuntimeError):
                raise OSError(errno.EAGAIN, "no thread can be started to look up the name") from exc
            raise
        return lookup

    def _run(self, host: str, lookup: _Lookup) -> None:
        try:
            lookup.found = _look_up(host)
        except OSError as exc:
            lookup.failure = exc
        finally:
            with self._changed:
                lookup.ended = time.monotonic()
                self._running.discard(lookup)
                self._changed.notify_all()


def _look_up(host: str) -> list[str]:
    try:
        # IPv4 only: that is what our sockets connect to.
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except UnicodeError as exc:
        # Python's own check: a label of it is too long for the domain name system.
        raise socket.gaierror(socket.EAI_NONAME, f"no host can have this name ({exc})") from exc
    return [str(address[0]) for *_, address in found]


def addresses(host: str, timeout: float) -> list[str]:
    """Return the IPv4 addresses of ``host``, one at least, in the system's order, within ``timeout`` seconds.

    Raises TimeoutError when the lookup takes longer: it goes on, and who asks again may find it done. Raises the
    OSError that says why there are none. Thread-safe; a forked child starts with nothing.
    """
    return _resolver.addresses(host, timeout)


_resolver = _Resolver()


def _after_fork_in_child() -> None:
    global _resolver
    _resolver = _Resolver()  # the threads are the parent's, and one of its own may have held the lock


os.register_at_fork(after_in_child=_after_fork_in_child)
