"""Take jobs: ``python worker.py NAME``. One that is to fall over at its tenth job: ``python worker.py NAME 10``."""

import gzip
import os
import sys
from pathlib import Path

from zmqcore import Server


class Compressor:
    def __init__(self, name, jobs_to_live):
        self.name = name
        self.jobs_left = jobs_to_live

    def compress(self, source, target):
        """Doing it twice is doing it once: the result appears at once, and under the same name."""
        self.jobs_left -= 1
        if not self.jobs_left:
            os._exit(0)  # as if killed: nobody is told anything
        part = Path(f"{target}.{self.name}.part")
        part.write_bytes(gzip.compress(Path(source).read_bytes(), mtime=0))
        part.rename(target)


if __name__ == "__main__":
    name = sys.argv[1]
    jobs_to_live = int(sys.argv[2]) if len(sys.argv) > 2 else -1
    with Server("compress", Compressor(name, jobs_to_live), server=name, workers=1) as server:
        print(f"{name} is waiting for work", flush=True)
        server.serve_forever()
