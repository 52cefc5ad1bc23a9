"""The same analysis without RPC, in processes of its own, to compare with."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zmqcore.cli.demo.analysis import Analysis
from zmqcore.cli.demo.children import Children

__all__ = ["Checkers"]

_Arrived = queue.SimpleQueue[tuple[int, Analysis] | None]


class Checkers:
    """As many processes as are useful, which share *files* among them; *key* is that of the digests."""

    def __init__(self, children: Children, files: list[Path], key: bytes) -> None:
        self._children = children
        self._arrived: _Arrived = queue.SimpleQueue()
        number = min(os.cpu_count() or 1, 4, len(files))
        self._names = [f"checker-{each}" for each in range(number)]
        self._readers = []
        for first, name in enumerate(self._names):
            process = children.start(name, "checker", key.hex(), output=True)
            share = [[index, str(files[index])] for index in range(first, len(files), number)]
            reader = threading.Thread(
                target=_read, args=(process, share, self._arrived), name=name, daemon=True
            )
            reader.start()
            self._readers.append(reader)

    def results(self) -> Iterator[tuple[int, Analysis]]:
        """Yield each file's index and analysis, in any order, until all processes have ended."""
        ended = 0
        while ended < len(self._names):
            one = self._arrived.get()
            if one is None:
                ended += 1
            else:
                yield one

    def end(self) -> list[str]:
        """Reap the processes; return complaints about bad ends."""
        for reader in self._readers:
            reader.join()
        return self._children.end(self._names)


def _read(process: subprocess.Popen[str], share: list[list[Any]], arrived: _Arrived) -> None:
    """Give a checker its share and pass on what it finds; None says that it has ended, however it did."""
    try:
        if process.stdin is None or process.stdout is None:
            return
        with contextlib.suppress(OSError, ValueError):
            json.dump(share, process.stdin)
            process.stdin.close()
            for line in process.stdout:
                index, message = json.loads(line)
                arrived.put((index, Analysis.from_message(message)))
    finally:
        arrived.put(None)
