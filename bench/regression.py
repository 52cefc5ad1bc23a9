"""Run the unit benchmarks, count instructions, and compare both with a baseline; fails where it has become slower.

::

    python bench/regression.py                      # what `make bench` does
    python bench/regression.py --store              # and keep it as the baseline of machines like this one
    python bench/regression.py -k pool              # some of the benchmarks only, as pytest selects them
    python bench/regression.py --only instructions

What seems slower is measured again, twice at most, and the fastest counts: noise is rarely there three times, and a
regression always. Writes ``build/bench/``: ``result.json`` (what a baseline is), ``summary.md`` and ``summary.svg``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import msgpack
import zmq
from baseline import (
    BASELINES,
    REFERENCE,
    Measured,
    Row,
    changed_versions,
    compare_instructions,
    compare_times,
    counted_alike,
    machine_class,
)
from instructions import CannotCount, count_instructions, valgrind_version
from report import figure, picture, table, title

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent

AGAIN = 2
"""How often what seems slower is measured again."""

PYTEST = [
    *("-q", "-p", "no:cacheprovider", "--benchmark-quiet"),
    # Rounds as short as this find a moment without a neighbour, and are long beside what reading the clock takes.
    "--benchmark-min-time=0.00005",
    "--benchmark-max-time=0.5",
]


class Failed(RuntimeError):
    """A benchmark did not do what it measures."""


def versions() -> dict[str, str]:
    """Return what decides which instructions are executed, besides zmqcore."""
    found = {
        "python": platform.python_version(),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "msgpack": ".".join(map(str, msgpack.version)),
        "compiler": compiler_version(),
    }
    try:
        found["valgrind"] = valgrind_version()
    except CannotCount:
        pass
    return found


def compiler_version() -> str:
    """Return the first line of what the C compiler says of itself, or an empty text if there is none."""
    command = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    try:
        said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.partition("\n")[0]


def environment_for(package: Path) -> dict[str, str]:
    """Return an environment in which ``import zmqcore`` finds the one in the directory ``package``."""
    paths = [str(package.resolve()), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_benchmarks(words: list[str], package: Path, tolerant: bool = False) -> dict[str, float]:
    """Run the benchmarks that ``words`` select for pytest; return the fastest round of each, in ns.

    ``tolerant``: benchmarks may fail, as those of what an older zmqcore does not have; they are left out.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "benchmarks.json"
        # -P: not the zmqcore of the current directory, but that of PYTHONPATH.
        command = [sys.executable, "-P", "-m", "pytest", *PYTEST, f"--benchmark-json={out}", *words]
        if tolerant:
            command.append("--continue-on-collection-errors")
        ended = subprocess.run(command, cwd=ROOT, env=environment_for(package), check=False)
        if ended.returncode and not (tolerant and ended.returncode == 1):
            raise Failed(f"the benchmarks ended with {ended.returncode}")
        saved = json.loads(out.read_text())
    where = Path(saved["machine_info"]["zmqcore"])
    if package.resolve() not in where.parents:
        raise Failed(f"{where} was measured instead of {package}")
    return {
        bench["fullname"].removeprefix("bench/"): bench["stats"]["min"] * 1e9 for bench in saved["benchmarks"]
    }


def slower(rows: list[Row]) -> list[str]:
    return [row.name for row in rows if row.verdict == "slower"]


def measure(options: argparse.Namespace, words: list[str], before: Measured | None) -> Measured:
    """Measure what is asked for; times that seem slower than ``before`` again, and all that are to be kept."""
    now = Measured(machine_class(), versions())
    if options.only != "instructions":
        tolerant = options.package != ROOT
        now.merge(run_benchmarks([str(BENCH), *words], options.package, tolerant))
        for _ in range(AGAIN):
            suspects = list(now.times_ns) if options.store else slower(compare_times(now, before))
            if not suspects:
                break
            print(f"again: {len(suspects)} benchmarks", flush=True)
            names = [f"bench/{name}" for name in {REFERENCE, *suspects}]
            now.merge(run_benchmarks(names, options.package))
    if options.only != "times" and not words:
        print("counting instructions ...", flush=True)
        try:
            now.instructions = count_instructions(environment_for(options.package))
        except CannotCount as exc:
            print(f"NO INSTRUCTIONS COUNTED: {exc}")
    return now


