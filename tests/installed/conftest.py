"""What the tests of the installed package share: a place of their own, and what pip has written down.

They are few and look at what only packaging can break. They run in a checkout too; ``make wheel`` and the wheel builds
of the releases run them against a wheel, in an environment without sources and compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest

GIVE_UP = 60.0
"""Seconds after which a process is taken to hang. Not a promise about speed."""


@pytest.fixture(scope="session")
def installed() -> Distribution:
    """What pip knows of zmqcore; skips the test where the package is imported from its sources."""
    # Only there: what a build has left in the current directory would be found first.
    site_packages = [sysconfig.get_path(name) for name in ("platlib", "purelib")]
    found = next(iter(Distribution.discover(name="zmqcore", path=site_packages)))
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("installed in editable mode: the package is the source tree")
    return found


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to run in, with a registry of its own; short, because the path of a Unix socket is."""
    with tempfile.TemporaryDirectory(prefix="zc") as name:
        path = Path(name)
        path.chmod(0o700)
        monkeypatch.setenv("ZMQCORE_RUNTIME_DIR", name)
        yield path


@pytest.fixture
def run(place: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(*words)`` runs this Python with ``words`` as a stranger would, away from any source tree."""

    def run_python(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", *words],
            cwd=place,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=GIVE_UP,
            check=False,
        )

    return run_python
