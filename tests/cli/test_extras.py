"""Without click and rich there is one plain line, and nothing else of zmqcore needs them."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import zmqcore


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A directory with zmqcore and what it needs at run time, and nothing else."""
    for name in ("zmqcore", "zmq", "pyzmq.libs", "msgpack"):
        if name == "zmqcore":
            found = Path(zmqcore.__file__ or "").parent
        elif name == "pyzmq.libs":
            found = tmp_path.joinpath("zmq").resolve().parent / name
        else:
            spec = find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            found = Path(spec.origin).parent
        if found.exists():
            tmp_path.joinpath(name).symlink_to(found)
    return tmp_path


def run(bare: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # -S leaves out site-packages, -I the environment and the user's own.
    boot = f"import sys; sys.path.insert(0, {str(bare)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", boot + words[0], *words[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("code", ["from zmqcore.cli import main; sys.exit(main())", "import zmqcore.cli"])
def test_the_missing_extra_is_named_in_one_line(bare: Path, code: str) -> None:
    ended = run(bare, code, "doctor")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == "zmqcore: the command line needs click and rich: pip install 'zmqcore[cli]'\n"


def test_the_library_itself_needs_neither(bare: Path) -> None:
    ended = run(bare, "from zmqcore import Client, Node, Server; print('there')")
    assert (ended.stdout, ended.stderr, ended.returncode) == ("there\n", "", 0)
