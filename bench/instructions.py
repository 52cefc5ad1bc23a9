"""Count the instructions of each scenario of ``counted.py`` by callgrind: a shared machine changes times, not these."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import counted

PROGRAM = Path(counted.__file__)


class CannotCount(RuntimeError):
    """There is no valgrind, or what it was to run has failed; the text says so."""


def valgrind() -> str:
    """Return where valgrind is."""
    found = shutil.which("valgrind")
    if found is None:
        raise CannotCount("there is no valgrind here; apt-get install valgrind")
    return found


def valgrind_version() -> str:
    return subprocess.run(
        [valgrind(), "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()


def count_instructions(
    environment: Mapping[str, str] = os.environ, program: Path = PROGRAM
) -> dict[str, int]:
    """Return how many instructions each scenario of ``program`` takes, once. Takes about half a minute."""
    with tempfile.TemporaryDirectory(prefix="zmqcore-instructions-") as directory:
        out = Path(directory) / "dump"
        # A dump at each mark holds what has been executed since the one before.
        command = [
            valgrind(),
            "--tool=callgrind",
            f"--dump-before={counted.mark.__name__}",
            "--combine-dumps=no",
            "--separate-threads=yes",
            f"--callgrind-out-file={out}",
            sys.executable,
            str(program),
        ]
        ran = subprocess.run(
            command,
            env={**environment, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise CannotCount(f"{program.name} failed under valgrind:\n{ran.stderr[-3000:]}")
        dumps = sorted(out.parent.glob("dump.*-01"), key=lambda path: int(path.suffix[1:].partition("-")[0]))
        totals = [total_of(dump) for dump in dumps]
    return per_run(json.loads(ran.stdout), totals)


def total_of(dump: Path) -> int:
    """Return the instructions that a dump of callgrind counts, of all threads together."""
    found = re.search(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)
    if found is None:
        raise CannotCount(f"{dump.name} of callgrind has no line of totals")
    return int(found[1])


def per_run(names: list[str], totals: list[int]) -> dict[str, int]:
    """Return what one run of each scenario takes, given what was counted up to each mark.

    There are two marks for each; the first of them ends its warm-up.
    """
    if len(totals) != 2 * len(names):
        raise CannotCount(f"{len(totals)} marks were seen instead of {2 * len(names)}")
    counts = dict(zip(names, totals[1::2], strict=True))
    overhead = counts.pop(counted.EMPTY)
    return {name: round((count - overhead) / counted.TIMES) for name, count in counts.items()}


if __name__ == "__main__":
    for name, count in count_instructions().items():
        print(f"{count:9,}  {name}")
