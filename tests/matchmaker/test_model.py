"""Whatever is registered and given up, in whatever order: reads and watches agree with a plain model."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from clock_support import Clock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zmqcore.matchmaker import Change, Lease, Matchmaker, Member, Watch
from zmqcore.matchmaker.base import Backend
from zmqcore.matchmaker.local import LocalBackend
from zmqcore.matchmaker.memory import MemoryBackend
from zmqcore.topic import Topic

PATIENCE = 30.0
_numbers = itertools.count()

servers = st.sampled_from(["a", "b", "host@lvm", "c/d"])
instances = st.sampled_from(["1", "2"])
topics = st.sampled_from([Topic("x"), Topic("y"), Topic("x", exchange="e")])
ttls = st.sampled_from([10.0, 100.0])


class Registry(RuleBasedStateMachine):
    """Two matchmakers on one registry; what should be in it is kept beside in a dict.

    No thread takes part in the renewals: the clock moves by the tests' hand, and what has run out is renewed
    only where the rule says so.
    """

    def make(self) -> Backend:
        raise NotImplementedError

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.matchmakers = [Matchmaker("test://", self.make(), self.clock) for _ in range(2)]
        for matchmaker in self.matchmakers:
            # Driven by hand, so that what happens is what the rules say.
            matchmaker._session._run_thread = lambda: None  # type: ignore[method-assign]
        self.model: dict[tuple[Topic, str], tuple[Member, float, Lease]] = {}
        self.leases: list[tuple[int, Lease]] = []
        self.watches: list[tuple[Watch, set[Member], int]] = []
        self.epochs = [0, 0]

    @rule(
        which=st.integers(0, 1),
        topic=topics,
        server=servers,
        instance=instances,
        ttl=ttls,
        port=st.integers(1, 3),
    )
    def register(self, which: int, topic: Topic, server: str, instance: str, ttl: float, port: int) -> None:
        member = Member(
            Topic(topic.name, server, topic.exchange), (f"tcp://127.0.0.1:{port}",), instance, "host", 0
        )
        lease = self.matchmakers[which].register(member, ttl)
        self.leases.append((which, lease))
        self.model[member.topic, instance] = (member, self.clock.now + ttl, lease)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            _, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            key = lease.member.topic, lease.member.instance
            lease.close()
            assert not lease.alive
            if key in self.model and self.model[key][2] is lease:
                del self.model[key]

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0, 50.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(which=st.integers(0, 1))
    def turn(self, which: int) -> None:
        """One turn of the thread: whatever is due is renewed, and watches catch up."""
        matchmaker = self.matchmakers[which]
        due = [
            lease
            for owner, lease in self.leases
            if owner == which and lease.state == "held" and lease.due <= self.clock.now
        ]
        self._expire()
        assert matchmaker._session.turn() is not None
        for lease in due:
            key = lease.member.topic, lease.member.instance
            held = self.model.get(key)
            if held is None or held[2] is lease:
                self.model[key] = (lease.member, self.clock.now + lease.ttl, lease)
                assert lease.alive
            else:
                assert lease.state == "replaced"

    @rule(which=st.integers(0, 1), topic=topics, server=st.none() | servers)
    def watch(self, which: int, topic: Topic, server: str | None) -> None:
        if len(self.watches) < 6:
            watch = self.matchmakers[which].watch(Topic(topic.name, server, topic.exchange))
            self.watches.append((watch, set(), 0))

    def _expire(self) -> None:
        self.model = {key: row for key, row in self.model.items() if row[1] > self.clock.now}

    def _expected(self, topic: Topic) -> list[Member]:
        rows = [member for member, _, _ in self.model.values() if topic.covers(member.topic)]
        return sorted(rows, key=lambda member: (member.server, member.instance))

    @invariant()
    def reads_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        # A renewal that is due and comes late may find its row already gone: reads remove what has run out.
        self._expire()
        for which, matchmaker in enumerate(self.matchmakers):
            for topic in (Topic("x"), Topic("y"), Topic("x", exchange="e"), Topic("x", "a")):
                membership = matchmaker.members(topic)
                assert list(membership.members) == self._expected(topic)
                assert membership.epoch >= self.epochs[which]
                self.epochs[which] = membership.epoch
            assert matchmaker.topics() == sorted({row[0].topic.group for row in self.model.values()})

    @invariant()
    def watches_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        for matchmaker in self.matchmakers:
            with matchmaker._session.io:
                matchmaker._session._catch_up()
        for number, (watch, known, epoch) in enumerate(self.watches):
            assert list(watch.current.members) == self._expected(watch.topic)
            while isinstance(change := watch.next(0), Change):
                assert change.epoch > epoch
                assert not known & set(change.added), "what is added was not there"
                assert set(change.removed) <= known, "what is removed was there"
                known = (known - set(change.removed)) | set(change.added)
                epoch = change.epoch
            assert known == set(watch.current.members)
            self.watches[number] = (watch, known, epoch)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            for matchmaker in self.matchmakers:
                matchmaker.close()


class MemoryRegistry(Registry):
    def make(self) -> Backend:
        if not hasattr(self, "name"):
            self.name = f"model-{next(_numbers)}"
        return MemoryBackend(self.name, self.clock)


class LocalRegistry(Registry):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()

    def make(self) -> Backend:
        return LocalBackend(Path(self.directory.name), self.clock)

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


TestMemory = MemoryRegistry.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLocal = LocalRegistry.TestCase
TestLocal.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
