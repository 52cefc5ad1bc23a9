"""To whom a message goes: the choice among the members of a topic, and what it takes to see new ones."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmqcore import Topic
from zmqcore.matchmaker import Member, Membership
from zmqcore.rpc.balancing import Balancer


def members(count: int, epoch: int = 1) -> Membership:
    return Membership(
        epoch,
        tuple(
            Member(Topic("bench", f"server-{n}"), (f"tcp://127.0.0.1:{10000 + n}",), f"{n}", "host", n)
            for n in range(count)
        ),
    )


@pytest.mark.benchmark(group="balancing")
@pytest.mark.parametrize("count", [2, 100])
def test_choose(benchmark: BenchmarkFixture, count: int) -> None:
    """Nothing is outstanding, so it is the next one's turn; the cost must not grow with their number."""
    balancer, membership = Balancer("host"), members(count)

    def choose() -> None:
        target = balancer.choose(membership)
        assert target is not None
        balancer.done(target)

    benchmark(choose)
    assert not any(target.outstanding for target in balancer.targets(membership))


@pytest.mark.benchmark(group="balancing")
def test_choose_the_least_busy(benchmark: BenchmarkFixture) -> None:
    """Every one of 100 has a call, but one, which is to be found."""
    balancer, membership = Balancer("host"), members(100)
    busy = [balancer.choose(membership) for _ in range(99)]

    def choose() -> None:
        target = balancer.choose(membership)
        assert target is not None
        balancer.done(target)

    benchmark(choose)
    assert len(set(busy)) == 99


@pytest.mark.benchmark(group="balancing")
def test_another_membership(benchmark: BenchmarkFixture) -> None:
    """One of 100 members goes and comes back: each look finds another membership."""
    balancer = Balancer("host")
    both = [members(100), Membership(1, members(100).members[:-1])]

    def look() -> int:
        return len(balancer.targets(both[0])) + len(balancer.targets(both[1]))

    assert benchmark(look) == 199
