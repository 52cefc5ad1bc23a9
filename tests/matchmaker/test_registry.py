"""What every registry that can be written does, whichever it is."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
from waiting_support import until

from zmqcore.errors import Closed, InvalidEndpoint, InvalidTopic
from zmqcore.matchmaker import Matchmaker, Member, Membership, open_matchmaker
from zmqcore.topic import Topic

PATIENCE = 30.0
Make = Callable[..., Member]
Open = Callable[[str], Matchmaker]


def _servers(membership: Membership | None) -> list[str]:
    assert membership is not None
    return [member.server for member in membership.members]


def _has(*servers: str) -> Callable[[Membership], bool]:
    return lambda membership: _servers(membership) == list(servers)


def test_what_one_registers_another_reads_whole(url: str, opened: Open, member: Make) -> None:
    here, there = opened(url), opened(url)
    announced = member("a")
    here.register(announced)
    found = there.members("inventory")
    assert found.members == (announced,)
    assert found.epoch > 0
    assert str(found.members[0]).startswith("inventory@a host:")


def test_nothing_is_opened_before_it_is_used(url: str) -> None:
    before = threading.active_count()
    matchmaker = open_matchmaker(url)
    assert matchmaker.topics() == []
    assert matchmaker.members("inventory").members == ()
    assert threading.active_count() == before
    with matchmaker.watch("inventory"):
        assert threading.active_count() == before + 1
    matchmaker.close()
    assert threading.active_count() == before


def test_members_are_sorted_and_chosen_by_group_and_server(url: str, opened: Open, member: Make) -> None:
    matchmaker = opened(url)
    for server, instance in (("b", "1"), ("a", "2"), ("a", "1")):
        matchmaker.register(member(server, instance=instance))
    matchmaker.register(member("c", topic="inventory_x"))
    matchmaker.register(member("c", exchange="other"))
    found = matchmaker.members("inventory").members
    assert [(each.server, each.instance) for each in found] == [("a", "1"), ("a", "2"), ("b", "1")]
    assert _servers(matchmaker.members(Topic("inventory", "a"))) == ["a", "a"]
    assert _servers(matchmaker.members(Topic("inventory", exchange="other"))) == ["c"]
    assert matchmaker.topics() == [
        Topic("inventory"),
        Topic("inventory_x"),
        Topic("inventory", None, "other"),
    ]


@pytest.mark.parametrize(
    "odd", ["host@lvm", "a/b", "50%", "a b", "é\U0001f40d", "x.y:z~", "'; DROP TABLE member"]
)
def test_names_are_opaque(odd: str, url: str, opened: Open, member: Make) -> None:
    matchmaker = opened(url)
    matchmaker.register(member(odd, topic=odd, exchange=odd))
    matchmaker.register(member("host@ceph", topic=odd, exchange=odd))
    assert _servers(matchmaker.members(Topic(odd, odd, odd))) == [odd]
    assert matchmaker.topics() == [Topic(odd, None, odd)]


def test_a_lease_ends_with_close(url: str, opened: Open, member: Make) -> None:
    matchmaker = opened(url)
    with matchmaker.register(member("a")) as lease:
        assert lease.alive
        assert lease.member == member("a")
        assert lease.ttl == 10.0
        assert "held" in repr(lease)
        epoch = matchmaker.members("inventory").epoch
    assert not lease.alive
    assert matchmaker.members("inventory").members == ()
    assert matchmaker.members("inventory").epoch > epoch
    lease.close()
    assert "closed" in repr(lease)


def test_a_lease_whose_object_was_dropped_is_kept(url: str, opened: Open, member: Make) -> None:
    here, there = opened(url), opened(url)
    here.register(member("a"))
    gc.collect()
    assert _servers(there.members("inventory")) == ["a"]
    here.close()
    assert there.members("inventory").members == ()


def test_a_second_registration_replaces_the_first(url: str, opened: Open, member: Make) -> None:
    here, there = opened(url), opened(url)
    first = here.register(member("a"), ttl=0.3)
    second = there.register(member("a"), ttl=0.3)
    # The first learns of it when it renews, and must then neither renew nor remove what is now another's.
    with here.watch("inventory") as watch:
        until(lambda: not first.alive)
        assert "replaced" in repr(first)
        first.close()
        assert second.alive
        assert _servers(watch.current) == ["a"]
    assert _servers(there.members("inventory")) == ["a"]


def test_bad_leases(url: str, opened: Open, member: Make) -> None:
    matchmaker = opened(url)
    for ttl in (0.0, -1.0, 0.01, float("nan"), 1e9):
        with pytest.raises(ValueError, match="ttl"):
            matchmaker.register(member(), ttl)
    wrong = Member(Topic("x", "a"), ("tcp://*:5555",), "1", "host", 1)
    with pytest.raises(InvalidEndpoint, match="name a host"):
        matchmaker.register(wrong)
    assert matchmaker.topics() == []


def test_bad_members() -> None:
    with pytest.raises(InvalidTopic, match="must name its server"):
        Member(Topic("x"), ("tcp://h:1",), "1", "h", 1)
    with pytest.raises(InvalidEndpoint, match="no endpoint"):
        Member(Topic("x", "a"), (), "1", "h", 1)
    with pytest.raises(InvalidEndpoint, match="not one str"):
        Member(Topic("x", "a"), "tcp://h:1", "1", "h", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity is 0"):
        Member(Topic("x", "a"), ("tcp://h:1",), "1", "h", 1, capacity=0)
    as_list = Member(Topic("x", "a"), ["tcp://h:1"], "1", "h", 1)  # type: ignore[arg-type]
    assert as_list.endpoints == ("tcp://h:1",)
    assert hash(as_list) == hash(Member(Topic("x", "a"), ("tcp://h:1",), "1", "h", 1))


def test_a_watch_starts_with_what_is_there(url: str, opened: Open, member: Make) -> None:
    here, there = opened(url), opened(url)
    here.register(member("a"))
    watch = there.watch("inventory")
    assert _servers(watch.current) == ["a"]
    assert not watch.stale
    change = watch.next(0)
    assert change is not None
    assert [each.server for each in change.added] == ["a"]
    assert change.removed == ()
    assert watch.next(0) is None
    empty = there.watch("nothing").next(0)
    assert empty is not None
    assert (empty.added, empty.removed) == ((), ())


def test_a_watch_tells_changes(url: str, opened: Open, member: Make) -> None:
    here, there = opened(url), opened(url)
    watch = there.watch("inventory")
    first = watch.next(0)
    assert first is not None
    lease = here.register(member("a"))
    came = watch.next(PATIENCE)
    assert came is not None
    assert came.added == (member("a"),)
    assert came.removed == ()
    assert came.epoch > first.epoch
    lease.close()
    went = watch.next(PATIENCE)
    assert went is not None
    assert went.added == ()
    assert went.removed == (member("a"),)
    assert went.epoch > came.epoch
    assert watch.current == Membership(went.epoch, ())


def test_a_member_that_announces_something_new_is_in_both(url: str, opened: Open, member: Make) -> None:
    here, there = opened(url), opened(url)
    here.register(member("a"))
    watch = there.watch("inventory")
    watch.next(0)
    moved = Member(Topic("inventory", "a"), ("tcp://127.0.0.1:6666",), "1", "host", 1)
    here.register(moved)
    change = watch.next(PATIENCE)
    assert change is not None
    assert change.added == (moved,)
    assert change.removed == (member("a"),)
    assert watch.current.members == (moved,)


def test_ones_own_watches_know_at_once(url: str, opened: Open, member: Make) -> None:
    matchmaker = opened(url)
    watch = matchmaker.watch("inventory")
    lease = matchmaker.register(member("a"))
    assert _servers(watch.current) == ["a"]
    lease.close()
    assert watch.current.members == ()


def test_a_watch_of_one_server_hears_of_no_other(url: str, opened: Open, member: Make) -> None:
    here, there = opened(url), opened(url)
    one, all_of_them = there.watch(Topic("inventory", "a")), there.watch("inventory")
    one.next(0)
    before = one.current
    here.register(member("b"))
    here.register(member("a", topic="other"))
    assert all_of_them.wait_for(_has("b"), PATIENCE) is not None
    assert one.current is before
    assert one.next(0) is None
    here.register(member("a"))
    change = one.next(PATIENCE)
    assert change is not None
    assert change.added == (member("a"),)


def test_wait_for(url: str, opened: Open, member: Make) -> None:
    here, there = opened(url), opened(url)
    watch = there.watch("inventory")
    assert watch.wait_for(_has("a"), 0.05) is None
    assert watch.wait_for(_has(), 0) is watch.current
    here.register(member("a"))
    found = watch.wait_for(_has("a"), PATIENCE)
    assert found is not None
    assert found.members == (member("a"),)


def test_closing_wakes_who_waits(url: str, opened: Open) -> None:
    matchmaker = opened(url)
    for close_matchmaker in (False, True):
        watch = matchmaker.watch("inventory")
        watch.next(0)
        outcomes: list[BaseException | object] = []

        def wait(action: Callable[[], object], outcomes: list[object] = outcomes) -> None:
            try:
                outcomes.append(action())
            except Closed as exc:
                outcomes.append(exc)

        waiting = [
            threading.Thread(target=wait, args=(watch.next,)),
            threading.Thread(target=wait, args=(lambda watch=watch: watch.wait_for(_has("x")),)),
        ]
        for thread in waiting:
            thread.start()
        (matchmaker if close_matchmaker else watch).close()
        for thread in waiting:
            thread.join(PATIENCE)
        assert [type(outcome) for outcome in outcomes] == [Closed, Closed]
        with pytest.raises(Closed):
            watch.next(0)


def test_a_closed_matchmaker(url: str, opened: Open, member: Make) -> None:
    matchmaker = opened(url)
    lease = matchmaker.register(member())
    assert repr(matchmaker) == f"<Matchmaker {url} leases=1 watched=0 open>"
    matchmaker.close()
    matchmaker.close()
    assert matchmaker.closed
    assert not lease.alive
    lease.close()
    assert repr(matchmaker) == f"<Matchmaker {url} leases=0 watched=0 closed>"
    for action in (
        lambda: matchmaker.members("x"),
        lambda: matchmaker.watch("x"),
        lambda: matchmaker.register(member()),
        matchmaker.topics,
    ):
        with pytest.raises(Closed, match="closed"):
            action()


def test_a_matchmaker_that_nobody_holds_is_collected(url: str, member: Make) -> None:
    before = threading.active_count()
    matchmaker = open_matchmaker(url)
    matchmaker.register(member())
    matchmaker.watch("inventory")
    session = weakref.ref(matchmaker._session)
    assert threading.active_count() == before + 1
    del matchmaker

    def gone() -> bool:
        gc.collect()
        return session() is None and threading.active_count() == before

    until(gone)


def test_a_watch_that_nobody_holds_is_forgotten(url: str, opened: Open) -> None:
    matchmaker = opened(url)
    watch = matchmaker.watch("inventory")
    kept = matchmaker.watch("inventory")
    group = matchmaker._session.groups[Topic("inventory")]
    del watch
    gc.collect()
    assert list(group.watches) == [kept]
    kept.close()
    until(lambda: not matchmaker._session.groups)


def test_a_watch_keeps_its_matchmaker(url: str, member: Make, opened: Open) -> None:
    matchmaker = open_matchmaker(url)
    watch = matchmaker.watch("inventory")
    session = watch.session
    del matchmaker
    gc.collect()
    opened(url).register(member("a"))
    assert watch.wait_for(_has("a"), PATIENCE) is not None
    session.close()


def test_a_lagging_reader_reads_everything(url: str, opened: Open, member: Make) -> None:
    """Traces of gone members are cleared away at some time; who reads from before that must not miss any."""
    here, there = opened(url), opened(url)
    here.register(member("gone"))
    watch = there.watch("inventory")
    seen = there._session.groups[Topic("inventory")].seen
    backend = here._session.backend
    with there._session.io:  # stands still, as if this process had been stopped
        here.register(member("stays"))
        next(iter(here._session.leases.values())).close()
        for number in range(1100):
            here.register(member("passing", instance=str(number))).close()
        with here._session.io:
            update = backend.read(Topic("inventory"), seen)
            assert update.complete
            # Whoever has not lagged behind reads what has changed only.
            assert not backend.read(Topic("inventory"), update.epoch).complete
    found = watch.wait_for(_has("stays"), PATIENCE)
    assert found is not None


def test_many_threads(url: str, opened: Open, member: Make) -> None:
    matchmaker = opened(url)
    watch = matchmaker.watch("inventory")
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                lease = matchmaker.register(member(f"{number}", instance=f"{turn}"))
                assert any(each.server == f"{number}" for each in watch.current.members)
                if turn < 9:
                    lease.close()
        except BaseException as exc:  # noqa: BLE001 - told by the test's own thread
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert _servers(watch.current) == [str(number) for number in range(8)]
