"""Fill the queue, then wait until everything is done: ``python producer.py``."""

import tempfile
import time
from pathlib import Path

from zmqcore import Client

JOBS = 200

with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    queue = Client("compress", timeout=5.0)
    targets = []
    for number in range(JOBS):
        source = directory / f"{number}.txt"
        source.write_text(f"line {number}\n" * 1000)
        targets.append(directory / f"{number}.txt.gz")
        queue.cast("compress", str(source), str(targets[-1]))
    print(f"{JOBS} jobs are in the queue")

    while not all(target.exists() for target in targets):
        time.sleep(0.01)
    print(f"{JOBS} jobs are done")

for member, stats in queue.gather("zmqcore.stats").results.items():
    print(member.server, "has done its part" if stats["handled"] > JOBS / 10 else "was lazy")
