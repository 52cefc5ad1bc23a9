__all__ = ["CAUSES", "MESSAGES", "WAIT_BUCKETS"]

CAUSES: tuple[str, ...]
MESSAGES: tuple[str, ...]
WAIT_BUCKETS: tuple[float, ...]
