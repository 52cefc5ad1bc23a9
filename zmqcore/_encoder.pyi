from typing import Any

__all__ = ["Unpackable", "lift"]

class Unpackable(Exception):
    value: Any
    reason: str
    def __init__(self, value: Any, reason: str) -> None: ...

def lift(value: Any, buffers: list[Any], threshold: int, max_depth: int, max_elements: int) -> Any: ...
