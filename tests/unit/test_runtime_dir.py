"""The runtime directory is the user's alone, or it is refused."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from zmqcore.errors import MatchmakerError
from zmqcore.runtime_dir import private_directory, runtime_directory


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ZMQCORE_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_the_variable_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("ZMQCORE_RUNTIME_DIR", str(tmp_path / "a" / "b"))
    assert runtime_directory() == tmp_path / "a" / "b"
    assert _mode(tmp_path / "a" / "b") == 0o700
    assert not (tmp_path / "zmqcore").exists()


def test_then_the_sessions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory() == tmp_path / "zmqcore"
    assert _mode(tmp_path / "zmqcore") == 0o700
    assert runtime_directory() == tmp_path / "zmqcore"


@pytest.mark.parametrize("session", ["missing", "somebody else's", "relative", "file", None])
def test_then_the_temporary_directory(
    session: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uid = os.geteuid()
    if session == "missing":
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    elif session == "relative":
        monkeypatch.setenv("XDG_RUNTIME_DIR", ".")
    elif session == "file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    elif session is not None:
        (tmp_path / "theirs").mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "theirs"))
        theirs = tmp_path / "theirs"
        real = Path.stat

        def elsewhere(path: Path, **options: bool) -> os.stat_result:
            found = real(path, **options)
            if path != theirs:
                return found
            return os.stat_result([*found[:4], uid + 1, *found[5:]])

        monkeypatch.setattr(Path, "stat", elsewhere)
    assert runtime_directory() == tmp_path / f"zmqcore-{uid}"
    assert _mode(tmp_path / f"zmqcore-{uid}") == 0o700


def test_a_relative_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZMQCORE_RUNTIME_DIR", "here")
    with pytest.raises(MatchmakerError, match="absolute"):
        runtime_directory()


def test_a_narrow_umask_does_not_lock_us_out_and_a_wide_one_lets_nobody_in(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert _mode(private_directory(tmp_path / "wide")) == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o704, 0o770, 0o777, 0o1777])
def test_open_to_others(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(MatchmakerError, match=r"open to others.*owner uid \d+, mode d.*chmod 700") as caught:
        private_directory(path)
    assert str(path) in str(caught.value)
    assert _mode(path) == mode


def test_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(MatchmakerError, match="symlink"):
        private_directory(tmp_path / "link")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o600)
    with pytest.raises(MatchmakerError, match=str(tmp_path / "file")):
        private_directory(tmp_path / "file")


def test_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = private_directory(tmp_path / "d")
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(
        MatchmakerError, match=f"someone else.*owner uid {uid}, mode drwx------.*uid {uid + 1}"
    ):
        private_directory(path)


def test_what_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MatchmakerError, match="cannot use the runtime directory"):
        private_directory(tmp_path / "file" / "below")
