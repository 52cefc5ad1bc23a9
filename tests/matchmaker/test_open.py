"""Which URLs make a matchmaker."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmqcore.errors import MatchmakerError
from zmqcore.matchmaker import open_matchmaker


@pytest.mark.parametrize(
    "url", ["memory://", "memory://a/b", "static:///x.toml", "local://", "local:///x", "local:///"]
)
def test_known(url: str) -> None:
    matchmaker = open_matchmaker(url)
    assert matchmaker.url == url
    assert repr(matchmaker) == f"<Matchmaker {url} leases=0 watched=0 open>"
    matchmaker.close()


def test_closing_what_was_never_used_makes_nothing(tmp_path: Path) -> None:
    open_matchmaker(f"local://{tmp_path}/registry").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["", "memory", "local:/x", "zookeeper://h", "//h", "REDIS://"])
def test_unknown(url: str) -> None:
    with pytest.raises(MatchmakerError, match="known are local://, memory://, static://"):
        open_matchmaker(url)


@pytest.mark.parametrize(
    "url",
    [
        "local://relative/dir",
        "static://members.toml",
        "static:///x?y=1",
        "local:///x#y",
        "static://",
        "static:///",
    ],
)
def test_malformed(url: str) -> None:
    with pytest.raises(MatchmakerError) as caught:
        open_matchmaker(url)
    assert repr(url) in str(caught.value)
    assert ":///" in str(caught.value)
