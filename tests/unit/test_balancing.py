"""Least outstanding first, ties in strict round-robin."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

from clock_support import Clock
from hypothesis import given
from hypothesis import strategies as st

from zmqcore.matchmaker import Member, Membership
from zmqcore.rpc.balancing import Balancer, Target, nearest_endpoint
from zmqcore.topic import Topic


def _member(name: str, *endpoints: str, host: str = "here", instance: str = "1") -> Member:
    return Member(Topic("t", name), endpoints or (f"tcp://{name}:1",), instance, host, 1)


def _members(names: str, epoch: int = 1) -> Membership:
    return Membership(epoch, tuple(_member(name) for name in names))


def _take(balancer: Balancer, membership: Membership, avoid: tuple[Target, ...] = ()) -> Target:
    target = balancer.choose(membership, avoid)
    assert target is not None
    return target


def test_nobody() -> None:
    assert Balancer("here").choose(Membership(0, ())) is None


def test_strict_round_robin() -> None:
    balancer, membership = Balancer("here"), _members("abc")
    names = []
    for _ in range(9):
        target = _take(balancer, membership)
        names.append(target.member.server)
        balancer.done(target)
    start = "abc".index(names[0] or "")
    assert names == [*"abcabc"[start : start + 3]] * 3


def test_fresh_clients_do_not_all_begin_with_the_same_member() -> None:
    firsts = {_take(Balancer("here"), _members("abc")).member.server for _ in range(200)}
    assert firsts == set("abc")


def test_least_outstanding_first() -> None:
    balancer, membership = Balancer("here"), _members("abc")
    held = [_take(balancer, membership) for _ in range(6)]
    assert Counter(target.member.server for target in held) == {"a": 2, "b": 2, "c": 2}
    b = next(target for target in held if target.member.server == "b")
    balancer.done(b)
    balancer.done(b)
    assert [_take(balancer, membership).member.server for _ in range(2)] == ["b", "b"]


def test_ties_are_taken_in_turn_while_calls_are_outstanding() -> None:
    balancer, membership = Balancer("here"), _members("abc")
    blocked = _take(balancer, membership).member.server
    assert blocked is not None
    names = []
    for _ in range(6):
        target = _take(balancer, membership)
        names.append(target.member.server)
        balancer.done(target)
    start = "abc".index(blocked)
    assert names == [*"abcabc"[start + 1 : start + 3]] * 3


def test_whom_to_avoid() -> None:
    balancer, membership = Balancer("here"), _members("abc")
    a = _take(balancer, membership)
    b = _take(balancer, membership, (a,))
    c = _take(balancer, membership, (a, b))
    assert {a.member.server, b.member.server, c.member.server} == set("abc")
    assert balancer.choose(membership, (a, b, c)) is None
    for target in (a, b, c):
        balancer.done(target)
    assert balancer.choose(membership, (a, b, c)) is None
    assert balancer._outstanding == 0
    only = _members("x", 2)
    x = _take(balancer, only)
    assert balancer.choose(only, (x,)) is None


def test_counts_survive_a_change_of_membership() -> None:
    balancer = Balancer("here")
    held = [_take(balancer, _members("ab")) for _ in range(4)]
    grown = _members("abc", 2)
    assert [_take(balancer, grown).member.server for _ in range(2)] == ["c", "c"]
    for target in held:
        balancer.done(target)
    assert {target.member.server: target.outstanding for target in balancer.targets(grown)} == {
        "a": 0,
        "b": 0,
        "c": 2,
    }


def test_another_run_of_a_server_starts_at_nought() -> None:
    balancer = Balancer("here")
    old = _take(balancer, Membership(1, (_member("a", instance="1"),)))
    new = _take(balancer, Membership(2, (_member("a", instance="2"),)))
    assert new is not old
    assert new.outstanding == 1
    balancer.done(old)
    assert new.outstanding == 1


def test_the_only_target_needs_no_choice() -> None:
    balancer, alone = Balancer("here"), _members("a")
    assert balancer.only == (None, None)
    target = _take(balancer, alone)
    assert balancer.only == (alone, target)
    balancer.targets(_members("ab", 2))
    assert balancer.only == (None, None)


@given(st.lists(st.one_of(st.integers(0, 5), st.just("take"), st.integers(10, 15)), max_size=60))
def test_the_choice_is_always_one_of_the_least_loaded(steps: list[int | str]) -> None:
    """Against the rule itself, under any mixture of calls, ends of calls and changes of membership."""
    balancer, membership = Balancer("here"), _members("abcd")
    held: list[Target] = []
    for step in steps:
        if step == "take":
            least = min(target.outstanding for target in balancer.targets(membership))
            target = _take(balancer, membership)
            assert target.outstanding == least + 1
            held.append(target)
        elif isinstance(step, int) and step < 10:
            if step < len(held):
                balancer.done(held.pop(step))
        elif isinstance(step, int):
            membership = _members("abcdefgh"[step - 10 :], step)
    for target in held:
        balancer.done(target)
    assert balancer._outstanding == 0
    assert {target.outstanding for target in balancer.targets(membership)} == {0}


def test_threads_share_it() -> None:
    balancer, membership = Balancer("here"), _members("abc")
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def work() -> None:
        for _ in range(300):
            target = _take(balancer, membership)
            with lock:
                counts[target.member.server] += 1
            balancer.done(target)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts.values()) == 1200
    assert set(counts) == {"a", "b", "c"}
    assert balancer._outstanding == 0


def test_an_old_view_of_the_membership_does_not_forget_counts() -> None:
    """Two threads may see the old and the new membership in turn; what a server has stays counted."""
    balancer, old, new = Balancer("here"), _members("a"), _members("ab", 2)
    held = [_take(balancer, new) for _ in range(4)]
    balancer.targets(old)
    counts = {target.member.server: target.outstanding for target in balancer.targets(new)}
    assert counts == {"a": 2, "b": 2}
    for target in held:
        balancer.done(target)


def test_the_nearest_endpoint(tmp_path: Path) -> None:
    there = tmp_path / "there.sock"
    there.touch()
    ipc, tcp = f"ipc://{there}", "tcp://10.0.0.1:5555"
    assert nearest_endpoint(_member("a", ipc, tcp), "here") == ipc
    assert nearest_endpoint(_member("a", tcp, ipc), "here") == ipc
    assert nearest_endpoint(_member("a", ipc, tcp), "elsewhere") == tcp
    assert nearest_endpoint(_member("a", f"ipc://{tmp_path}/gone.sock", tcp), "here") == tcp
    assert nearest_endpoint(_member("a", "ipc://@abstract", tcp), "here") == "ipc://@abstract"
    assert nearest_endpoint(_member("a", tcp, "tcp://10.0.0.2:1"), "here") == tcp
    assert nearest_endpoint(_member("a", ipc), "elsewhere") == ipc, "better than nothing"


# -- members that fail -----------------------------------------------------------------------------------


def _balancer(names: str) -> tuple[Balancer, Membership, Clock, dict[str, Target]]:
    clock, membership = Clock(), _members(names)
    balancer = Balancer("here", clock)
    return balancer, membership, clock, dict(zip(names, balancer.targets(membership), strict=True))


def _names(balancer: Balancer, membership: Membership, calls: int) -> str:
    names = ""
    for _ in range(calls):
        target = _take(balancer, membership)
        names += target.member.server or ""
        balancer.done(target)
    return names


def _fail(balancer: Balancer, target: Target, times: int) -> None:
    for _ in range(times):
        balancer.failed(target)


def test_who_fails_again_and_again_is_put_aside_for_a_while() -> None:
    balancer, membership, clock, targets = _balancer("abcd")
    _fail(balancer, targets["b"], 4)
    assert set(_names(balancer, membership, 8)) == set("abcd")
    _fail(balancer, targets["b"], 1)
    names = _names(balancer, membership, 9)
    assert names == names[:3] * 3, "the others go on in turn"
    assert set(names) == set("acd")
    clock.now += 0.99
    assert "b" not in _names(balancer, membership, 8)
    clock.now += 0.02
    assert set(_names(balancer, membership, 8)) == set("abcd")


def test_one_more_failure_puts_it_aside_again_for_twice_as_long() -> None:
    balancer, membership, clock, targets = _balancer("abcd")
    _fail(balancer, targets["b"], 5)
    for duration in (1, 2, 4, 8, 16, 30, 30):
        clock.now += duration - 0.01
        assert "b" not in _names(balancer, membership, 8)
        clock.now += 0.02
        assert "b" in _names(balancer, membership, 8)
        _fail(balancer, targets["b"], 1)


def test_an_answer_makes_up_for_all() -> None:
    balancer, membership, clock, targets = _balancer("abcd")
    _fail(balancer, targets["b"], 5)
    balancer.answered(targets["b"])
    assert "b" in _names(balancer, membership, 8)
    _fail(balancer, targets["b"], 4)
    assert "b" in _names(balancer, membership, 8)
    _fail(balancer, targets["b"], 1)
    clock.now += 1.01
    assert "b" in _names(balancer, membership, 8), "it begins with a short time again"


def test_never_more_than_half() -> None:
    for names, most in (("a", 0), ("ab", 1), ("abc", 1), ("abcd", 2), ("abcde", 2)):
        balancer, membership, _, targets = _balancer(names)
        for target in targets.values():
            _fail(balancer, target, 20)
        assert len(set(_names(balancer, membership, 40))) == len(names) - most, names


def test_when_others_have_gone_too_many_would_be_aside() -> None:
    balancer, _, _, targets = _balancer("abcd")
    _fail(balancer, targets["a"], 5)
    _fail(balancer, targets["b"], 5)
    fewer = _members("abc", 2)
    assert set(_names(balancer, fewer, 12)) == set("abc")


def test_who_is_aside_is_the_last_resort() -> None:
    balancer, membership, _, targets = _balancer("ab")
    _fail(balancer, targets["a"], 5)
    assert _take(balancer, membership, (targets["b"],)) is targets["a"]
    assert balancer.choose(membership, (targets["a"], targets["b"])) is None


def test_others_are_preferred_to_who_was_overloaded_a_moment_ago() -> None:
    balancer, membership, clock, targets = _balancer("abc")
    balancer.overloaded(targets["a"])
    balancer.overloaded(targets["b"])
    assert set(_names(balancer, membership, 9)) == {"c"}
    balancer.overloaded(targets["c"])
    assert set(_names(balancer, membership, 9)) == set("abc"), "it is no use to spare all of them"
    _fail(balancer, targets["c"], 5)
    assert set(_names(balancer, membership, 9)) == set("ab"), "rather who is overloaded than who fails"
    clock.now += 0.11
    assert set(_names(balancer, membership, 9)) == set("ab")
