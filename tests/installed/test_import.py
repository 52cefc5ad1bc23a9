"""What an import does: it uses the libzmq that pyzmq has loaded, and where it cannot work it says why."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_import_warns_of_nothing(run: Run) -> None:
    done = run("-W", "error", "-c", "import zmqcore; print(zmqcore.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is mapped")
def test_there_is_one_libzmq_in_the_process(run: Run) -> None:
    done = run(
        "-c",
        "import zmqcore\n"
        "from os.path import realpath\n"
        "from zmqcore import _libzmq\n"
        "print(realpath(_libzmq.library_path()))\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if '/libzmq' in line}, sep='\\n')",
    )
    assert done.returncode == 0, done.stderr
    used, *mapped = done.stdout.split()
    assert mapped in ([used], [])  # none: pyzmq has been linked with a static one


def test_on_windows_the_import_says_what_is_missing(run: Run) -> None:
    done = run("-c", "import sys; sys.platform = 'win32'; import zmqcore")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: zmqcore runs on Linux (macOS is meant to work")
    assert "not on Windows" in last
    assert "WSL 2" in last
