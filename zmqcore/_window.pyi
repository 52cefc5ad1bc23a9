from typing import final

__all__ = ["Window"]

@final
class Window:
    def __init__(self, max_messages: int, max_bytes: int) -> None: ...
