"""Pyro5: marshal, its fastest serializer, no Nagle; in flight by threads, as a proxy does one call at a time."""

from __future__ import annotations

import Pyro5.api
from peer import Target, host_and_port, obey_beside, say

from peers.roles import run_blocking

Pyro5.config.SERIALIZER = "marshal"
Pyro5.config.SOCK_NODELAY = True
# One thread for all connections: 500 of them are more than its pool of threads is meant for.
Pyro5.config.SERVERTYPE = "multiplex"


@Pyro5.api.expose
class Service:
    """The methods that are called from afar."""

    def __init__(self) -> None:
        self.target = Target()

    def echo(self, payload: bytes) -> bytes:
        return payload

    @Pyro5.api.oneway
    def tick(self, payload: bytes) -> None:
        self.target.tick(payload)

    def finish(self) -> tuple[int, int]:
        return self.target.finish()


def serve(endpoint: str) -> None:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    daemon = Pyro5.api.Daemon(host=host, port=0)
    daemon.register(Service(), "bench")
    say(endpoint=f"tcp://{daemon.locationStr}")
    obey_beside()
    daemon.requestLoop()


class Connected:
    submit = None

    def __init__(self, endpoint: str) -> None:
        host, port = host_and_port(endpoint)
        self.proxy = Pyro5.api.Proxy(f"PYRO:bench@{host}:{port}")
        self.proxy._pyroBind()  # noqa: SLF001 - the documented name
        self.call, self.cast = self.proxy.echo, self.proxy.tick

    def finish(self) -> tuple[int, int]:
        handled, last = self.proxy.finish()
        return handled, last

    def close(self) -> None:
        self.proxy._pyroRelease()  # noqa: SLF001


if __name__ == "__main__":
    run_blocking(serve, Connected, "Pyro5")
