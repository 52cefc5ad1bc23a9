from typing import Self, final

import zmq
from typing_extensions import disjoint_base

__all__ = ["check_liveness", "generation", "open_sockets", "waiters"]

@final
class Waiter:
    def __new__(cls) -> Self: ...

@final
class OpenFds:
    def __new__(cls) -> Self: ...

@final
class SpinScore:
    def __new__(cls) -> Self: ...

@disjoint_base
class SharedSocket:
    socket: zmq.Socket[bytes] | None
    fd: int
    spin_ns: int
    def __init__(
        self, socket: zmq.Socket[bytes], spin_seconds: float = 100e-6, spin_shared: SpinScore | None = None
    ) -> None: ...

def check_liveness(liveness: object) -> float: ...
def generation() -> int: ...
def open_sockets() -> int: ...
def waiters() -> dict[str, int]: ...
