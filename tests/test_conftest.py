"""The leak check of ``conftest.py`` is itself a test, so it is tested: it must be able to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = (
    Path(__file__)
    .with_name("conftest.py")
    .read_text(encoding="utf-8")
    .replace("SETTLING_S = 5.0", "SETTLING_S = 0.5")
)

LEAKS = {
    "fd": (
        """
        import os
        kept = []
        def test_it():
            kept.append(os.pipe())
        """,
        "fd * -> pipe:*",
    ),
    "fixture": (
        """
        import os, pytest
        @pytest.fixture
        def pipe():
            return os.pipe()
        def test_it(pipe):
            pass
        """,
        "fd * -> pipe:*",
    ),
    "thread": (
        """
        import threading
        end = threading.Event()
        def test_it():
            threading.Thread(target=end.wait, name="left-alone", daemon=True).start()
        """,
        "thread *left-alone*",
    ),
    "libzmq": (
        """
        import zmq
        kept = []
        def test_it():
            kept.append(zmq.Context().socket(zmq.PAIR))
        """,
        "thread ZMQ*",
    ),
}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="fds are read from /proc")
@pytest.mark.parametrize("kind", LEAKS)
def test_a_leak_fails_the_test_that_left_it(pytester: pytest.Pytester, kind: str) -> None:
    source, named = LEAKS[kind]
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(source)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*left behind:*", f"*{named}"])


def test_what_is_closed_late_or_held_by_a_wider_fixture_is_no_leak(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import os, threading, time
        import pytest

        @pytest.fixture(scope="module")
        def pipe():
            ends = os.pipe()
            yield ends
            for end in ends:
                os.close(end)

        def test_wider(pipe):
            pass

        def test_late():
            threading.Thread(target=time.sleep, args=(0.1,)).start()
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


SERVICE = "def test_it(require_service):\n    assert require_service({!r})\n"


@pytest.mark.parametrize(
    ("binary", "required", "outcome"),
    [("sh", "1", "passed"), ("no-such-server", "0", "skipped"), ("no-such-server", "1", "failed")],
)
def test_a_missing_service_skips_and_in_ci_fails(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, binary: str, required: str, outcome: str
) -> None:
    monkeypatch.setenv("ZMQCORE_REQUIRE_SERVICES", required)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SERVICE.format(binary))
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(**{outcome: 1})
