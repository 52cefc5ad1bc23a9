"""Errors as bodies, and back."""

from __future__ import annotations

import pickle
from typing import NoReturn

import pytest

from zmqcore import errors
from zmqcore.codec import get_codec
from zmqcore.rpc import faults

CODEC = get_codec("msgpack")


class Unprintable(Exception):
    def __str__(self) -> NoReturn:
        raise RuntimeError("no text")


class _Envelope:
    """What to_exception() needs of an envelope."""

    buffers: tuple[memoryview, ...] = ()

    def __init__(self, body: bytes, codec: int = 1) -> None:
        self.body = body
        self.codec = codec
        self.kind = "error"

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self.body)


def _raised(exc: BaseException, skip: int = 0) -> dict[str, str]:
    try:
        raise exc
    except BaseException as caught:  # noqa: BLE001 - SystemExit and the like are told as well
        return faults.raised_by(caught, skip=skip)


def test_what_a_handler_raised() -> None:
    body = _raised(ValueError("bad value"))
    assert (body["code"], body["type"], body["message"]) == ("raised", "ValueError", "bad value")
    assert "in _raised" in body["traceback"]
    assert _raised(errors.Closed("x"))["type"] == "zmqcore.errors.Closed"
    assert _raised(SystemExit(3))["type"] == "SystemExit"


def test_our_frames_are_left_out_but_never_all() -> None:
    def inner() -> NoReturn:
        raise ValueError("deep")

    with pytest.raises(ValueError, match="deep") as caught:
        inner()
    traces = [faults.raised_by(caught.value, skip=skip)["traceback"] for skip in (0, 1, 9)]
    assert ["in test_our_frames" in trace for trace in traces] == [True, False, False]
    assert all("in inner" in trace for trace in traces)
    assert faults.raised_by(ValueError("never raised"))["message"] == "never raised"


@pytest.mark.parametrize(
    "exc", [Unprintable(), ValueError("\udc80"), ValueError("x" * 100_000), KeyError("key"), BaseException()]
)
def test_every_exception_can_be_told(exc: BaseException) -> None:
    body = _raised(exc)
    assert all(type(value) is str for value in body.values())
    for value in body.values():
        value.encode()  # no lone surrogates
    assert CODEC.decode(CODEC.encode(body, []), ()) == body


def test_a_remote_error_that_is_passed_on_names_the_first_one() -> None:
    body = _raised(errors.RemoteError("ValueError", "bad", "the traceback over there"))
    assert body["message"] == "ValueError: bad"
    assert "the traceback over there" in body["traceback"]


@pytest.mark.parametrize(("code", "kind"), faults._CODES.items())
def test_every_code_becomes_its_exception(code: str, kind: type[errors.ZmqcoreError]) -> None:
    body = bytes(CODEC.encode(faults.describe(code, "what happened"), []))
    exc = faults.to_exception(_Envelope(body), _Plain(), "tcp://h:1")  # type: ignore[arg-type]
    assert type(exc) is kind
    assert str(exc) == "tcp://h:1: what happened"


class _Plain:
    """The codec, on the bytes of our stand-in for an envelope."""

    def decode(self, envelope: _Envelope, buffers: tuple[memoryview, ...]) -> object:
        return CODEC.decode(envelope.body, buffers)


def test_what_was_raised_comes_back() -> None:
    body = bytes(CODEC.encode(_raised(ValueError("bad")), []))
    exc = faults.to_exception(_Envelope(body), _Plain(), "tcp://h:1")  # type: ignore[arg-type]
    assert isinstance(exc, errors.RemoteError)
    assert (exc.type, exc.message) == ("ValueError", "bad")
    assert "in _raised" in str(exc)


@pytest.mark.parametrize("value", [None, 1, "text", [], {}, {"code": 7}, {"code": "unknown", "type": None}])
def test_a_body_that_is_none_of_ours(value: object) -> None:
    body = bytes(CODEC.encode(value, []))
    exc = faults.to_exception(_Envelope(body), _Plain(), "tcp://h:1")  # type: ignore[arg-type]
    assert isinstance(exc, errors.RemoteError if isinstance(value, dict) else errors.ProtocolError)
    str(exc)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"PayloadTooLarge: too much", errors.PayloadTooLarge),
        (b"ProtocolError: nonsense", errors.ProtocolError),
        (b"SystemExit: no", errors.ProtocolError),
        (b"", errors.ProtocolError),
        (b"\xff\xfe", errors.ProtocolError),
    ],
)
def test_a_refusal_by_the_port_itself(text: bytes, kind: type[Exception]) -> None:
    exc = faults.to_exception(_Envelope(text, codec=0), CODEC, "tcp://h:1")  # type: ignore[arg-type]
    assert type(exc) is kind


@pytest.mark.parametrize(
    "exc",
    [
        errors.RemoteError("ValueError", "bad", "trace"),
        errors.PeerLost("gone", executed_possible=False),
        errors.PeerLost("gone"),
        errors.DeadlineExceeded("late"),
        errors.NoSuchTopic("nobody"),
    ],
)
def test_errors_travel_between_processes_of_ones_own(exc: errors.ZmqcoreError) -> None:
    """multiprocessing and concurrent.futures send exceptions by pickle."""
    back = pickle.loads(pickle.dumps(exc))  # noqa: S301 - what multiprocessing does with what a worker raises
    assert type(back) is type(exc)
    assert str(back) == str(exc)
    assert vars(back) == vars(exc)
