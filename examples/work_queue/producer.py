"""Give jobs away, and wait until all of them are done: ``python producer.py``."""

import tempfile
from pathlib import Path

from zmqcore import Client, default_node

JOBS = 200

with tempfile.TemporaryDirectory() as name, Client("compress", delivery="accepted") as queue:
    directory = Path(name)
    targets = [directory / f"{number}.gz" for number in range(JOBS)]
    for number, target in enumerate(targets):
        source = directory / f"{number}.txt"
        source.write_text(f"line {number}\n" * 1000)
        queue.cast("compress", str(source), str(target))
    print(f"{JOBS} jobs are accepted")

    queue.flush(timeout=60.0)
    print(f"{sum(target.exists() for target in targets)} are done")
    print("some were sent twice:", default_node().stats()["accepted"]["sent_again"] > 0)
