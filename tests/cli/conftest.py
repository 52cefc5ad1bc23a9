"""The command line as a user has it: real processes, in a directory and a registry of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import zmqcore

GIVE_UP = 60.0
"""Seconds after which a process is taken to hang. Not a promise about speed."""

# Where this zmqcore lies, installed or not: the commands run in another directory.
PACKAGE_PARENT = str(Path(zmqcore.__file__ or "").parents[1])

STOCK = textwrap.dedent(
    '''
    """What the tests serve."""
    import asyncio
    import datetime
    import os
    import pathlib
    import time


    class Stock:
        def echo(self, *args, **kwargs):
            return [list(args), kwargs]

        def fail(self):
            raise LookupError("no such sku")

        def count(self, n, text="no more"):
            yield from range(n)
            raise LookupError(text)

        def slow(self, seconds, done=None):
            time.sleep(seconds)
            if done is not None:
                pathlib.Path(done).write_text("done")
            return "finished"

        def odd(self):
            return {"bytes": b"\\x00\\xff", "nan": float("nan"), 1: (2, 3),
                    "when": datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc)}

        def note(self, path, text):
            with open(path, "a") as file:
                file.write(f"{text} {os.getpid()}\\n")


    class Needy:
        def __init__(self, shelf):
            self.shelf = shelf


    class Clerk:
        async def advise(self, sku, after=None):
            while after is not None and not pathlib.Path(after).exists():
                await asyncio.sleep(0.01)
            return f"take {sku}"

        def plain(self):
            return "plain"


    shop = Stock()


    def double(number):
        return 2 * number
    '''
)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shop:
    """A directory with a module ``stock`` in it; commands run there, with a runtime directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime = directory / "run"
        self.runtime.mkdir(mode=0o700)
        self.temporary = directory / "tmp"
        self.temporary.mkdir(mode=0o700)
        directory.joinpath("stock.py").write_text(STOCK, encoding="utf-8")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("ZMQCORE_", "XDG_"))
        } | {
            "ZMQCORE_RUNTIME_DIR": str(self.runtime),
            "PYTHONPATH": PACKAGE_PARENT,
            "TMPDIR": str(self.temporary),
            "COLUMNS": "100",
        }
        self._started: list[subprocess.Popen[str]] = []

    @staticmethod
    def command(*words: str) -> list[str]:
        # -P, as an installed script has no current directory in its path either.
        return [sys.executable, "-P", "-m", "zmqcore.cli", *words]

    def run(self, *words: str, **environment: str) -> Ran:
        return self._run(self.command(*words), environment)

    def python(self, code: str) -> Ran:
        """Run *code* as a program of its own."""
        return self._run([sys.executable, "-P", "-c", code], {})

    def _run(self, command: list[str], environment: dict[str, str]) -> Ran:
        ended = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=GIVE_UP,
            check=False,
        )
        return Ran(ended.returncode, ended.stdout, ended.stderr)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.command(*words),
            cwd=self.directory,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # As in a terminal: a signal to the group must not reach pytest.
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def serve(self, target: str = "stock:Stock", *words: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """Start a server of the topic inventory; return it and what it announces once it can be called."""
        process = self.start("serve", target, "--topic", "inventory", *words)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, err = process.communicate(timeout=GIVE_UP)
            pytest.fail(f"serve ended with {process.returncode}: {err}")
        return process, json.loads(line)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def shop() -> Iterator[Shop]:
    # Not pytest's own directories: their paths are too long for Unix sockets.
    with tempfile.TemporaryDirectory(prefix="zc-") as directory:
        shop = Shop(Path(directory))
        try:
            yield shop
        finally:
            shop.close()


@pytest.fixture
def ended() -> Callable[[subprocess.Popen[str]], Ran]:
    """Wait for a started command and return how it ended."""

    def wait(process: subprocess.Popen[str]) -> Ran:
        out, err = process.communicate(timeout=GIVE_UP)
        return Ran(process.returncode, out, err)

    return wait