def named(path: Path) -> str:
    """Return ``path`` as it is best shown."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def introduce(now: Measured, before: Measured | None, path: Path, counted: Path | None) -> None:
    """Say what is compared with what: times with those in ``path``, instructions with those in ``counted``."""
    if before is None:
        compared = bool(now.instructions and counted)
        print(
            f"\n{'NO TIMES' if compared else 'NOTHING'} TO COMPARE WITH: there is no baseline for machines of the class"
            f" {now.machine}.\n  make bench ARGS=--store     keeps these figures as {named(path)}"
        )
    else:
        print(f"\ncompared with {named(path)}")
    if not now.instructions:
        return
    if counted is not None and counted != path:
        print(f"instructions are compared with {named(counted)}, which is of the same versions")
    elif counted is None and before is not None:
        listed = ", ".join(
            f"{name} {then or 'none'} (now {here or 'none'})"
            for name, (then, here) in changed_versions(now, before).items()
        )
        print(f"INSTRUCTIONS ARE NOT COMPARED: the baseline is of {listed or 'none'}")


def name_gone(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Say which of the baseline's benchmarks or scenarios there are no more."""
    if gone := sorted(before.keys() - now.keys()) if now else []:
        print(f"in the baseline, but not here: {', '.join(gone)}")


def write(rows: list[Row], now: Measured, results: Path) -> None:
    """Write the results into the directory ``results``, and print the table."""
    heading = f"zmqcore on {now.machine}"
    text = table(rows)
    now.save(results / "result.json")
    (results / "summary.md").write_text(f"# {heading}\n\n{text}", encoding="utf-8")
    (results / "summary.svg").write_text(picture(rows, heading), encoding="utf-8")
    print(f"\n{text}\n{named(results)}/summary.md, summary.svg, result.json")


def name_slower(rows: list[Row]) -> int:
    """Say which rows are slower, and return how many."""
    found = [row for row in rows if row.verdict == "slower"]
    for row in found:
        now, before = figure(row, row.now), figure(row, row.before or 0.0)
        print(f"SLOWER: {title(row)}: {now}, was {before}: {row.ratio:.2f}, limit {row.limit:.2f}")
    return len(found)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the words that are for pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="All else goes to pytest."
    )
    parser.add_argument(
        "--baseline", type=Path, help="compare with this file (default: that of this machine's class)"
    )
    parser.add_argument("--store", action="store_true", help="keep what is measured as the baseline")
    parser.add_argument(
        "--save", type=Path, help="write what is measured to this file, and compare with nothing"
    )
    parser.add_argument(
        "--package", type=Path, default=ROOT, help="measure the zmqcore that is built in this directory"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "build" / "bench",
        help="where the summary goes (default: build/bench)",
    )
    parser.add_argument("--only", choices=["times", "instructions"], help="and not the other")
    options, words = parser.parse_known_args()
    if options.baseline and not options.baseline.exists():
        parser.error(f"there is no {options.baseline}")
    return options, words


def main() -> int:
    options, words = parse_options()
    path = options.baseline or BASELINES / f"{machine_class()}.json"
    compared = path if path.exists() and not options.save and not options.store else None
    before = None if compared is None else Measured.load(compared)
    try:
        now = measure(options, words, before)
    except Failed as exc:
        print(exc, file=sys.stderr)
        return 1
    if options.save:
        now.save(options.save)
        return 0
    if options.store:
        kept = now.kept_over(Measured.load(path) if path.exists() else None)
        kept.save(path)
        print(f"kept as {named(path)}")
        return 0
    # A baseline that is named is meant for all; of the stored ones any will do for instructions.
    counted = counted_alike(now.versions, path) if now.instructions and not options.baseline else compared
    counts = None if counted is None else Measured.load(counted)
    introduce(now, before, path, counted if counts and counts.versions == now.versions else None)
    if before is not None and not words:
        name_gone(now.times_ns, before.times_ns)
    if counts is not None and not words:
        name_gone(now.instructions, counts.instructions)
    rows = compare_times(now, before) + compare_instructions(now, counts)
    write(rows, now, options.results)
    return 1 if name_slower(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
