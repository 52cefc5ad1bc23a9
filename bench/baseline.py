"""What was measured once, kept to compare with; for which machine it holds, and what counts as slower.

A time is kept as the fastest round of a benchmark: noise only ever adds. It is compared as a multiple of a reference,
which is measured in the same run and is not zmqcore, so that a slower clock or a neighbour who is there all the time
cancels out. Instructions are counted, not timed, and repeat to a fraction of a per cent, on whatever machine; but they
hold for just one set of versions, because another Python, libzmq or compiler executes others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASELINES = Path(__file__).with_name("baselines")

REFERENCE = "test_reference.py::test_interpreter"
"""The benchmark that is not zmqcore, of which the others are compared as multiples."""

SLOWER = {"process": 1.2, "system": 1.5}
"""By what factor a benchmark of each kind may be slower than the baseline, when it has been measured again."""

MORE_INSTRUCTIONS = 1.02
"""By what factor a scenario may execute more instructions than in the baseline. Four runs of one revision beside other
work differed by 0.2 % at most."""

# What takes a system's help: processes, threads, connections. How fast these are depends on where the scheduler puts
# them, by a factor of two.
SYSTEM = ("test_rpc.py", "test_channel.py", "test_pool.py::test_over_the_cap", "test_pool.py::test_8_threads")


def kind_of(name: str) -> str:
    """Return "system" for a benchmark that others than this process and thread take part in, else "process"."""
    return "system" if name.startswith(SYSTEM) else "process"


def machine_class() -> str:
    """Return the name under which figures of machines like this one are kept.

    It has the architecture, the CPU's vendor, family and model where the system tells them, how many CPUs there are,
    and the version of Python: machines of one class are alike enough for a ratio to hold.
    """
    python = f"{sys.implementation.name}{sys.version_info.major}{sys.version_info.minor}"
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        python += "t"
    return "-".join([platform.machine(), *_cpu_model(), f"{os.cpu_count()}cpu", python]).lower()


def _cpu_model() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return [platform.system()]
    first = cpuinfo.read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    keys = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")  # the last two: on ARM
    return [facts[key] for key in keys if key in facts]


@dataclass
class Measured:
    """What one run has measured: the fastest round of each benchmark in ns, and the instructions of each scenario."""

    machine: str
    versions: dict[str, str]
    times_ns: dict[str, float] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Measured:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = dataclasses.asdict(self)
        fields["times_ns"] = {name: float(f"{time:.4g}") for name, time in sorted(self.times_ns.items())}
        path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    def kept_over(self, earlier: Measured | None) -> Measured:
        """Return the baseline to be kept: this, and of what was not measured now, what ``earlier`` has.

        Instructions of other versions are not kept.
        """
        if earlier is None:
            return self
        counted = earlier.instructions if earlier.versions == self.versions else {}
        return dataclasses.replace(
            self,
            times_ns={**earlier.times_ns, **self.times_ns},
            instructions={**counted, **self.instructions},
        )

    def merge(self, times_ns: dict[str, float]) -> None:
        """Take over what was measured again, where it was faster."""
        for name, time in times_ns.items():
            self.times_ns[name] = min(time, self.times_ns.get(name, time))


@dataclass(frozen=True)
class Row:
    """One benchmark or scenario, now and in the baseline (None: it is not there), and by what factor it may grow."""

    name: str
    kind: str
    now: float
    before: float | None
    ratio: float | None
    limit: float

    @property
    def verdict(self) -> str:
        """One of "new", "slower", "faster" and "same"; this also where there is no ratio, as of the reference."""
        if self.ratio is None:
            return "new" if self.before is None else "same"
        if self.ratio > self.limit:
            return "slower"
        return "faster" if self.ratio < 1 / self.limit else "same"


def compare_times(now: Measured, before: Measured | None) -> list[Row]:
    """Return a row for each benchmark. What only the baseline has is not in it: it was not asked for, or is gone."""
    rows = []
    for name, time in now.times_ns.items():
        kind = kind_of(name)
        known = None if before is None else before.times_ns.get(name)
        ratio = None
        if known is not None and before is not None and name != REFERENCE:
            ratio = time / known / _slower_machine(now, before)
        rows.append(Row(name, kind, time, known, ratio, SLOWER[kind]))
    return rows


def _slower_machine(now: Measured, before: Measured) -> float:
    """Return how much slower the machine itself is now; 1 where the reference was not measured.

    Never below 1: if the reference was disturbed in the baseline, what is as fast as then is no regression.
    """
    if REFERENCE not in now.times_ns or REFERENCE not in before.times_ns:
        return 1.0
    return max(now.times_ns[REFERENCE] / before.times_ns[REFERENCE], 1.0)


def compare_instructions(now: Measured, before: Measured | None) -> list[Row]:
    """Return a row for each scenario; without a ratio where the versions are not those of the baseline."""
    comparable = before is not None and before.versions == now.versions
    rows = []
    for name, count in now.instructions.items():
        known = before.instructions.get(name) if before is not None and comparable else None
        ratio = None if known is None else count / known
        rows.append(Row(name, "instructions", count, known, ratio, MORE_INSTRUCTIONS))
    return rows


def counted_alike(versions: dict[str, str], path: Path) -> Path | None:
    """Return the baseline to compare instructions with, that of machines like this one if it can be: ``path``.

    Else another one beside it: which machine has counted does not matter, only of which versions. None if all are of
    others.
    """
    others = sorted(other for other in path.parent.glob("*.json") if other != path)
    for each in [path] * path.exists() + others:
        stored = Measured.load(each)
        if stored.instructions and stored.versions == versions:
            return each
    return None


def changed_versions(now: Measured, before: Measured) -> dict[str, Any]:
    """Return which versions are not those of the baseline, as (then, now)."""
    names = sorted(now.versions.keys() | before.versions.keys())
    pairs = {name: (before.versions.get(name), now.versions.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
