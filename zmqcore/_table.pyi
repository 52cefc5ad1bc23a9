__all__ = ["CAUSES", "WAIT_BUCKETS"]

CAUSES: tuple[str, ...]
WAIT_BUCKETS: tuple[float, ...]
