"""A small messaging library, as frameworks have them: queues, headers, JSON. The wire it leaves to a driver.

It imports nothing of zmqcore. Another driver could take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


class Undelivered(Exception):
    """The message did not reach a consumer; it can be sent again without doing anything twice."""


class Unanswered(Exception):
    """No answer. Whether a consumer has worked at the message is not known."""


class Failed(Exception):
    """The consumer raised; its text."""


@dataclass
class Message:
    """What travels: a JSON payload, headers, and attachments (bytes or other buffers) that are not to be copied."""

    payload: Any
    headers: dict[str, str] = field(default_factory=dict)
    attachments: list[Any] = field(default_factory=list)


class Delivery(Protocol):
    """A message that has come."""

    message: Message

    def answer(self, message: Message) -> None: ...
    def fail(self, text: str) -> None: ...
    def done(self) -> None: ...


class Driver(Protocol):
    """What the library asks of a driver."""

    def publish(self, address: str, queue: str, message: Message, timeout: float) -> None: ...
    def ask(self, address: str, queue: str, message: Message, timeout: float) -> Message: ...
    def consume(self, address: str, queue: str) -> Iterator[Delivery]: ...
    def stop_consuming(self) -> None: ...
    def close(self) -> None: ...


def serve(driver: Driver, address: str, queue: str, handler: Callable[[Message], Message]) -> None:
    """Run ``handler`` for each message of ``queue`` until the driver stops consuming."""
    for delivery in driver.consume(address, queue):
        try:
            delivery.answer(handler(delivery.message))
        except Exception as exc:  # noqa: BLE001  (whatever the handler raises goes to who asked)
            delivery.fail(f"{type(exc).__name__}: {exc}")
        finally:
            delivery.done()
