"""The parts of the demo that need no other process."""

from __future__ import annotations

import os
import signal
import tokenize
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcore.cli.demo.analysis import Analysis, analyse, standard_library
from zmqcore.cli.demo.report import compare
from zmqcore.cli.interrupts import Interrupted, Interrupts
from zmqcore.cli.measure import open_fds, percentile

KEY = b"0123456789abcdef"


def test_an_analysis_counts() -> None:
    found = analyse(b"a = 1\nb = 2\n", KEY)
    # ENCODING, 2 x (NAME OP NUMBER NEWLINE), ENDMARKER
    assert (found.tokens, found.lines, found.error) == (10, 2, None)


def test_the_digest_depends_on_source_and_key() -> None:
    digests = {
        analyse(source, key).digest
        for source in (b"a = 1\n", b"a = 2\n", b"a =  1\n", b"")
        for key in (KEY, KEY[::-1])
    }
    assert len(digests) == 8


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_gives_the_same(kind: type) -> None:
    assert analyse(kind(b"x = 1\n"), KEY) == analyse(b"x = 1\n", KEY)


@given(st.binary(max_size=200))
def test_broken_source_is_a_result(source: bytes) -> None:
    first, second = analyse(source, KEY), analyse(source, KEY)
    assert first == second
    assert Analysis.from_message(first.as_message()) == first


def test_broken_source_names_its_error() -> None:
    assert analyse(b"# coding: no-such\n", KEY).error == "SyntaxError"
    assert analyse(b"(\n", KEY).error == tokenize.TokenError.__name__


def test_an_answer_that_lacks_something_is_refused() -> None:
    with pytest.raises(KeyError):
        Analysis.from_message({"tokens": 1, "lines": 1, "digest": ""})


def test_the_standard_library_is_found() -> None:
    files = standard_library()
    assert Path(tokenize.__file__) in files
    assert files == sorted(files)
    assert not any("site-packages" in path.parts for path in files)


def test_only_readable_python_files_are_taken(tmp_path: Path) -> None:
    tmp_path.joinpath("b.py").write_text("")
    tmp_path.joinpath("a.py").write_text("")
    tmp_path.joinpath("c.txt").write_text("")
    tmp_path.joinpath("d.py").mkdir()
    tmp_path.joinpath("site-packages").mkdir()
    tmp_path.joinpath("site-packages", "e.py").write_text("")
    tmp_path.joinpath("dangling.py").symlink_to("nowhere.py")
    assert [path.name for path in standard_library(tmp_path)] == ["a.py", "b.py"]


def some(number: int) -> Analysis:
    return Analysis(number, number, str(number), None)


def test_compare_finds_what_is_missing_wrong_or_unchecked() -> None:
    reference = {index: some(index) for index in range(5)}
    assert compare(dict(reference), reference, 5) == ([], [], [])
    results = {0: some(0), 1: some(9), 3: some(3), 4: some(4)}
    del reference[4]
    assert compare(results, reference, 5) == ([2], [1], [4])
    assert compare({}, {}, 2) == ([0, 1], [], [])


@pytest.mark.parametrize("field", ["tokens", "lines", "digest", "error"])
def test_compare_looks_at_every_part(field: str) -> None:
    changed = Analysis.from_message(some(1).as_message() | {field: "other"})
    assert compare({0: changed}, {0: some(1)}, 1) == ([], [0], [])


def test_a_signal_waits_until_it_may_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        reached = True
        with pytest.raises(Interrupted) as caught, interrupts.allowed():
            reached = False
        assert reached
        assert caught.value.number == signal.SIGTERM
        # Raised once only: what follows is cleaning up.
        os.kill(os.getpid(), signal.SIGTERM)
        interrupts.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_interrupts_where_it_is_allowed() -> None:
    with Interrupts() as interrupts:
        went_on = False
        with pytest.raises(Interrupted), interrupts.allowed():  # noqa: PT012 - the block is what is interrupted
            os.kill(os.getpid(), signal.SIGINT)
            went_on = True
        assert not went_on


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50, 99, 100)
    assert percentile([7.0], 0.01) == 7.0
    assert percentile([], 0.5) != percentile([], 0.5)  # NaN


def test_open_fds_counts() -> None:
    before = open_fds()
    if before is None:
        pytest.skip("this system does not tell")
    with Path(__file__).open():
        assert open_fds() == before + 1
