"""Leases run out when nobody renews them, by a clock that the test moves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting_support import until

from zmqcore.errors import MatchmakerError
from zmqcore.matchmaker import Matchmaker, Member, Membership
from zmqcore.matchmaker.base import Backend
from zmqcore.matchmaker.local import LocalBackend
from zmqcore.matchmaker.memory import MemoryBackend

PATIENCE = 30.0
Make = Callable[..., Member]
Clock = Callable[[], float]


@pytest.fixture(params=["memory", "local"])
def backend(request: pytest.FixtureRequest, clock: Clock, directory: Path) -> Callable[[], Backend]:
    """More and more backends of one registry, all on the test's clock."""
    if request.param == "local":
        return lambda: LocalBackend(directory, clock)
    # The registry lasts as long as one of its backends.
    first = MemoryBackend("leases", clock)
    return lambda: MemoryBackend(first._registry and "leases", clock)


def _hung(backend: Backend, clock: Clock) -> Matchmaker:
    """One whose thread gets no turn, so that it renews only when the test says so."""
    matchmaker = Matchmaker("test://", backend, clock)
    matchmaker._session._run_thread = lambda: None  # type: ignore[method-assign]
    return matchmaker


def _servers(membership: Membership) -> list[str]:
    return [member.server for member in membership.members]


def test_who_does_not_renew_goes(backend: Callable[[], Backend], clock: Clock, member: Make) -> None:
    hung = _hung(backend(), clock)
    reader = Matchmaker("test://", backend(), clock)
    lease = hung.register(member("a"), ttl=9.0)
    before = reader.members("inventory")
    assert _servers(before) == ["a"]
    clock.now += 8.9  # type: ignore[attr-defined]
    assert reader.members("inventory") == before
    assert lease.alive
    clock.now += 0.2  # type: ignore[attr-defined]
    after = reader.members("inventory")
    assert after.members == ()
    assert after.epoch > before.epoch
    assert not lease.alive

    # It comes back to life: what has run out is written again.
    hung._session.turn()
    assert lease.alive
    assert _servers(reader.members("inventory")) == ["a"]
    hung.close()
    reader.close()


def test_renewals_come_at_a_third_and_change_no_epoch(
    backend: Callable[[], Backend], clock: Clock, member: Make
) -> None:
    matchmaker = _hung(backend(), clock)
    reader = Matchmaker("test://", backend(), clock)
    matchmaker.register(member("a"), ttl=9.0)
    before = reader.members("inventory")
    for _ in range(10):
        clock.now += 3.0  # type: ignore[attr-defined]
        matchmaker._session.turn()
        assert reader.members("inventory") == before
    matchmaker.close()
    reader.close()


def test_a_watch_hears_of_it(backend: Callable[[], Backend], clock: Clock, member: Make) -> None:
    hung = _hung(backend(), clock)
    watcher = Matchmaker("test://", backend(), clock)
    hung.register(member("a"), ttl=60.0)
    watch = watcher.watch("inventory")
    assert _servers(watch.current) == ["a"]
    clock.now += 61.0  # type: ignore[attr-defined]
    assert watch.wait_for(lambda membership: not membership.members, PATIENCE) is not None
    hung.close()
    watcher.close()


class Flaky(Backend):
    """A registry that can be switched off."""

    poll_interval = 0.01

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.failure: Exception | None = None
        self.asked = 0
        for name in ("register", "renew", "delete", "refresh", "raise_epoch", "read", "groups", "disconnect"):
            setattr(self, name, getattr(inner, name))

    def connect(self) -> bool:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return self.inner.connect()

    def abandon(self) -> None:
        self.inner.abandon()

    register = renew = delete = refresh = raise_epoch = read = groups = disconnect = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "failure", [MatchmakerError("the cable is out"), ZeroDivisionError("a fault of ours")]
)
def test_an_outage_leaves_what_is_known(
    failure: Exception, clock: Clock, member: Make, caplog: pytest.LogCaptureFixture
) -> None:
    flaky = Flaky(MemoryBackend("outage", clock))
    matchmaker = Matchmaker("test://", flaky, clock)
    lease = matchmaker.register(member("a"), ttl=9.0)
    watch = matchmaker.watch("inventory")
    known = watch.current
    with caplog.at_level(logging.INFO, "zmqcore.matchmaker"):
        flaky.failure = failure
        asked = flaky.asked
        until(lambda: watch.stale and flaky.asked > asked + 4)
        assert watch.current is known
        assert len(caplog.records) == 1, "once per outage, not once per attempt"
        assert str(failure) in caplog.text
        assert (caplog.records[0].exc_info is not None) is isinstance(failure, ZeroDivisionError)
        with pytest.raises(type(failure)):
            matchmaker.members("inventory")
        clock.now += 10.0  # type: ignore[attr-defined]
        assert not lease.alive
        flaky.failure = None
        until(lambda: not watch.stale and lease.alive)
        assert watch.current.members == known.members
        assert len(caplog.records) == 2
        assert "answers again" in caplog.records[1].getMessage()
    matchmaker.close()


def test_closing_without_a_registry_is_logged_only(
    clock: Clock, member: Make, caplog: pytest.LogCaptureFixture
) -> None:
    flaky = Flaky(MemoryBackend("gone", clock))
    matchmaker = Matchmaker("test://", flaky, clock)
    lease = matchmaker.register(member("a"))
    matchmaker.register(member("b"))
    flaky.failure = MatchmakerError("the cable is out")
    lease.close()
    assert not lease.alive
    matchmaker.close()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "1 leases could not be given up" in caplog.text
