"""Compile ``floor.c`` when it is first needed, and find the libzmq that it is to measure."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import zmq

SOURCE = Path(__file__).with_name("floor.c")
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra"]
LIBRARIES = ["-ldl", "-pthread"]


class NoFloor(RuntimeError):
    """There is no C compiler, the program does not compile, or libzmq is not found."""


def cache_directory() -> Path:
    """Return where the program is kept: ``$XDG_CACHE_HOME/zmqcore-bench``, else below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zmqcore-bench"


def compiler() -> list[str]:
    """Return the command of the C compiler: ``$CC``, else ``cc``."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or shutil.which(command[0]) is None:
        raise NoFloor(f"no C compiler {command!r}; install one or set CC")
    return command


def compiled() -> Path:
    """Return the compiled program; the name in the cache holds a digest of source, compiler and flags."""
    command = [*compiler(), *FLAGS]
    version = subprocess.run([*compiler(), "--version"], capture_output=True, check=False).stdout
    recipe = SOURCE.read_bytes() + version + " ".join(command + LIBRARIES).encode()
    digest = hashlib.sha256(recipe).hexdigest()
    program = cache_directory() / f"floor-{digest[:16]}"
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        made = Path(scratch) / "floor"
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(made), *LIBRARIES], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoFloor(f"{' '.join(command)} failed:\n{done.stderr}")
        made.replace(program)  # atomic: two runs may compile at once
    return program


def libzmq_path() -> Path:
    """Return the libzmq that pyzmq uses.

    On Linux that is the one mapped into this process; elsewhere the one that lies beside pyzmq in a wheel.
    """
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            path = line.partition("/")[2]
            if Path(path).name.startswith("libzmq"):
                return Path("/" + path)
    package = Path(zmq.__file__).parent
    for directory in (package.parent / "pyzmq.libs", package / ".dylibs"):
        for found in sorted(directory.glob("libzmq*")):
            return found
    raise NoFloor("pyzmq's libzmq was not found as a library of its own; name it with --libzmq")
