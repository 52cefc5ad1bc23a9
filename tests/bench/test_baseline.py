"""The regression suite's own logic: what counts as slower, what is kept, and what is counted."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import baseline
import pytest
from baseline import REFERENCE, Measured, Row, compare_instructions, compare_times
from instructions import CannotCount, per_run, total_of
from report import picture, table

ROOT = Path(__file__).parents[2]

IN_PROCESS, ACROSS = "test_frame.py::test_pack_small", "test_rpc.py::test_call[tcp-0]"
VERSIONS = {"python": "3.11.7", "libzmq": "4.3.5"}


def measured(
    times_ns: dict[str, float] | None = None, instructions: dict[str, int] | None = None
) -> Measured:
    return Measured("some-machine", dict(VERSIONS), times_ns or {}, instructions or {})


def verdicts(rows: list[Row]) -> dict[str, str]:
    return {row.name: row.verdict for row in rows}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (IN_PROCESS, "process"),
        (ACROSS, "system"),
        ("test_pool.py::test_release", "process"),
        ("test_pool.py::test_over_the_cap", "system"),
        (REFERENCE, "process"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert baseline.kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "limit"), [(IN_PROCESS, baseline.SLOWER["process"]), (ACROSS, baseline.SLOWER["system"])]
)
def test_slower_than_the_limit_of_its_kind(name: str, limit: float) -> None:
    before = measured({name: 1000.0, REFERENCE: 50.0})
    for factor, verdict in [
        (limit * 1.01, "slower"),
        (limit * 0.99, "same"),
        (1.0, "same"),
        (0.99 / limit, "faster"),
    ]:
        now = measured({name: 1000.0 * factor, REFERENCE: 50.0})
        assert verdicts(compare_times(now, before))[name] == verdict, factor


def test_a_slower_machine_is_not_a_regression() -> None:
    before = measured({IN_PROCESS: 1000.0, REFERENCE: 50.0})
    assert (
        verdicts(compare_times(measured({IN_PROCESS: 2000.0, REFERENCE: 100.0}), before))[IN_PROCESS]
        == "same"
    )
    assert (
        verdicts(compare_times(measured({IN_PROCESS: 3000.0, REFERENCE: 100.0}), before))[IN_PROCESS]
        == "slower"
    )


def test_a_reference_that_was_disturbed_in_the_baseline_is_no_excuse_to_fail() -> None:
    before = measured({IN_PROCESS: 1000.0, REFERENCE: 100.0})
    assert (
        verdicts(compare_times(measured({IN_PROCESS: 1000.0, REFERENCE: 50.0}), before))[IN_PROCESS] == "same"
    )


def test_the_reference_itself_never_fails() -> None:
    (row,) = compare_times(measured({REFERENCE: 500.0}), measured({REFERENCE: 50.0}))
    assert (row.ratio, row.verdict) == (None, "same")


def test_without_a_baseline_everything_is_new() -> None:
    now = measured({IN_PROCESS: 1000.0}, {"encode": 10})
    assert set(verdicts(compare_times(now, None) + compare_instructions(now, None)).values()) == {"new"}


def test_what_only_one_of_both_has_is_not_compared() -> None:
    now, before = measured({IN_PROCESS: 1000.0}), measured({ACROSS: 1000.0})
    assert verdicts(compare_times(now, before)) == {IN_PROCESS: "new"}


def test_instructions() -> None:
    before = measured(instructions={"encode": 1000, "decode": 1000, "call": 1000})
    now = measured(instructions={"encode": 1021, "decode": 1019, "call": 900, "cast": 5})
    found = verdicts(compare_instructions(now, before))
    assert found == {"encode": "slower", "decode": "same", "call": "faster", "cast": "new"}


def test_instructions_of_other_versions_are_not_compared() -> None:
    before = measured(instructions={"encode": 1000})
    now = dataclasses.replace(
        measured(instructions={"encode": 2000}), versions={**VERSIONS, "python": "3.11.8"}
    )
    assert verdicts(compare_instructions(now, before)) == {"encode": "new"}
    assert baseline.changed_versions(now, before) == {"python": ("3.11.7", "3.11.8")}


def test_instructions_are_compared_with_any_baseline_of_the_same_versions(tmp_path: Path) -> None:
    """That of machines like this one first; one without counts is none."""
    own, alike, other = (tmp_path / f"{name}.json" for name in ("own", "alike", "a-other"))
    assert baseline.counted_alike(VERSIONS, own) is None
    Measured("other", {**VERSIONS, "python": "3.12.0"}, {}, {"encode": 1}).save(other)
    Measured("empty", dict(VERSIONS), {IN_PROCESS: 1.0}, {}).save(tmp_path / "a-empty.json")
    assert baseline.counted_alike(VERSIONS, own) is None
    Measured("alike", dict(VERSIONS), {}, {"encode": 1}).save(alike)
    assert baseline.counted_alike(VERSIONS, own) == alike
    Measured("own", {**VERSIONS, "libzmq": "4.3.4"}, {}, {"encode": 1}).save(own)
    assert baseline.counted_alike(VERSIONS, own) == alike
    Measured("own", dict(VERSIONS), {}, {"encode": 1}).save(own)
    assert baseline.counted_alike(VERSIONS, own) == own


def test_measured_again_the_faster_one_counts() -> None:
    now = measured({IN_PROCESS: 2000.0, ACROSS: 10.0})
    now.merge({IN_PROCESS: 1000.0, ACROSS: 20.0})
    assert now.times_ns == {IN_PROCESS: 1000.0, ACROSS: 10.0}


def test_what_is_kept() -> None:
    earlier = measured({IN_PROCESS: 1.0, ACROSS: 2.0}, {"encode": 1, "decode": 2})
    now = measured({IN_PROCESS: 10.0}, {"encode": 10})
    kept = now.kept_over(earlier)
    assert (kept.times_ns, kept.instructions) == (
        {IN_PROCESS: 10.0, ACROSS: 2.0},
        {"encode": 10, "decode": 2},
    )
    of_others = dataclasses.replace(now, versions={"python": "3.12.0"}).kept_over(earlier)
    assert of_others.instructions == {"encode": 10}
    assert now.kept_over(None) == now


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = measured({IN_PROCESS: 1234.5678}, {"encode": 1496})
    made.save(tmp_path / "new" / "class.json")
    assert Measured.load(tmp_path / "new" / "class.json") == measured({IN_PROCESS: 1235.0}, {"encode": 1496})


def test_the_class_of_this_machine_is_a_name_of_a_file() -> None:
    assert re.fullmatch(r"[\w.-]+-\d+cpu-cpython3\d+t?", baseline.machine_class())


@pytest.mark.parametrize("path", sorted(baseline.BASELINES.glob("*.json")), ids=lambda path: path.name)
def test_stored_baselines_can_be_read(path: Path) -> None:
    stored = Measured.load(path)
    assert stored.machine == path.stem
    assert REFERENCE in stored.times_ns
    assert all(time > 0 for time in stored.times_ns.values())
    assert all(count > 0 for count in stored.instructions.values())


def test_instructions_of_one_run_without_those_of_the_loop() -> None:
    # marks end, in turn, a warm-up and a scenario
    assert per_run(["empty", "encode"], [7, 40_000, 9, 240_000]) == {"encode": 200}
    with pytest.raises(CannotCount, match="3 marks were seen instead of 4"):
        per_run(["empty", "encode"], [7, 40_000, 9])


def test_totals_of_a_dump(tmp_path: Path) -> None:
    dump = tmp_path / "dump.1"
    dump.write_text("# callgrind format\nversion: 1\nfn=(1) main\n5 7\n\ntotals: 12345\n")
    assert total_of(dump) == 12345
    dump.write_text("# callgrind format\n")
    with pytest.raises(CannotCount, match="no line of totals"):
        total_of(dump)


ROWS = [
    Row(IN_PROCESS, "process", 1500.0, 1000.0, 1.5, 1.15),
    Row(ACROSS, "system", 61e3, 60e3, 61 / 60, 1.5),
    Row("encode <a & b>", "instructions", 1496, None, None, 1.02),
]


def test_the_table_names_what_is_slower() -> None:
    lines = table(ROWS).splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        *("frame: pack small", "process", "1.5 µs", "1 µs", "1.50", "1.15", "SLOWER")
    ]
    assert "61 µs" in lines[3]
    assert "1,496" in lines[4]


def test_the_picture_is_one_and_has_every_row() -> None:
    root = ElementTree.fromstring(picture(ROWS, "on <this> machine"))
    space = "{http://www.w3.org/2000/svg}"
    dots = root.findall(f".//{space}circle")
    assert [dot.get("class") for dot in dots] == ["slower", "same", "new"]
    assert len(root.findall(f".//{space}line[@class='before']")) == 2
    assert "prefers-color-scheme: dark" in (root.findtext(f"{space}style") or "")
    width = float(root.get("width") or 0)
    assert all(0 < float(dot.get("cx") or 0) < width for dot in dots)


def test_every_counted_scenario_is_in_the_baselines() -> None:
    """A name that was changed would be compared with nothing."""
    text = (ROOT / "bench" / "counted.py").read_text()
    for path in baseline.BASELINES.glob("*.json"):
        for name in json.loads(path.read_text())["instructions"]:
            assert f'"{name}"' in text, f"{path.name} has {name!r}"
