import zmq

__all__ = ["generation", "waiters"]

class Waiter:
    def __new__(cls) -> Waiter: ...

class OpenFds:
    def __new__(cls) -> OpenFds: ...

class SharedSocket:
    socket: zmq.Socket[bytes] | None
    fd: int
    spin_ns: int
    def __init__(self, socket: zmq.Socket[bytes], spin_seconds: float = 60e-6) -> None: ...

def generation() -> int: ...
def waiters() -> dict[str, int]: ...
