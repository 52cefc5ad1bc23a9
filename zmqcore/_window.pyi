from typing import final

__all__ = ["Window"]

@final
class Window:
    @property
    def max_messages(self) -> int: ...
    @property
    def max_bytes(self) -> int: ...
    def __init__(self, max_messages: int, max_bytes: int) -> None: ...
