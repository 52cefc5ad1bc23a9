"""``make bench`` as a whole, on one small benchmark: what it finds slower it fails for, and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import regression
from baseline import REFERENCE, Measured, machine_class
from instructions import count_instructions

pytest.importorskip("pytest_benchmark")

BENCH = Path(__file__).parents[2] / "bench"
NAME = "test_codec.py::test_scan[16 bytes]"
SELECTED = ["-k", "scan or interpreter"]


def run(results: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "regression.py"), "--results", str(results), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    path = tmp_path_factory.mktemp("bench") / "saved.json"
    ran = run(path.parent, "--save", str(path), *SELECTED)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return Measured.load(path)


def scaled(saved: Measured, factor: float, directory: Path) -> str:
    """Write a baseline in which everything but the reference takes ``factor`` of the time."""
    times = {name: time * (1 if name == REFERENCE else factor) for name, time in saved.times_ns.items()}
    Measured(saved.machine, saved.versions, times, {}).save(directory / "baseline.json")
    return str(directory / "baseline.json")


def test_what_it_measures(saved: Measured) -> None:
    assert saved.machine == machine_class()
    assert set(saved.times_ns) == {NAME, "test_codec.py::test_scan[100 records]", REFERENCE}
    assert all(time > 0 for time in saved.times_ns.values())
    assert saved.versions["libzmq"]


def test_it_fails_where_something_is_slower_than_the_baseline(saved: Measured, tmp_path: Path) -> None:
    ran = run(tmp_path, "--baseline", scaled(saved, 0.01, tmp_path), *SELECTED)
    assert ran.returncode == 1
    assert "again: 2 benchmarks" in ran.stdout
    assert "SLOWER: codec: scan[16 bytes]" in ran.stdout
    assert 'class="slower"' in (tmp_path / "summary.svg").read_text()
    assert "SLOWER" in (tmp_path / "summary.md").read_text()
    assert set(Measured.load(tmp_path / "result.json").times_ns) == set(saved.times_ns)


def test_it_does_not_where_nothing_is(saved: Measured, tmp_path: Path) -> None:
    ran = run(tmp_path, "--baseline", scaled(saved, 100.0, tmp_path), *SELECTED)
    assert ran.returncode == 0, ran.stdout
    assert "SLOWER" not in ran.stdout
    assert "faster" in ran.stdout


def test_it_fails_where_a_benchmark_does(tmp_path: Path) -> None:
    """Not a wrong figure, but a wrong result, or none."""
    ran = run(tmp_path, "-k", "there is no such benchmark")
    assert ran.returncode == 1
    assert not (tmp_path / "summary.md").exists()


def test_a_class_without_a_baseline_is_told_how_to_get_one(tmp_path: Path) -> None:
    """In a tree of its own, in which none is stored."""
    tree = tmp_path / "tree"
    shutil.copytree(BENCH, tree / "bench", ignore=shutil.ignore_patterns("baselines", "__pycache__"))
    for name in ("zmqcore", "pyproject.toml", "tests"):
        (tree / name).symlink_to(BENCH.parent / name)
    command = [sys.executable, str(tree / "bench" / "regression.py"), *SELECTED]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"there is no baseline for machines of the class {machine_class()}" in ran.stdout
    assert "make bench ARGS=--store" in ran.stdout
    stored = subprocess.run([*command, "--store"], capture_output=True, text=True, check=False, timeout=240)
    assert stored.returncode == 0, stored.stdout + stored.stderr
    assert NAME in Measured.load(tree / "bench" / "baselines" / f"{machine_class()}.json").times_ns


@pytest.mark.parametrize(("count", "code"), [(1000, 0), (1100, 1)])
def test_a_class_without_a_baseline_compares_instructions_with_those_of_others(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    count: int,
    code: int,
) -> None:
    """Which machine has counted them does not matter; times have nothing to be compared with, and it says so."""
    versions = {"python": "some"}
    Measured("another", versions, {NAME: 1.0}, {"encode": 1000, "gone": 5}).save(tmp_path / "another.json")
    monkeypatch.setattr(regression, "BASELINES", tmp_path)
    monkeypatch.setattr(regression, "versions", lambda: versions)
    monkeypatch.setattr(regression, "run_benchmarks", lambda *_: {NAME: 1e9})
    monkeypatch.setattr(regression, "count_instructions", lambda _: {"encode": count})
    monkeypatch.setattr(sys, "argv", ["regression.py", "--results", str(tmp_path / "results")])
    assert regression.main() == code
    said = capsys.readouterr().out
    assert "NO TIMES TO COMPARE WITH" in said
    assert f"instructions are compared with {tmp_path}/another.json" in said
    assert "in the baseline, but not here: gone" in said
    assert ("SLOWER: encode: 1,100, was 1,000" in said) == bool(code)
    versions = {"python": "another"}
    assert regression.main() == 0
    assert "NOTHING TO COMPARE WITH" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="there is no valgrind here")
def test_instructions_are_counted_between_the_marks(tmp_path: Path) -> None:
    """Twice the work takes twice the instructions, whatever the start of the program takes."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os\n"
        "def work(times):\n"
        "    for _ in range(times):\n"
        "        str(12345)\n"
        "for times in 0, 100, 200:\n"
        "    os.getppid()\n"
        "    for _ in range(1000):\n"
        "        work(times)\n"
        "    os.getppid()\n"
        "print(json.dumps(['empty', 'once', 'twice']))\n"
    )
    counts = count_instructions(os.environ, program)
    assert list(counts) == ["once", "twice"]
    assert counts["twice"] / counts["once"] == pytest.approx(2, rel=0.02)
