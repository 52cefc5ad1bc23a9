"""The policy: how often, after which pause, and for how much of the traffic."""

from __future__ import annotations

import time
from typing import Any

import pytest

from zmqcore import Overloaded, PeerLost, Retry, Unreachable
from zmqcore.matchmaker import Member
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.retry import RetryBudget, Search
from zmqcore.topic import Topic

TARGET = Target(Member(Topic("t", "a"), ("tcp://a:1",), "1", "here", 1), "tcp://a:1")


def search(deadline: float | None = None, **options: Any) -> Search:
    return Search(
        deadline,
        **{"patience": 0.05, "retry": Retry(), "budget": RetryBudget(), "idempotent": False, **options},
    )


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"backoff": 0.0},
        {"backoff": -1.0},
        {"backoff": 3.0, "backoff_max": 2.0},
        {"budget": -0.1},
        {"budget": 1.5},
        {"budget": float("nan")},
        {"backoff": float("nan")},
    ],
)
def test_what_makes_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Retry(**options)


def test_pauses_are_random_below_a_bound_that_doubles() -> None:
    retry = Retry(attempts=10, backoff=0.1, backoff_max=1.0)
    for number, bound in enumerate([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0], start=1):
        pauses = [retry.pause(number) for _ in range(400)]
        assert all(0.0 <= pause <= bound for pause in pauses)
        assert min(pauses) < 0.1 * bound
        assert max(pauses) > 0.9 * bound
    assert retry.pause(100_000) <= 1.0


def test_the_budget_is_a_tenth_of_the_calls_and_what_is_in_hand() -> None:
    budget, spent = RetryBudget(), 0
    assert not budget.short
    for _ in range(10_000):
        budget.earn(0.1)
        while budget.spend():
            spent += 1
    assert 1000 < spent <= 10 + 1000
    assert budget.short


def test_what_was_not_spent_is_kept_up_to_the_reserve() -> None:
    budget = RetryBudget()
    assert all(budget.spend() for _ in range(10))
    assert not budget.spend()
    for _ in range(10_000):
        budget.earn(0.1)
    assert not budget.short
    assert sum(budget.spend() for _ in range(100)) == 10


def test_who_cannot_be_reached_costs_nothing() -> None:
    looking = search(budget=(budget := RetryBudget()), retry=None)
    for _ in range(100):
        assert looking.goes_on(TARGET, Unreachable("no connection"))
        assert looking.goes_on(TARGET, PeerLost("not sent", executed_possible=False))
    assert not budget.short
    assert len(looking.tried) == 200


def test_a_lost_call_is_tried_again_only_if_it_is_idempotent() -> None:
    lost = PeerLost("gone")
    assert not search().goes_on(TARGET, lost)
    idempotent = search(idempotent=True)
    assert idempotent.goes_on(TARGET, lost)
    assert idempotent.goes_on(TARGET, lost)
    assert not idempotent.goes_on(TARGET, lost)


def test_a_rejected_call_was_not_executed_and_is_tried_again() -> None:
    looking = search(retry=Retry(attempts=4), budget=(budget := RetryBudget()))
    for _ in range(3):
        assert looking.goes_on(TARGET, Overloaded("full"))
    assert not looking.goes_on(TARGET, Overloaded("full"))
    assert sum(budget.spend() for _ in range(20)) == 7


@pytest.mark.parametrize("retry", [None, Retry(attempts=1)])
def test_no_retries(retry: Retry | None) -> None:
    assert not search(retry=retry).goes_on(TARGET, Overloaded("full"))


def test_nothing_is_tried_without_budget_or_time() -> None:
    broke = RetryBudget()
    while broke.spend():
        pass
    assert not search(budget=broke).goes_on(TARGET, Overloaded("full"))
    assert not search(time.monotonic() - 1.0).goes_on(TARGET, Overloaded("full"))
    late = search(time.monotonic() + 10.0, retry=Retry(backoff=1e6, backoff_max=1e6))
    assert late.goes_on(TARGET, Overloaded("full"))
    with pytest.raises(Overloaded, match="full"):
        late.next_round()


def test_rounds() -> None:
    """After members that cannot be reached a growing pause, until patience is at its end."""
    looking = search(patience=1e6)
    pauses = []
    for _ in range(8):
        assert looking.goes_on(TARGET, Unreachable("no connection"))
        pauses.append(looking.next_round())
        assert not looking.tried
    assert pauses == [0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5, 0.5]
    impatient = search(patience=0.01)
    assert impatient.goes_on(TARGET, Unreachable("no connection"))
    with pytest.raises(Unreachable):
        impatient.next_round()
