"""Run the code of one page of the documentation, step by step; a program of its own, run by test_code_blocks.py.

The steps come as JSON on standard input: ``[{"kind", "line", "code", "file", "output"}, …]``. The working directory is
an empty one. Exit code 0 if every step did what the page says.
"""

from __future__ import annotations

import contextlib
import doctest
import faulthandler
import io
import json
import os
import select
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

LIMIT_S = 60.0
"""How long a command may take before it is called stuck; a bound for a hang, not a promise about speed."""
PAGE_LIMIT_S = 180.0
"""The same for a page. After it, what every thread is doing is printed."""

_compare = doctest.OutputChecker().check_output


class Page:
    """One run of a page. Its Python blocks share one namespace, as if they stood in one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.main = types.ModuleType("__main__")
        sys.modules["__main__"] = self.main
        self.background: list[subprocess.Popen[bytes]] = []

    def step(self, step: dict[str, Any]) -> None:
        code, line, output = step["code"], step["line"], step["output"]
        if step["file"]:
            Path(step["file"]).write_text(code)
        elif step["kind"] == "python":
            printed = io.StringIO()
            # The lines before make the numbers in a traceback those of the page.
            compiled = compile("\n" * line + code, self.name, "exec")
            with contextlib.redirect_stdout(printed):
                exec(compiled, self.main.__dict__)
            if output is not None:
                self.expect(output, printed.getvalue(), line)
        elif step["kind"] == "background":
            self.start(code, line)
        else:
            done = subprocess.run(
                ["bash", "-c", code],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
            self.expect(output, done.stdout, line)

    def expect(self, wanted: str, got: str, line: int) -> None:
        wanted, got = wanted.rstrip() + "\n", got.rstrip() + "\n"
        if not _compare(wanted, got, doctest.ELLIPSIS):
            self.fail(line, f"the page shows\n{wanted}but what came is\n{got}")

    def start(self, command: str, line: int) -> None:
        """Start a server, which says so by its first line."""
        process = subprocess.Popen(["bash", "-c", f"exec {command}"], stdout=subprocess.PIPE)
        self.background.append(process)
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
        if not ready or not process.stdout.readline():
            self.fail(line, f"{command!r} does not say that it serves; exit code {process.poll()}")

    def end(self) -> None:
        """End what runs in the background by the signal that a service manager sends."""
        codes = {}
        for process in self.background:
            process.send_signal(signal.SIGTERM)
        for process in self.background:
            codes[str(process.args)] = process.wait(LIMIT_S)
            if process.stdout is not None:
                process.stdout.close()
        if any(codes.values()):
            raise SystemExit(f"{self.name}: ended with other codes than 0: {codes}")

    def fail(self, line: int, problem: str) -> NoReturn:
        raise SystemExit(f"{self.name}:{line}: {problem}")


def main() -> None:
    faulthandler.dump_traceback_later(PAGE_LIMIT_S, exit=True)
    page = Page(sys.argv[1])
    # Modules that a page has shown as a file are imported from the working directory.
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        for step in json.load(sys.stdin):
            page.step(step)
    finally:
        page.end()


if __name__ == "__main__":
    main()
