"""What figures depend on: the machine, and the versions of what was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import floor
import zmq

BENCH = Path(__file__).resolve().parent


def version(distribution: str) -> str:
    """Return the version of what is installed; empty if it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def first_line(*command: str) -> str:
    """Return the first line that a command prints; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCH)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0] if done.returncode == 0 else ""


def environment(libzmq: str) -> dict[str, Any]:
    """Return what the figures depend on, as far as it can be known; ``libzmq`` is the library of the C peer."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "zmqcore": version("zmqcore"),
        "commit": first_line("git", "describe", "--always", "--dirty"),
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "libzmq_path": Path(libzmq).name,
        "msgpack": version("msgpack"),
        "compiler": first_line(*floor.compiler(), "--version"),
        "flags": " ".join(floor.FLAGS),
    }
