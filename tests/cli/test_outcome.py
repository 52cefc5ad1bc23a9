"""Exit codes and hints."""

from __future__ import annotations

import re

import pytest

from zmqcore import errors
from zmqcore.cli.outcome import EXIT_CODES_HELP, Exit, hint_for, status_of

CODES = {
    "BadArguments": 1,
    "Closed": 70,
    "DeadlineExceeded": 4,
    "InternalError": 70,
    "InvalidEndpoint": 2,
    "InvalidTopic": 2,
    "MatchmakerError": 6,
    "NoSuchMethod": 1,
    "NoSuchTopic": 3,
    "Overloaded": 3,
    "PayloadTooLarge": 2,
    "PeerLost": 3,
    "PoolExhausted": 6,
    "ProtocolError": 3,
    "RemoteError": 1,
    "Unreachable": 3,
    "ZmqcoreError": 6,
}


def make(name: str) -> errors.ZmqcoreError:
    if name == "RemoteError":
        return errors.RemoteError("builtins.KeyError", "'x'")
    error: errors.ZmqcoreError = getattr(errors, name)("why")
    return error


@pytest.mark.parametrize("name", errors.__all__)
def test_each_error_has_its_code(name: str) -> None:
    """An error that is new in the tree must be given a code here, not fall into one by accident."""
    assert status_of(make(name)) == CODES[name]


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"RemoteError", "ZmqcoreError"}))
def test_each_error_has_a_hint(name: str) -> None:
    assert hint_for(make(name), "inventory")
    assert "{" not in hint_for(make(name), "inventory")


def test_a_hint_names_the_topic() -> None:
    assert "zmqcore call inventory zmqcore.methods" in hint_for(errors.NoSuchMethod("m"), "inventory")


def test_a_lost_peer_tells_whether_it_may_have_run() -> None:
    assert "may have been run" in hint_for(errors.PeerLost("x", executed_possible=True))
    assert "safe to try again" in hint_for(errors.PeerLost("x", executed_possible=False))


def test_what_is_unexpected_is_not_taken_for_a_remote_error() -> None:
    assert status_of(KeyError("x")) is Exit.INTERNAL
    assert status_of(PermissionError("x")) is Exit.BROKEN


def test_the_help_lists_every_code() -> None:
    listed = {int(number) for number in re.findall(r"(?m)^ +(\d+)  ", EXIT_CODES_HELP)}
    assert listed == {int(code) for code in Exit}
