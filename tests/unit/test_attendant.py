"""The thread that attends to channels on which nobody waits."""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from zmqcore import errors
from zmqcore.attendant import Attendant

PATIENCE = 30.0


class Channel:
    """A channel that asks to be attended to ``turns`` times, and again whenever its fd becomes readable."""

    unhurried = False

    def __init__(self, turns: int = 1, pause: float = 0.0) -> None:
        self.fd, self._write = os.pipe()
        self.turns = turns
        self.pause = pause
        self.attended = 0
        self.threads: set[str] = set()
        self.before_return: Callable[[], None] | None = None
        self.raises: Exception | None = None

    def attend(self) -> float | None:
        self.threads.add(threading.current_thread().name)
        self.attended += 1
        if self.raises is not None:
            raise self.raises
        if self.attended < self.turns:
            return self.pause
        hook, self.before_return = self.before_return, None
        if hook is not None:
            hook()
        return None

    def signal(self) -> None:
        os.write(self._write, b"x")

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write)


@pytest.fixture
def attendant() -> Iterator[Attendant]:
    attendant = Attendant()
    yield attendant
    attendant.close()


@pytest.fixture
def channel() -> Iterator[Callable[..., Channel]]:
    made: list[Channel] = []

    def make(*args: float, **kwargs: float) -> Channel:
        made.append(Channel(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "it has not happened"
        time.sleep(0.002)


def test_no_thread_until_it_is_needed() -> None:
    before = threading.active_count()
    attendant = Attendant()
    assert threading.active_count() == before
    attendant.close()


def test_a_channel_is_attended_until_it_has_enough(
    attendant: Attendant, channel: Callable[..., Channel]
) -> None:
    one, two = channel(5), channel(3, 0.001)
    attendant.attend(one)
    attendant.attend(two)
    _until(lambda: one.attended == 5 and two.attended == 3)
    assert one.threads == two.threads == {"zmqcore-attendant"}
    later = channel(3, 0.001)
    attendant.attend(later)
    _until(lambda: later.attended == 3)
    assert (one.attended, two.attended) == (5, 3)


@pytest.fixture
def no_descriptor() -> Iterator[Callable[[], None]]:
    """Nobody gets a descriptor until the function is called."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)

    def over() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    yield over
    over()


def test_without_a_descriptor_it_says_so_and_tries_again(
    attendant: Attendant,
    channel: Callable[..., Channel],
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    one, two = channel(2), channel(2)
    over = request.getfixturevalue("no_descriptor")
    attendant.attend(one)
    _until(lambda: "no descriptor is left" in caplog.text)
    attendant.attend(two)
    assert one.attended == two.attended == 0
    over()
    _until(lambda: one.attended == two.attended == 2)
    assert caplog.text.count("no descriptor is left") == 1


def test_close_while_there_is_no_descriptor(
    attendant: Attendant, channel: Callable[..., Channel], request: pytest.FixtureRequest
) -> None:
    one = channel(2)
    request.getfixturevalue("no_descriptor")
    attendant.attend(one)
    attendant.close()
    assert not any(thread.name == "zmqcore-attendant" for thread in threading.enumerate())


def test_it_wakes_when_the_descriptor_is_readable(
    attendant: Attendant, channel: Callable[..., Channel]
) -> None:
    one = channel(2, 3600.0)
    attendant.attend(one)
    _until(lambda: one.attended == 1)
    one.signal()
    _until(lambda: one.attended == 2)


@pytest.mark.parametrize(("count", "interval"), [(1, 0.005), (16, 0.005), (160, 0.05)])
def test_many_that_are_in_no_hurry_are_looked_after_less_often(
    attendant: Attendant, channel: Callable[..., Channel], count: int, interval: float
) -> None:
    for _ in range(count):
        each = channel(10, 3600.0)
        each.unhurried = True
        attendant._work.channels.add(each)
    fds, timeout = attendant._work._look_after_channels()
    assert len(fds) == 1, "only that by which it is woken"
    assert timeout == pytest.approx(interval)


def test_a_channel_that_somebody_leads_is_not_polled_but_looked_after(
    attendant: Attendant, channel: Callable[..., Channel]
) -> None:
    one = channel(10, 3600.0)
    one.unhurried = True
    attendant.attend(one)
    _until(lambda: one.attended == 10)


def test_a_channel_that_comes_back_while_it_is_being_dismissed(
    attendant: Attendant, channel: Callable[..., Channel]
) -> None:
    """A request is submitted after attend() has found nothing and before its caller has heard so."""
    one = channel(1)
    one.before_return = lambda: attendant.attend(one)
    attendant.attend(one)
    _until(lambda: one.attended == 2)


def test_one_channel_that_fails_costs_others_nothing(
    attendant: Attendant, channel: Callable[..., Channel], caplog: pytest.LogCaptureFixture
) -> None:
    broken, closed, fine = channel(), channel(), channel(5, 0.001)
    broken.raises = RuntimeError("broken channel")
    closed.raises = errors.Closed("closed channel")
    with caplog.at_level(logging.ERROR, "zmqcore"):
        for each in (broken, closed, fine):
            attendant.attend(each)
        _until(lambda: fine.attended == 5)
    _until(lambda: "broken channel" in caplog.text)
    assert "closed channel" not in caplog.text
    assert (broken.attended, closed.attended) == (1, 1)


def test_a_new_channel_is_attended_at_once_while_others_wait(
    attendant: Attendant, channel: Callable[..., Channel]
) -> None:
    slow, quick = channel(2, 3600.0), channel(1)
    attendant.attend(slow)
    _until(lambda: slow.attended == 1)
    attendant.attend(quick)
    _until(lambda: quick.attended == 1)


def test_close_ends_the_thread_and_twice_is_fine(
    attendant: Attendant, channel: Callable[..., Channel]
) -> None:
    one = channel(2, 3600.0)
    attendant.attend(one)
    _until(lambda: one.attended == 1)
    attendant.close()
    assert not any(thread.name == "zmqcore-attendant" for thread in threading.enumerate())
    # The descriptors are closed, and their numbers may belong to somebody else by now.
    stranger = os.pipe()
    os.set_blocking(stranger[0], False)
    attendant.close()
    attendant.attend(one)
    with pytest.raises(BlockingIOError):
        os.read(stranger[0], 1)
    for fd in stranger:
        os.close(fd)
    assert not any(thread.name == "zmqcore-attendant" for thread in threading.enumerate())
    assert one.attended <= 2


def test_close_from_its_own_thread(attendant: Attendant, channel: Callable[..., Channel]) -> None:
    one = channel(1)
    one.before_return = attendant.close
    attendant.attend(one)
    _until(lambda: not any(thread.name == "zmqcore-attendant" for thread in threading.enumerate()))
