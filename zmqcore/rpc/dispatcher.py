"""From a request to a method and back: finds it, checks the arguments, runs it, answers."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from functools import cached_property
from types import ModuleType
from typing import Any

from zmqcore import errors
from zmqcore._request import Request
from zmqcore.codec import Codec
from zmqcore.rpc import deadline, faults
from zmqcore.rpc.metadata import current as current_metadata
from zmqcore.rpc.metadata import decode as decode_metadata
from zmqcore.rpc.producer import is_stream, produce, produce_async
from zmqcore.topic import Topic

__all__ = ["Dispatcher", "public_methods", "signature_text"]

_logger = logging.getLogger("zmqcore.server")
_set_deadline = deadline.current.set
_reset_deadline = deadline.current.reset

#: How often, in seconds, the log says that calls are being rejected: there may be thousands of them each second.
_WARN_INTERVAL = 10.0


def public_methods(*endpoints: Any, coroutines: bool = False) -> dict[str, Callable[..., Any]]:
    """Return the callables that ``endpoints`` offer, by name; of two with one name the first wins.

    An endpoint is an object or a module (its callable attributes whose names do not start with ``_``), or a mapping
    of names to callables. Raises TypeError if there is none, for a class (instantiate it), for an endpoint with nothing
    to call, and, without ``coroutines``, for coroutine functions and asynchronous generators (use an AsyncServer).
    """
    if not endpoints:
        raise TypeError(
            "there is nothing to serve; give an object, a module, or a mapping of names to callables"
        )
    methods: dict[str, Callable[..., Any]] = {}
    for endpoint in endpoints:
        if isinstance(endpoint, type):
            raise TypeError(
                f"{endpoint.__qualname__} is a class; serve an instance of it: {endpoint.__qualname__}()"
            )
        found = dict(endpoint) if isinstance(endpoint, Mapping) else _attributes(endpoint)
        if not found:
            raise TypeError(f"{endpoint!r} has no public method to serve")
        for name, method in found.items():
            if not callable(method):
                raise TypeError(f"method {name!r} of {endpoint!r} is not callable")
            if not coroutines and (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)):
                raise TypeError(f"{name!r} is a coroutine function: serve it by an AsyncServer")
            methods.setdefault(name, method)
    return methods


def _attributes(endpoint: Any) -> dict[str, Callable[..., Any]]:
    found = {}
    for name in dir(endpoint):
        if name.startswith("_"):
            continue
        # Look before touching: reading a property would run it. A class is data, not a method.
        static = inspect.getattr_static(endpoint, name, None)
        if isinstance(static, (property, cached_property, type)):
            continue
        value = getattr(endpoint, name, None)
        if isinstance(endpoint, ModuleType) and (isinstance(value, type) or not inspect.isroutine(value)):
            continue
        if callable(value):
            found[name] = value
    return found


#: A method, its arguments and its keyword arguments, its deadline, and what it wants at its end.
Work = tuple[Callable[..., Any], list[Any], dict[str, Any], float | None, str | None]


class Dispatcher:
    """Run requests for ``methods``. Thread-safe; the counters are approximate under many threads.

    Whatever a handler does (raise, call ``sys.exit``, return what cannot be packed), the caller gets a clear
    error and the server goes on.
    """

    def __init__(self, topic: Topic, methods: Mapping[str, Callable[..., Any]], codec: Codec) -> None:
        self._topics = {topic.wire, topic.group.wire}
        self._topic = topic
        self._methods = dict(methods)
        self._codec = codec
        self._codec_id = codec.id
        self._decode = codec.decode
        self._encode = codec.encode
        self.handled = self.failed = self.expired = self.refused = self.rejected = 0
        self._silent_until = 0.0
        self._streams = {name: method for name, method in self._methods.items() if is_stream(method)}
        self._plain = {name: method for name, method in self._methods.items() if name not in self._streams}

    @property
    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """What can be called, by name."""
        return self._methods

    def open(self, request: Request) -> Work | None:
        """Return the method that ``request`` asks for and its arguments.

        None if it was refused, and answered, or if its caller has cancelled it. What accompanies it is put into the
        current context, which is to be the request's own.
        """
        return request.open(self._plain, self._topics, self._codec_id, self._decode) or self._open(request)

    def _open(self, request: Request) -> Work | None:
        """open() for a request that is out of the ordinary."""
        wants = request.wants
        method = self._plain.get(request.method)
        if method is None and (method := self._streams.get(request.method)) is not None:
            wants = "stream"
            if not request.can_stream:
                problem = f"{request.method!r} answers by a stream: it is to be called, and over a connection with flow"
                self._refuse(request, "protocol", problem)
                return None
        envelope = request.envelope
        if method is None or request.topic not in self._topics or envelope.codec != self._codec_id:
            self._refuse_unknown(request)
            return None
        remaining = request.remaining
        if remaining == 0.0:
            if request.cancelled:
                return None
            self.expired += 1
            self._refuse(request, "expired", "the caller's deadline had passed before the work was begun")
            return None
        try:
            args, kwargs = self._codec.decode(envelope, envelope.buffers or ())
            if type(args) is not list or type(kwargs) is not dict:
                raise ValueError
            if envelope.metadata:
                current_metadata.set(decode_metadata(envelope.metadata, self._codec))
        except errors.PayloadTooLarge as exc:
            self._refuse(request, "too_large", str(exc))
            return None
        except Exception as exc:  # noqa: BLE001  (a codec of the user's may raise anything)
            self._refuse(request, "protocol", str(exc) or "the body is not [args, kwargs]")
            return None
        return method, args, kwargs, None if remaining is None else time.monotonic() + remaining, wants

    def run(self, request: Request) -> None:
        """Run one request and answer it. Never raises."""
        self.run_each((request,), ())

    def run_each(self, requests: Iterable[Request], left: Sized) -> bool:
        """Run requests one after the other and answer them. Never raises.

        Return True as soon as a handler has put something into ``left``, and False at the end. A loop, because a
        function call for each request would cost more than what is called here.
        """
        plain, topics, codec_id, decode = self._plain, self._topics, self._codec_id, self._decode
        for request in requests:
            try:
                work = request.open(plain, topics, codec_id, decode) or self._open(request)
                if work is None:
                    request.finish()
                    continue
                method, args, kwargs, until, wants = work
                token = None if until is None else _set_deadline(until)
                try:
                    if kwargs:
                        result = method(*args, **kwargs)
                    elif len(args) == 1:
                        result = method(args[0])  # the usual number, and twice as fast as by *
                    else:
                        result = method(*args)
                    if wants is not None and wants == "stream":
                        produce(request, result, self._send_item)
                        result = None  # the end
                except BaseException as exc:  # noqa: BLE001  (SystemExit too: a handler does not end the server)
                    self._report_raised(request, method, args, kwargs, exc)
                else:
                    self.handled += 1
                    if wants is not None and wants != "finish":
                        self._reply(request, result)
                finally:
                    if token is not None:
                        _reset_deadline(token)
                    if wants is not None and wants == "finish":
                        request.finish()
            except Exception as exc:  # noqa: BLE001 - give_up() logs it
                self.give_up(request, exc)
            if left:
                return True
        return False

    async def run_async(self, request: Request, sent: Callable[[], None]) -> None:
        """Run one request for a coroutine function or a generator and answer it. Never raises.

        Whoever cancels the task gets the caller an error, not silence; unless it was the caller. What was accepted
        is not finished then, and its sender sends it again. ``sent()`` is called whenever part of the answer was sent.
        """
        try:
            work = self.open(request)
            if work is None:
                request.finish()
                return
            method, args, kwargs, _, wants = work
            try:
                answer = method(*args, **kwargs) if kwargs else method(*args)
                if wants == "stream":
                    answer = produce_async(request, answer, self._send_item, sent)
                result = await answer
            except BaseException as exc:  # noqa: BLE001  (SystemExit and CancelledError too)
                if not (request.cancelled and isinstance(exc, asyncio.CancelledError)):
                    self._report_raised(request, method, args, kwargs, exc)
            else:
                self.handled += 1
                if wants is not None and wants != "finish":
                    self._reply(request, result)
            if wants == "finish" and not _is_cancelled():
                request.finish()
        except Exception as exc:  # noqa: BLE001 - give_up() logs it
            self.give_up(request, exc)

    def reject(self, request: Request, limits: str) -> None:
        """There is no room for a call: tell its caller, who may try elsewhere. Never raises."""
        why = f"the limits {limits} are reached"
        self.rejected += 1
        if (now := time.monotonic()) >= self._silent_until:
            self._silent_until = now + _WARN_INTERVAL
            _logger.warning("%s is overloaded: %s; %d calls rejected so far", self._topic, why, self.rejected)
        try:
            self._error(request, faults.describe("overloaded", f"{why}; not executed"))
        except Exception:
            _logger.exception("%r could not be answered", request)

    def give_up(self, request: Request, exc: Exception) -> None:
        """What runs requests has itself raised ``exc``, which is a fault of ours: tell the caller. Never raises."""
        self.failed += 1
        request.finish()
        _logger.error("%r could not be handled", request, exc_info=exc)
        if request.wants_reply:
            try:
                problem = f"{request.method}: the server failed with {type(exc).__name__}; its log says more"
                self._error(request, faults.describe("internal", problem))
            except Exception:
                _logger.exception("%r could not be answered", request)

    def _send_item(self, request: Request, item: Any) -> bool:
        buffers: list[Any] = []
        return request.item(self._encode(item, buffers), buffers or None, self._codec_id)

    def _reply(self, request: Request, result: Any) -> None:
        buffers: list[Any] = []
        encode = self._encode
        try:
            request.reply(encode(result, buffers), buffers or None, self._codec_id)
        except errors.Closed:
            _logger.warning("%r: the server was closed before the result could be sent", request)
        except errors.ZmqcoreError as exc:
            self.failed += 1
            self._error(
                request,
                {
                    **faults.raised_by(exc),
                    "message": f"the result of {request.method!r} cannot be sent: {exc}",
                    "traceback": "",
                },
            )

    def _refuse_unknown(self, request: Request) -> None:
        topic = request.topic.decode("utf-8", "backslashreplace")
        if request.topic not in self._topics:
            self._refuse(
                request, "no_such_topic", f"topic {topic!r} is not served here, but {str(self._topic)!r} is"
            )
        elif request.envelope.codec != self._codec_id:
            self._refuse(
                request, "protocol", f"the body has codec {request.envelope.codec}; here is {self._codec_id}"
            )
        else:
            names = sorted(name for name in self._methods if not name.startswith("zmqcore."))
            self._refuse(
                request,
                "no_such_method",
                f"topic {topic!r} has no method {request.method!r}; it has {', '.join(names[:20])}"
                + (", …" if len(names) > 20 else ""),
            )

    def _refuse(self, request: Request, code: str, message: str) -> None:
        self.refused += 1
        if request.wants_reply:
            self._error(request, faults.describe(code, message))
        else:
            _logger.warning("%s %r was refused: %s", request.kind, request.method, message)

    def _report_raised(
        self,
        request: Request,
        method: Callable[..., Any],
        args: list[Any],
        kwargs: dict[str, Any],
        exc: BaseException,
    ) -> None:
        # Raised by the call itself, not inside the handler: the arguments may not fit. Around what is wrapped, as by
        # interceptors, nobody can tell where it came from.
        if (
            isinstance(exc, TypeError)
            and (
                exc.__traceback__ is None
                or exc.__traceback__.tb_next is None
                or hasattr(method, "__wrapped__")
            )
            and (problem := _misfit(method, args, kwargs)) is not None
        ):
            self._refuse(request, "bad_arguments", f"{request.method}: {problem}")
            return
        self.failed += 1
        if request.wants_reply:
            # Our own frames say nothing about the handler.
            self._error(request, faults.raised_by(exc, skip=2 if request.method in self._streams else 1))
        else:
            _logger.error("%s %r raised", request.kind, request.method, exc_info=exc)

    def _error(self, request: Request, body: dict[str, str]) -> None:
        try:
            request.error(self._encode(body, []), None, self._codec_id)
        except errors.Closed:
            _logger.warning("%r: the server was closed before the error could be sent", request)
        except errors.PayloadTooLarge:
            short = {key: value[:1000] for key, value in body.items()}
            request.error(self._encode(short, []), None, self._codec_id)


def _is_cancelled() -> bool:
    """Whether somebody has cancelled the running task: a CancelledError may also be a handler's own affair."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _misfit(method: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """Return why the arguments do not fit the method's signature; None if they do or nobody can tell."""
    try:
        signature = inspect.signature(method)
    except Exception:  # noqa: BLE001 - __signature__ may be anything
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as exc:
        return f"{exc}; its signature is {signature_text(method)}"
    return None


def signature_text(method: Callable[..., Any]) -> str:
    """Return a method's signature as text, ``(…)`` if it has none that can be shown."""
    try:
        return str(inspect.signature(method))
    except Exception:  # noqa: BLE001 - __signature__ and the repr of a default may be anything
        return "(…)"
