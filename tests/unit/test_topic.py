"""Topics: opaque parts, one canonical text, limits."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcore.errors import InvalidTopic
from zmqcore.topic import WIRE_LIMIT_BYTES, Topic

# What a naive parser trips over, far more often than chance would have it.
parts = st.text(
    st.one_of(st.sampled_from("@/%.:~ 4F0é\U0001f40d\n"), st.characters(exclude_categories=["Cs"])),
    min_size=1,
)
topics = st.builds(Topic, parts, st.none() | parts, st.just("") | parts)


@given(topics)
def test_the_text_parses_back(topic: Topic) -> None:
    again = Topic.parse(str(topic))
    assert (again.name, again.server, again.exchange) == (topic.name, topic.server, topic.exchange)
    assert again == topic
    assert hash(again) == hash(topic)
    assert again.wire == topic.wire == str(topic).encode()


@given(topics, topics)
def test_topics_are_equal_only_if_all_parts_are(one: Topic, other: Topic) -> None:
    same = (one.name, one.server, one.exchange) == (other.name, other.server, other.exchange)
    assert (one == other) is same
    assert (one.wire == other.wire) is same


@given(topics, topics)
def test_covers(one: Topic, other: Topic) -> None:
    assert one.covers(one)
    assert one.group.covers(one)
    assert one.covers(other) is (one.group == other.group and one.server in (None, other.server))


@given(topics)
def test_copies_are_equal(topic: Topic) -> None:
    assert copy.deepcopy(topic) == topic
    assert pickle.loads(pickle.dumps(topic)) == topic  # noqa: S301 - our own bytes


@pytest.mark.parametrize(
    ("topic", "text"),
    [
        (Topic("inventory"), "inventory"),
        (Topic("inventory", "a"), "inventory@a"),
        (Topic("inventory", "a", "stock"), "stock/inventory@a"),
        (Topic("volume", "host@lvm"), "volume@host%40lvm"),
        (Topic("a/b", None, "50%"), "50%25/a%2Fb"),
        (Topic("schön"), "schön"),
    ],
)
def test_canonical_text(topic: Topic, text: str) -> None:
    assert str(topic) == text
    assert topic.wire == text.encode()


def test_backends_of_one_host_stay_apart() -> None:
    lvm, ceph = Topic("volume", "host@lvm"), Topic("volume", "host@ceph")
    assert not lvm.covers(ceph)
    assert not Topic("volume", "host").covers(lvm)


def test_a_name_is_no_prefix() -> None:
    assert not Topic("compute").covers(Topic("compute_x", "a"))
    assert not Topic("compute").covers(Topic("compute", "a", "nova"))


def test_a_plain_string_is_a_name() -> None:
    assert Topic.of("a/b@c") == Topic("a/b@c")
    topic = Topic("x", "y")
    assert Topic.of(topic) is topic


def test_group() -> None:
    topic = Topic("name", "server", "exchange")
    assert topic.group == Topic("name", exchange="exchange")
    assert topic.group.group is topic.group or topic.group.group == topic.group
    assert topic.group.server is None


def test_lower_case_and_needless_escapes_are_read() -> None:
    assert Topic.parse("%61%2fb@%c3%a9") == Topic("a/b", "é")


@pytest.mark.parametrize(
    "text", ["", "@a", "/a", "a/", "a@", "a/b/c", "a@b@c", "a@b/c", "a%", "a%4", "a%zz", "%ff"]
)
def test_what_is_not_canonical_is_refused(text: str) -> None:
    with pytest.raises(InvalidTopic):
        Topic.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [("",), ("a", ""), (b"a",), (None,), ("a", 3), ("a", None, None), ("\ud800",), ("a", "\udfff")],
)
def test_what_has_no_wire_form_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(InvalidTopic) as caught:
        Topic(*arguments)
    assert isinstance(caught.value, ValueError)


def test_the_limit_counts_bytes_after_escaping() -> None:
    assert len(Topic("x" * WIRE_LIMIT_BYTES).wire) == WIRE_LIMIT_BYTES
    for name in (
        "x" * (WIRE_LIMIT_BYTES + 1),
        "@" * (WIRE_LIMIT_BYTES // 3 + 1),
        "é" * (WIRE_LIMIT_BYTES // 2 + 1),
    ):
        with pytest.raises(InvalidTopic, match=r"65,53[6-9].*65,535"):
            Topic(name)


def test_immutable() -> None:
    topic = Topic("a")
    with pytest.raises(AttributeError, match="immutable"):
        topic.name = "b"
    with pytest.raises(AttributeError, match="immutable"):
        del topic.name
    with pytest.raises(AttributeError):
        topic.other = 1  # type: ignore[attr-defined]


def test_repr_and_order() -> None:
    assert repr(Topic("a", "b", "c")) == "Topic('a', server='b', exchange='c')"
    assert repr(Topic("a")) == "Topic('a')"
    assert sorted([Topic("b"), Topic("a", "z"), Topic("a")]) == [Topic("a"), Topic("a", "z"), Topic("b")]
    assert Topic("a") != "a"
