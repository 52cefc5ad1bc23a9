from typing import final

from zmqcore._socket import SharedSocket

__all__ = ["Inbox"]

@final
class Inbox:
    def __init__(self, shared: SharedSocket, max_bytes: int, max_buffers: int) -> None: ...
